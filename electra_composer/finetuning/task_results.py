"""Results of a task of one's own over seeds: `results.json`, `.md`, `.csv` and `.png`."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from electra_composer.atomic_files import locked, write_file
from electra_composer.errors import UserError
from electra_composer.finetuning.results import all_versions, check_results_path, over_seeds
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.task_plot import plot_task
from electra_composer.tasks.analysis import Analysis

# Quantile 0.975 of Student's t distribution with 1, 2, … degrees of freedom; 1.96 beyond.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


LISTED = 20  # examples with the largest loss in the Markdown report


def confidence(std: float | None, count: int) -> float | None:
    """Return half the width of the 95% confidence interval of a mean over runs; None for fewer than two."""
    if std is None or count < 2:
        return None
    return (STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96) * std / math.sqrt(count)


def task_summary(
    kind: str,
    metric: str,
    runs: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
    group: str,
    failures: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Compute the content of the results file.

    Args:
        kind: of the task; its name in the record.
        metric: name of the score.
        runs: of one group.
        settings: of the group.

    Returns:
        `tasks`: the kind → as in :func:`electra_composer.finetuning.results.summary`, with `confidence`, half the
        width of the 95% interval of the mean; `models`: `seed`, `score` and `folder` (relative to that of the results)
        of each saved model, the best first; `notes`: what was guessed, chosen and left out; also `group`, `settings`,
        `source`, `versions`, `failures`.
    """
    tasks = {}
    if runs:
        found = over_seeds(kind, metric, runs)
        tasks[kind] = {**found, "confidence": confidence(found["std"], found["n"])}
    return {
        "group": group,
        "source": runs[0]["source"] if runs else None,
        "tasks": tasks,
        "failures": list(failures),
        "versions": all_versions(runs),
        "settings": dict(settings),
    }


def write_task_reports(
    store: RunStore, group: str, path: str, kind: str, metric: str, settings: Mapping[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """Write `results.json`, `.md`, `.csv` and `.png` from the record; each file is replaced atomically.

    Args:
        path: of `results.json`.
        more: further content: `models`, `notes`, and `analysis` of the best run or None.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: the path is another kind of file, or the disk is full; the record and the former files stay intact.
    """
    folder, stem = os.path.dirname(path) or ".", os.path.splitext(path)[0]
    check_results_path(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            runs = store.runs(group)
            results = {**task_summary(kind, metric, runs, settings, group, store.failures(group)), **more}
            if results["tasks"]:
                analysis = None if results["analysis"] is None else Analysis(**results["analysis"])
                title = f"{results['source']}: {len(runs)} runs"
                write_file(f"{stem}.png", plot_task(results["tasks"][kind], title, analysis))
            write_file(f"{stem}.csv", task_csv(results))
            write_file(f"{stem}.md", task_markdown(results))
            write_file(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"results {path}: cannot be written: {error.strerror}; all finished runs are kept in {store.path}: free "
            "some space and rerun the command"
        ) from error
    return results


def task_markdown(results: Mapping[str, Any], errors: bool = True) -> str:
    """Render the table over seeds, one row per score; with `errors` also those of the best run."""
    parts = ["# No finished run yet"]
    for kind, row in results["tasks"].items():
        names = list(row["metrics"])
        seeds = [str(run["seed"]) for run in row["runs"]]
        lines = [
            f"# {kind.capitalize()}: {results['source']}",
            f"{row['metric']} {describe(row)}; best {number(row['best'])}.",
            "| score | mean | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
            "| --- | --- | " + " | ".join("---" for _ in seeds) + " |",
        ]
        lines += [
            f"| {name} | {number(row['metrics'][name])} | "
            + " | ".join(number(run["metrics"].get(name)) for run in row["runs"])
            + " |"
            for name in names
        ]
        parts = [*lines[:2], "\n".join(lines[2:])]
        if row["collapsed"]:
            parts.append(f"{row['collapsed']} of {row['n']} runs collapsed: all their predictions are equal.")
    if errors:
        parts += _errors(results.get("analysis"))
    notes = [f"- {note}" for note in results.get("notes", ())]
    notes += [f"- failed: seed {each['seed']}, {each['at']}: {each['error']}" for each in results["failures"]]
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip() + "\n"


def _errors(analysis: Mapping[str, Any] | None) -> list[str]:
    """Render the scores of each label and the worst examples of the best run."""
    parts = []
    if analysis is not None and analysis["per_label"]:
        parts += ["## Labels (best run)", table(analysis["per_label"])]
    if analysis is not None and analysis["worst"]:
        rows = [{name: _cell(value) for name, value in each.items()} for each in analysis["worst"][:LISTED]]
        parts += ["## Examples with the largest loss (best run)", table(rows)]
    return parts


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Render rows with equal keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> Any:
    """Shorten text, and escape what Markdown reads as the end of a cell."""
    if not isinstance(value, str):
        return value
    text = " ".join(value.replace("|", "\\|").split())
    return text if len(text) <= 200 else f"{text[:198]}…"


def task_csv(results: Mapping[str, Any]) -> str:
    """Render CSV: a line per run."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in results["tasks"].values():
        names = list(row["metrics"])
        writer.writerow(["seed", "epoch", *names, "collapsed", "seconds"])
        for run in row["runs"]:
            values = [run["metrics"].get(name) for name in names]
            writer.writerow([run["seed"], run["epoch"], *values, run["collapsed"], f"{run['seconds']:.1f}"])
    return file.getvalue()


def describe(row: Mapping[str, Any]) -> str:
    """Describe a score over seeds: `91.2 ± 0.3 over 5 seeds (95% confidence of the mean: ± 0.4)`."""
    if row["n"] == 1:
        return f"{number(row['mean'])}, one seed"
    sure = f" (95% confidence of the mean: ± {number(row['confidence'])})" if row["confidence"] is not None else ""
    return f"{number(row['mean'])} ± {number(row['std'])} over {row['n']} seeds{sure}"


def number(value: float | None) -> str:
    """Format a score."""
    return "undefined" if value is None else f"{value:.2f}"
