"""The commands that a user types, run on real text for a limited time; prints one JSON line. Parts of gpu.sh.

    python benchmarks/user_runs.py convert    FOLDER [--data DATA]   text to shards
    python benchmarks/user_runs.py same-seed  FOLDER                 pretrain twice with one seed; compare the losses
    python benchmarks/user_runs.py pretrain   FOLDER                 pretrain for about --seconds
    python benchmarks/user_runs.py glue       FOLDER [--data DATA]   finetune that run on CoLA and SST-2

The later parts read what `convert` and `pretrain` have written to FOLDER. DATA has `corpus/*.jsonl.gz`,
`glue_data/<task>/*.tsv` and `bert-base-uncased-vocab.txt`; without it, the text is the docstrings of the installed
packages, and the task a synthetic one made of them. A command that takes longer than --limit is ended by SIGTERM, and
what it has measured until then is reported with `"complete": false`. `key=value` are overrides for the command's YAML.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from machine import print_result
from sizes import TINY

from electra_composer.errors import UserError, report_user_errors

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = 8000  # training examples of a task at most: the time of CoLA's 8,551
SAME_SEED_BATCHES = 400
UNKNOWN_STEP_MS = 25.0
SAFETY = 0.85  # fraction of --seconds to plan for, since evaluation and checkpoint come after the steps
CPU = ["trainer.device=cpu", "trainer.precision=fp32"]
SMOKE = {
    "convert": ["--max-documents", "150", "--vocab-size", "600", "--max-seq-length", "32", "--val-fraction", "0.2"],
    "pretrain": [*TINY, *CPU, "trainer.global_train_batch_size=8", "trainer.device_eval_batch_size=8"],
    "synthetic": ["--train", "64", "--dev", "32", "--max-documents", "1000"],
    "glue": [*CPU, "data.max_seq_length=32", "trainer.max_duration=1ep"],
}
LAST = {
    "mlm_loss": "metrics/train/mlm_loss",
    "rtd_loss": "metrics/train/rtd_loss",
    "rtd_recall": "metrics/train/rtd_recall",
    "eval_mlm_loss": "metrics/eval/mlm_loss",
    "eval_rtd_loss": "metrics/eval/rtd_loss",
    "loss_spikes": "trouble/loss_spikes",
    "peak_allocated_gb": "memory/peak_allocated_mem",
}
MEDIAN = {
    "tokens_per_second": "throughput/tokens_per_sec",
    "batches_per_second": "throughput/batches_per_sec",
    "mfu": "throughput/device/mfu",
    "data_wait": "data/wait_share",
}


class Terminated(SystemExit):
    """A SIGTERM to this program, which then ends its command and reports what there is."""


def main(arguments: list[str] | None = None) -> None:
    """Run one part and print one JSON line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, terminate)
    options.folder.mkdir(parents=True, exist_ok=True)
    part = {"convert": convert, "same-seed": same_seed, "pretrain": pretrain, "glue": glue}[options.part]
    name, result = part(options)
    print_result(name, **result)
    sys.exit(0 if result["complete"] else 1)


def terminate(*_: object) -> None:
    raise Terminated(128 + signal.SIGTERM)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options.

    Raises:
        UserError: the folder of data is not there.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/user_runs.py", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("convert", "same-seed", "pretrain", "glue"))
    parser.add_argument("folder", type=Path, help="for all files of the runs")
    parser.add_argument(
        "--data", type=Path, help="folder of real text; default: synthetic data, see the top of this file"
    )
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds after which a command is ended (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="of the steps of pretrain (%(default)s)")
    parser.add_argument("--batches", type=int, default=SAME_SEED_BATCHES, help="of the runs of same-seed (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.data is not None and not options.data.is_dir():
        raise UserError(f"--data {options.data}: no such folder; give one with corpus/ and glue_data/, or no --data")
    return options


def convert(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Convert the text to `shards`."""
    command = [sys.executable, "data_prep/convert_owt.py", "--lines", "sentence", "--overflow", "carry", "--overwrite"]
    if options.data is None:
        command += ["--source", "docstrings", "--tokenizer", "train"]
    else:
        vocabulary = str(options.data / "bert-base-uncased-vocab.txt")
        command += ["--source", str(options.data / "corpus" / "*.jsonl.gz"), "--tokenizer", vocabulary]
    command += SMOKE["convert"] if options.smoke else []
    summary = options.folder / "convert.json"
    command += ["--out", str(options.folder / "shards"), "--json", str(summary), "--no-progress"]
    status, seconds = run(command, options.limit)
    result = {"data": data_name(options), "complete": status == 0, "wall_seconds": seconds}
    if status == 0:
        result["summary"] = json.loads(summary.read_text())
    return "conversion", result


def same_seed(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Pretrain twice, each in a process of its own, with the same command; compare all losses bit by bit."""
    traces, walls, ended = [], [], []
    deadline = time.monotonic() + options.limit
    for number in (1, 2):
        trace, checkpoints = options.folder / f"trace-{number}", options.folder / f"same-seed-{number}"
        for folder in (trace, checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        trace.mkdir()
        command = [sys.executable, "benchmarks/recorded_run.py", *pretrain_arguments(options, options.batches)]
        command += [f"callbacks.losses.folder={trace}", f"checkpoints.folder={checkpoints}"]
        command += ["checkpoints.milestones=[]", "trainer.eval_batches=2", "trainer.progress_bar=false"]
        left = deadline - time.monotonic()
        status, seconds = run(command, left / 2 if number == 1 else left)
        ended.append(status)
        walls.append(seconds)
        traces.append(read_lines(trace / "losses.jsonl"))
    compared = compare(*traces)
    return "same_seed", {
        **compared,
        "complete": ended == [0, 0] and compared["first_difference"] is None,
        "statuses": ended,
        "wall_seconds": walls,
        "overrides": options.overrides,
    }


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two traces of :class:`recorded_run.LossTrace`, as far as both reach.

    Returns:
        `batches`: number of batches compared; `first_difference`: None, or the first batch that differs, with its lines
        in both; `differing`: number of batches that differ.

    Raises:
        UserError: a trace is empty.
    """
    pairs = list(zip(first, second, strict=False))
    if not pairs:
        raise UserError("a run of same-seed has recorded no batch; see its output above")
    differing = [(one, two) for one, two in pairs if one != two]
    return {
        "batches": len(pairs),
        "first_difference": dict(zip(("first_run", "second_run"), differing[0], strict=True)) if differing else None,
        "differing": len(differing),
    }


def pretrain(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Pretrain for about `--seconds`, by the step time of the runs of `same-seed`, as a user would."""
    folder = options.folder / "pretrain"
    shutil.rmtree(folder, ignore_errors=True)
    step_ms = step_ms_of(options.folder / "same-seed-2" / "metrics.jsonl")
    batches = max(20, int(SAFETY * 1000 * options.seconds / (step_ms or UNKNOWN_STEP_MS)))
    launcher = [] if options.smoke else ["-m", "composer.cli.launcher", "-n", "1"]  # imports Composer a second time
    command = [sys.executable, *launcher, "electra_composer/pretrain.py"]
    command += [*pretrain_arguments(options, batches), f"checkpoints.folder={folder}", "checkpoints.milestones=[1.0]"]
    status, seconds = run(command, options.limit)
    rows = read_lines(folder / "metrics.jsonl")
    return "real_run", {
        "data": data_name(options),
        "complete": status == 0,
        "status": status,
        "batches": max((row["step"] for row in rows), default=0),
        "of_batches": batches,
        "wall_seconds": seconds,
        **{name: value_of(rows, key, lambda values: values[-1]) for name, key in LAST.items()},
        "first_mlm_loss": value_of(rows, LAST["mlm_loss"], lambda values: values[0]),
        **{name: value_of(rows, key, statistics.median) for name, key in MEDIAN.items()},
        "overrides": options.overrides,
    }


def glue(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Finetune the pretrained run on CoLA and SST-2, one seed, or on a synthetic task without data."""
    tasks, data = "[cola,sst2]", options.data and options.data / "glue_data"
    results = options.folder / "glue" / "results.json"
    shutil.rmtree(results.parent, ignore_errors=True)
    if data is None:
        tasks, data = "[synthetic-words]", options.folder / "synthetic_glue"
        command = [sys.executable, "-m", "electra_composer.finetuning.synthetic", "--source", "docstrings"]
        command += ["--out", str(data), *(SMOKE["synthetic"] if options.smoke else ())]
        if not data.exists() and run(command, options.limit)[0] != 0:
            raise UserError("the synthetic task could not be made; see the output above")
    command = [sys.executable, "electra_composer/glue.py", "yamls/glue.yaml", f"tasks={tasks}", "seeds=[1]"]
    command += [f"model.source={options.folder / 'pretrain'}", f"data.path={data}", "data.cache=null"]
    command += [f"checkpoints.folder={results.parent}", f"max_train_examples={EXAMPLES}"]
    command += [*(SMOKE["glue"] if options.smoke else ()), *options.overrides]
    status, seconds = run(command, options.limit)
    found = json.loads(results.read_text())["tasks"] if results.exists() else {}
    return "glue_scores", {
        "data": data_name(options),
        "complete": status == 0,
        "status": status,
        "max_train_examples": EXAMPLES,
        "tasks": {name: task["metrics"] for name, task in found.items()},
        "wall_seconds": seconds,
    }


def pretrain_arguments(options: argparse.Namespace, batches: int) -> list[str]:
    """Return YAML and overrides of a run of `batches` batches on the converted shards."""
    arguments = ["yamls/small.yaml", f"data.path={options.folder / 'shards'}", f"trainer.max_duration={batches}ba"]
    arguments += ["schedule.warmup=0.05dur", "checkpoints.interval=null"]
    return arguments + (SMOKE["pretrain"] if options.smoke else []) + options.overrides


def run(command: list[str], seconds: float, output: TextIO | None = None) -> tuple[int, float]:
    """Run a command in the repository; end it and its children by SIGTERM after `seconds`.

    Args:
        command: words of the command line.
        seconds: limit of its time.
        output: a file for what it prints; None: stderr.

    Returns:
        Exit status, negative for the number of a signal, and seconds taken.
    """
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=output or sys.stderr,
        stderr=subprocess.STDOUT if output else None,
        env=environment,
        start_new_session=True,
    )
    patience = 10.0  # to write a checkpoint
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    except Terminated:
        patience = 2.0  # `timeout -k 5` leaves that and the time to report
    finally:
        for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, None)):
            if process.poll() is not None:
                break
            print(f"ended by {number.name} after {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
    return process.returncode, round(time.monotonic() - begin, 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; empty if it is not there. A last line that a kill has cut is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def value_of(rows: list[dict[str, Any]], key: str, select: Any) -> float | None:
    """Select one of the values of a metric; None if it was never logged."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return select(values) if values else None


def step_ms_of(path: Path) -> float | None:
    """Return the milliseconds of a step in a run's metrics file, by its last window; None if there is none."""
    rate = value_of(read_lines(path), MEDIAN["batches_per_second"], lambda values: values[-1])
    return 1000 / rate if rate else None


def data_name(options: argparse.Namespace) -> str:
    return "synthetic" if options.data is None else options.data.name


if __name__ == "__main__":
    report_user_errors(main)()
