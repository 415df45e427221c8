"""Objectives, generators and kinds of sharing, pretrained for the same time and finetuned; JSON lines and a table.

    python benchmarks/objectives.py --data data/reviews --tasks ../shared/data/glue_data --output runs/objectives

Each configuration of `objectives_plan.py` is pretrained with `objectives.yaml` on the shards of `--data`. A short run
measures its steps per second, so that the complete schedule of the next takes `--budget` seconds. Each is finetuned
on the tasks over seeds; `floor` is the same finetuning of random weights. The folder gets `results.jsonl` (a line for
each configuration and pretraining seed, also printed), `table.md` and `picture.png`, after figure 2 of the ELECTRA
paper (arXiv 2003.10555). A later start with the same settings measures only what is missing; a configuration that fails
does not keep the others from running, and its logs are in its folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe, require_positive
from objectives_plan import (
    CONFIGURATIONS,
    FLOOR_STEPS,
    SMOKE_WARM_STEPS,
    WARM_STEPS,
    Configuration,
    choose,
    finetune_command,
    losses_of,
    pretrain_command,
    scores_of,
    speed_of,
    steps_within,
    train_seconds_of,
)
from objectives_report import draw, report
from user_runs import read_lines, run, terminate

from electra_composer.batches.shards import read_meta
from electra_composer.errors import UserError, report_user_errors

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
EXPECTED = {"data": "shards of data_prep/convert_owt.py", "tasks": "one with a folder for each GLUE task"}
LIMIT = 3600.0  # seconds after which a command is ended
SMOKE = {"budget": 0.5, "seeds": [1, 2], "examples": 64}
UNKNOWN_SECONDS = 75.0  # of a configuration beside its budget, for the first estimate


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print a JSON line for each configuration and seed, then the table."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, terminate)
    options.output.mkdir(parents=True, exist_ok=True)
    record = options.output / "results.jsonl"
    done = {key_of(line): line for line in read_lines(record) if line["settings"] == settings_of(options)}
    plan = [(name, seed) for seed in options.pretraining_seeds for name in choose(options.configurations)]
    missing = [key for key in plan if key not in done]
    say(f"{len(plan)} runs, {len(plan) - len(missing)} of them done; results in {record}")
    started = time.monotonic()
    failed = []
    for number, (name, seed) in enumerate(missing):
        elapsed = (time.monotonic() - started) / 60
        each = elapsed / number if number else (options.budget + UNKNOWN_SECONDS) / 60
        left = f"{elapsed:.1f} min so far, about {each * (len(missing) - number):.0f} min left"
        say(f"\n[{number + 1}/{len(missing)}] {name}, seed {seed}; {left}")
        try:
            line = measure(name, seed, options)
        except UserError as error:
            failed.append(name)
            say(f"{name}, seed {seed} failed: {error}")
            continue
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done[name, seed] = line
        write(options.output, [done[key] for key in plan if key in done])
    lines = [done[key] for key in plan if key in done]
    if lines:
        print("\n".join(json.dumps(line) for line in lines))
        print(f"\n{write(options.output, lines)}", flush=True)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; see above; rerun the same command to measure what is missing")


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options.

    Raises:
        UserError: a configuration is unknown, a folder is missing, or a number is out of range.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/objectives.py", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "reviews", help="shards (%(default)s)")
    parser.add_argument("--tasks", type=Path, default=SHARED / "glue_data", help="folder of GLUE tasks (%(default)s)")
    parser.add_argument("--task-names", nargs="+", default=["cola", "sst2"], metavar="NAME", help="default: cola sst2")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "objectives", help="folder (%(default)s)")
    parser.add_argument(
        "--configurations", nargs="+", default=list(CONFIGURATIONS), metavar="NAME", help="default: all"
    )
    parser.add_argument("--budget", type=float, default=80.0, help="seconds of pretraining steps (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of finetuning (1 2 3)")
    parser.add_argument("--pretraining-seeds", type=int, nargs="+", default=[1], help="(1)")
    parser.add_argument("--examples", type=int, default=4000, help="training examples of a task (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and times, on the CPU")
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(SMOKE)
    choose(options.configurations)
    require_positive(options, "examples")
    if not options.budget > 0:
        raise UserError(f"--budget is {options.budget:g}; expected seconds above 0")
    for name in ("data", "tasks", "output"):
        setattr(options, name, getattr(options, name).resolve())  # commands run in the repository
        if name != "output" and not getattr(options, name).is_dir():
            raise UserError(f"--{name} {getattr(options, name)}: no such folder; expected {EXPECTED[name]}")
    options.length = read_meta(str(options.data)).max_seq_length
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on besides configuration, seed and machine."""
    names = ("budget", "seeds", "examples", "task_names", "smoke")
    return {name: getattr(options, name) for name in names} | {"data": options.data.name, "tasks": options.tasks.name}


def key_of(line: dict[str, Any]) -> tuple[str, int]:
    """Return the configuration and the pretraining seed of a result."""
    return line["configuration"], line["seed"]


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and finetune one configuration."""
    configuration, folder = CONFIGURATIONS[name], options.output / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stages = pretrain(configuration, seed, folder, options) if configuration.pretrained else []
    source = stages[-1]["folder"] if stages else random_weights(configuration, seed, folder, options)
    command = finetune_command(configuration, source, folder / "finetuned", options)
    say(f"finetuning on {' and '.join(options.task_names)}, {len(options.seeds)} seeds")
    seconds = execute(command, folder / "finetuning.log")
    results = json.loads((folder / "finetuned" / "results.json").read_text(encoding="utf-8"))
    last = stages[-1] if stages else dict.fromkeys(("steps_per_second", "tokens_per_second", "flops_per_step"))
    return {
        "benchmark": "objectives",
        "configuration": name,
        "overrides": configuration.stages,
        "seed": seed,
        "settings": settings_of(options),
        "budget_seconds": options.budget,
        "train_seconds": round(sum(stage["train_seconds"] for stage in stages), 2) if stages else None,
        "steps": sum(stage["steps"] for stage in stages) if stages else None,
        "flops": sum(stage["steps"] * stage["flops_per_step"] for stage in stages) if stages else None,
        **{key: last[key] for key in ("steps_per_second", "tokens_per_second", "flops_per_step")},  # of the last stage
        "planned_steps_per_second": [stage["planned_steps_per_second"] for stage in stages],
        "eval": [stage["eval"] for stage in stages],
        "tasks": scores_of(results),
        "finetune_seconds": seconds,
        "machine": describe(),
    }


def pretrain(
    configuration: Configuration, seed: int, folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run all stages of a configuration, each with a complete schedule within its part of the budget.

    Returns:
        For each stage: its folder, steps, time, speed and evaluation.
    """
    stages: list[dict[str, Any]] = []
    budget = options.budget / len(configuration.stages)
    for number, overrides in enumerate(configuration.stages):
        if stages:
            overrides = (*overrides, f"model.init_from={stages[-1]['folder']}")
        warm_folder, run_folder = folder / f"warm-{number}", folder / f"pretrained-{number}"
        warm_steps = SMOKE_WARM_STEPS if options.smoke else WARM_STEPS
        command = pretrain_command(overrides, warm_folder, warm_steps, seed, options)
        execute(command, folder / f"warm-{number}.log")
        planned = speed_of(read_lines(warm_folder / "metrics.jsonl"))["steps_per_second"]
        steps = max(warm_steps, steps_within(budget, planned))
        say(f"{planned:.1f} steps/s: {steps:,} steps in about {steps / planned:.0f} s")
        execute(
            pretrain_command(overrides, run_folder, steps, seed, options),
            folder / f"pretrained-{number}.log",
        )
        rows = read_lines(run_folder / "metrics.jsonl")
        stages.append(
            {
                "folder": run_folder,
                "steps": steps,
                "planned_steps_per_second": round(planned, 3),
                "train_seconds": train_seconds_of(rows),
                "eval": losses_of(rows),
                **speed_of(rows),
            }
        )
    return stages


def random_weights(configuration: Configuration, seed: int, folder: Path, options: argparse.Namespace) -> Path:
    """Write a run whose sizes and tokenizer finetuning takes; its weights are not used."""
    out = folder / "pretrained-0"
    command = pretrain_command(configuration.stages[0], out, FLOOR_STEPS, seed, options)
    execute(command, folder / "pretrained-0.log")
    return out


def execute(command: list[str], log: Path) -> float:
    """Run a command with its output in a file.

    Returns:
        Seconds taken.

    Raises:
        UserError: it failed; the message has the last lines of its output.
        SystemExit: it was ended by SIGTERM.
    """
    with log.open("w", encoding="utf-8") as file:
        status, seconds = run(command, LIMIT, file)
    if status == -signal.SIGTERM:  # sent to this program, which has passed it on
        raise SystemExit(128 + signal.SIGTERM)
    if status != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
        raise UserError(f"exit status {status}, see {log}:\n{tail}")
    return seconds


def write(folder: Path, lines: list[dict[str, Any]]) -> str:
    """Write table and picture of the results so far; return the table."""
    text = report(lines)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (folder / "picture.png").write_bytes(draw(lines))
    return text


if __name__ == "__main__":
    report_user_errors(main)()
