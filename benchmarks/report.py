"""Render JSON lines of the benchmarks as the Markdown tables of RESULTS.md.

python benchmarks/report.py results.jsonl …        (without files: stdin)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from electra_composer.errors import UserError, report_user_errors

Line = dict[str, Any]
OPEN = "–"
"""Cell of a value that was not measured."""


def main(arguments: list[str] | None = None) -> None:
    """Print the report of the given files."""
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", help="files of JSON lines; default: stdin")
    options = parser.parse_args(arguments)
    lines: list[Line] = []
    for name in options.files or ["-"]:
        lines += read(name)
    print(report(lines))


def read(name: str) -> list[Line]:
    """Read the JSON lines of a file, or of stdin for `-`.

    Raises:
        UserError: the file cannot be read, or a line is not the result of a known benchmark.
    """
    try:
        with open(sys.stdin.fileno() if name == "-" else name, encoding="utf-8", closefd=name != "-") as file:
            lines = [json.loads(text) for text in file if text.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not readable as JSON lines: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or line.get("benchmark") not in SECTIONS:
            raise UserError(
                f"{name}, line {number}: expected an object whose benchmark is one of {', '.join(SECTIONS)}"
            )
    return lines


def report(lines: list[Line]) -> str:
    """Render one line per machine, then every table under its heading."""
    parts = list(dict.fromkeys(describe(line["machine"]) for line in lines if "machine" in line))
    for kind, (heading, render) in SECTIONS.items():
        chosen = [line for line in lines if line["benchmark"] == kind]
        if chosen:
            parts.append(f"### {heading}\n\n{render(chosen)}")
    return "\n\n".join(parts)


def describe(machine: Line) -> str:
    """Render hardware, versions and date in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    hardware = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, no GPU"
    return f"{hardware}; {machine['system']}; {versions}; {machine['date']}."


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    """Render a Markdown table, with :data:`OPEN` for None."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(OPEN if cell is None else str(cell) for cell in row) + " |" for row in cells)


def steps(lines: list[Line]) -> str:
    """Render one row per run of pretrain_step.py: median step times, speed, ratios, memory and MFU."""
    header = ["size", "rows × tokens", "data", "precision", "settings", "reference ms", "ours ms", "in Trainer ms"]
    header += ["no callbacks ms", "ours tokens/s", "ours / reference", "Trainer", "callbacks", "memory", "MFU"]
    rows = []
    for line in lines:
        options, times = line["options"], line["step_ms"]
        names = ("reference", "ours", "trainer", "trainer_without_callbacks")
        speed = line["tokens_per_second"].get("ours")
        rows.append(
            [
                options["size"],
                f"{options['batch']} × {line['length']}",
                options["data"],
                options["precision"],
                _settings(options),
                *(f"{times[name]['median']:.2f}" if name in times else None for name in names),
                None if speed is None else f"{speed:,}",
                _with(line["speedup"], "{:.2f} ×"),
                _with(line["trainer_overhead_percent"], "{:+.1f}%"),
                _with(line["callbacks_cost_percent"], "{:+.1f}%"),
                _with(line["memory_ratio"], "{:.2f} ×"),
                _with((line["mfu"] or {}).get("ours"), "{:.1%}"),
            ]
        )
    return table(header, rows)


def _with(value: float | None, form: str) -> str | None:
    return None if value is None else form.format(value)


def _settings(options: Line) -> str:
    return " ".join([f"compile={options['compile']}", *options["overrides"]])


def profiles(lines: list[Line]) -> str:
    """Render the largest kernels of each profile, by their own time, and the number of all."""
    parts = []
    for line in lines:
        options = line["options"]
        title = f"{line['variant']}, {options['size']}, {options['batch']} × {line['length']}, {options['precision']}"
        counts = f"{line['kernels_per_step']:g} kernels and {line['copies_per_step']:g} copies a step"
        rows = [
            [
                f"`{kernel['name'][:80]}`",
                f"{kernel['calls_per_step']:g}",
                kernel["ms_per_step"],
                f"{kernel['share']:.1%}",
            ]
            for kernel in line["kernels"]
        ]
        parts.append(
            f"{title}, {_settings(options)}; {counts}, {line['ms_per_step']} ms:\n\n"
            + table(["kernel", "calls a step", "ms a step", "share"], rows)
        )
    return "\n\n".join(parts)


def test_runs(lines: list[Line]) -> str:
    """Render the last line of pytest."""
    return "\n".join(line["summary"] for line in lines)


def conversions(lines: list[Line]) -> str:
    """Render one row per conversion."""
    rows = []
    for line in lines:
        summary = line.get("summary") or {"splits": {}}
        splits = summary["splits"].values()
        counts = [sum(split[name] for split in splits) for name in ("documents", "tokens")] if splits else [None, None]
        counts.append(summary.get("tokens_per_second"))
        rows.append([line["data"], *(_with(count, "{:,.0f}") for count in counts), line["wall_seconds"]])
    return table(["text", "documents", "tokens", "tokens/s", "seconds in all"], rows)


def same_seeds(lines: list[Line]) -> str:
    """Render one line per pair of runs with one seed, and the first batch that differs."""
    parts = []
    for line in lines:
        found, begin = line["first_difference"], f"{line['batches']} batches of two runs with one seed: "
        if found is None:
            parts.append(begin + "all losses and rows are the same to the bit.")
            continue
        first, second = found["first_run"], found["second_run"]
        names = ", ".join(name for name in first if first[name] != second.get(name))
        parts.append(f"{begin}{line['differing']} differ, first batch {first['batch']} in {names}.")
    return "\n".join(parts)


def real_runs(lines: list[Line]) -> str:
    """Render one row per pretraining run: its speed by the median over its windows, and its losses."""
    header = ["text", "batches", "seconds in all", "tokens/s", "MFU", "waiting for data", "MLM loss, first → last"]
    header += ["RTD loss", "RTD recall", "evaluation: MLM, RTD", "spikes"]
    rows = []
    for line in lines:
        rows.append(
            [
                line["data"],
                f"{line['batches']:,} of {line['of_batches']:,}",
                line["wall_seconds"],
                _with(line["tokens_per_second"], "{:,.0f}"),
                _with(line["mfu"], "{:.1%}"),
                _with(line["data_wait"], "{:.1%}"),
                " → ".join(_with(line[name], "{:.3f}") or OPEN for name in ("first_mlm_loss", "mlm_loss")),
                _with(line["rtd_loss"], "{:.4f}"),
                _with(line["rtd_recall"], "{:.1%}"),
                ", ".join(_with(line[name], "{:.3f}") or OPEN for name in ("eval_mlm_loss", "eval_rtd_loss")),
                _with(line["loss_spikes"], "{:.0f}"),
            ]
        )
    return table(header, rows)


def scores(lines: list[Line]) -> str:
    """Render one row per task and finetuning part."""
    header = ["task", "scores on dev (× 100)", "training examples at most", "seconds in all"]
    rows = []
    for line in lines:
        for task, metrics in line["tasks"].items():
            shown = ", ".join(f"{name} {_with(value, '{:.1f}') or OPEN}" for name, value in metrics.items())
            rows.append([task, shown, f"{line['max_train_examples']:,}", line["wall_seconds"]])
    return table(header, rows)


def failures(lines: list[Line]) -> str:
    """Render one row per part that failed or ran out of time."""
    return table(
        ["part", "exit status", "seconds"], [[line["part"], line["status"], line["seconds"]] for line in lines]
    )


KERNELS = ("ours", "plain", "liger", "cut_cross_entropy")


def kernels(lines: list[Line]) -> str:
    """Render one row per implementation and run of masked_lm.py; `/ ours` is its median time divided by ours."""
    header = ["rows × vocabulary × width", "precision", "implementation", "median ms", "min ms", "/ ours", "peak MiB"]
    rows: list[list[Any]] = []
    for line in lines:
        sizes = f"{line['rows']:,} × {line['vocab']:,} × {line['hidden']:,}"
        for name in KERNELS:
            taken = line[name]
            if taken is None:
                rows.append([sizes, line["precision"], f"{name} ({line['absent'][name]})", *[None] * 4])
                continue
            label = f"ours, {line['implementation']}" if name == "ours" else name
            ratio = f"{taken['median_ms'] / line['ours']['median_ms']:.2f} ×"
            peak = None if taken["peak_bytes"] is None else f"{taken['peak_bytes'] / 2**20:.1f}"
            rows.append([sizes, line["precision"], label, taken["median_ms"], taken["min_ms"], ratio, peak])
    return table(header, rows)


SECTIONS: dict[str, tuple[str, Callable[[list[Line]], str]]] = {
    "pretrain_step": ("A pretraining step (medians)", steps),
    "tests": ("Tests on CUDA", test_runs),
    "real_run": ("A pretraining run", real_runs),
    "same_seed": ("Two runs with one seed", same_seeds),
    "glue_scores": ("Finetuning that run, one seed", scores),
    "conversion": ("Conversion of text", conversions),
    "masked_lm": ("The masked-LM head: loss, sample and gradients", kernels),
    "profile": ("The largest kernels of a step", profiles),
    "failure": ("Parts that failed or ran out of time", failures),
}


if __name__ == "__main__":
    report_user_errors(main)()
