"""Kill and resume a run at random moments and compare it with an undisturbed run; prints one JSON line.

    python benchmarks/soak.py --minutes 30 --kills 30

Both runs are started by the same command, over the same shards and at the same time. One is killed by SIGKILL, SIGTERM
and SIGINT in turn and restarted each time. The moments follow from the seed and may fall into start-up or saving. The
number of batches is chosen so that the run lasts about `--minutes`. At the end, rows, losses, metrics and weights of
both must be bitwise identical. Resident memory and open files of all processes are sampled every second. The exit
status is 1 if anything differs or grows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from killed_run import Run
from machine import describe
from recorded_run import read_record

from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError, report_user_errors

LENGTH = 64
CALIBRATION = 200  # batches
STARTED = 60  # seconds after which a run has allocated what it needs
GROWTH = 1.1  # of memory, from a tenth of a run to its end; more is a leak
MORE_FILES = 10  # growth in open files of all processes together; more is a leak
ENDING = 30  # seconds before the end of a run, in which it stops its workers

YAML = """
run_name: soak
seed: 7
data: {{path: {shards}, max_seq_length: {length}, num_workers: {workers}}}
model:
  {{num_layers: 2, hidden_size: 64, num_heads: 2, embedding_size: 32, generator_size: 0.5, max_positions: {length}}}
optimizer: {{lr: 1.0e-3}}
schedule: {{warmup: 0.1dur}}
trainer:
  {{max_duration: 1ba, global_train_batch_size: 16, device_eval_batch_size: 16, eval_interval: 100ba, eval_batches: 2,
   device: cpu, precision: fp32, log_interval: 7ba, progress_bar: false}}
checkpoints: {{folder: RUN, interval: {interval}ba, keep: 2, milestones: [0.25, 0.5, 1.0]}}
callbacks: {{speed_monitor: {{}}, memory_monitor: {{}}}}
loggers: {{metrics_file: {{}}}}
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the soak and print one JSON line; return 1 if anything differs or grows."""
    parser = argparse.ArgumentParser(prog="benchmarks/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="approximate duration (%(default)s)")
    parser.add_argument("--kills", type=int, default=30, help="number of kills (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="number of ranks (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader workers per rank (%(default)s)")
    parser.add_argument("--interval", type=int, default=50, help="batches between checkpoints (%(default)s)")
    parser.add_argument("--batches", type=int, help="batches of the run, instead of --minutes")
    parser.add_argument("--documents", type=int, default=2000, help="documents of the synthetic corpus (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (%(default)s)")
    parser.add_argument("--folder", help="for all files; default: a temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")
    options = parser.parse_args(arguments)
    if options.kills < 1 or options.minutes <= 0 or options.processes < 1:
        raise UserError("--kills, --minutes and --processes: expected values above 0")
    with tempfile.TemporaryDirectory() as temporary:
        result = soak(options, Path(options.folder or temporary))
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Do both runs and compare them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(folder / "corpus", options.documents)
    text = YAML.format(shards=shards, length=LENGTH, workers=options.workers, interval=options.interval)
    (folder / "soak.yaml").write_text(text)
    batches, seconds = options.batches, options.minutes * 60
    if batches is None:
        batches = batches_for(options, folder, seconds)
    undisturbed, killed = (Run(options, folder, name, batches) for name in ("whole", "killed"))
    thread = threading.Thread(target=undisturbed.until_done)
    thread.start()
    start = time.monotonic()
    try:
        killed.through_kills(options.kills, seconds, batches, random.Random(options.seed))
        lasted = time.monotonic() - start
        thread.join()
    finally:
        undisturbed.end()
        killed.end()
    result = compare(undisturbed, killed)
    kills = sum(killed.kills.values())
    failures = {
        f"{kills} kills instead of {options.kills}": kills < options.kills,
        "the undisturbed run grows": grows(undisturbed.watched),
        "the last start grows": grows(killed.watched),
        "the last start is larger than the first": grows_over_lives(killed),
        **{name: result[name] != 0 for name in MUST_BE_ZERO},
    }
    failed = [name for name, is_so in failures.items() if is_so]
    return {
        "benchmark": "soak",
        "passed": not failed,
        "failed": failed,
        "machine": describe(),
        "options": {**vars(options), "folder": None},
        "minutes": round(lasted / 60, 1),
        "batches": batches,
        "kills": kills,
        "kills_by_signal": dict(killed.kills),
        "resumes": killed.resumes,
        "batches_done_again": killed.lines() - batches * options.processes,
        **result,
        "undisturbed": first_and_last(undisturbed.watched),
        "killed": {
            "first_life": first_and_last(killed.lives[0]) if killed.lives else None,
            "last_life": first_and_last(killed.watched),
        },
    }


MUST_BE_ZERO = (
    "samples_seen_twice",
    "samples_missed",
    "batches_with_other_samples",
    "largest_loss_difference",
    "largest_weight_difference",
    "metric_rows_that_differ",
)


def make_shards(folder: Path, documents: int) -> Path:
    """Convert random text in which no two rows are the same."""
    if not (folder / "shards" / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        words = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
        lines = (" ".join(rng.choice(words) for _ in range(rng.randint(20, 120))) for _ in range(documents))
        (folder / "text.txt").write_text("\n\n".join(lines))
        convert(
            Conversion(
                sources=Sources.of(str(folder / "text.txt")),
                out=str(folder / "shards"),
                tokenizer="train",
                vocab_size=120,
                max_seq_length=LENGTH,
                val_fraction=0.05,
                progress=False,
            )
        )
    return folder / "shards"


def batches_for(options: argparse.Namespace, folder: Path, seconds: float) -> int:
    """Measure how many batches fit into `seconds` with two runs at once and a start for each kill."""
    times = []
    for batches in (1, 1 + CALIBRATION):
        runs = [Run(options, folder, f"calibration-{batches}-{n}", batches) for n in (1, 2)]
        start = time.monotonic()
        for run in runs:
            run.start()
        for run in runs:
            run.wait()
        times.append(time.monotonic() - start)
    start_up, rate = times[0], CALIBRATION / max(times[1] - times[0], 1.0)
    lost = options.interval / 2 / rate / 3  # a third of the signals (SIGKILL) loses half an interval on average
    return max(options.kills, math.ceil(rate * max(seconds - options.kills * (start_up + lost), seconds / 4)))


def compare(undisturbed: Run, killed: Run) -> dict[str, Any]:
    """Compare rows, losses, weights and metrics of a killed run with those of an undisturbed one."""
    expected, seen = read_record(undisturbed.folder / "record"), read_record(killed.folder / "record")
    twice = missed = other = 0
    for epoch in {line["epoch"] for line in expected.values()}:
        rows = Counter(row for line in expected.values() if line["epoch"] == epoch for row in line["rows"])
        ours = Counter(row for line in seen.values() if line["epoch"] == epoch for row in line["rows"])
        twice += sum((ours - rows).values())
        missed += sum((rows - ours).values())
    loss = 0.0 if expected.keys() == seen.keys() else math.inf
    for batch in expected.keys() & seen.keys():
        other += expected[batch]["rows"] != seen[batch]["rows"]
        for name, value in expected[batch].items():
            if name.startswith("loss/"):
                loss = max(loss, abs(value - seen[batch][name]))
    left, right = undisturbed.weights(), killed.weights()
    weight = max(float((left[name] - right[name]).abs().max()) for name in left)
    rows, ours = undisturbed.metrics(), killed.metrics()
    return {
        "samples": sum(len(line["rows"]) for line in seen.values()),
        "epochs": len({line["epoch"] for line in seen.values()}),
        "samples_seen_twice": twice,
        "samples_missed": missed,
        "batches_with_other_samples": other,
        "largest_loss_difference": loss,
        "largest_weight_difference": weight,
        "metric_rows": len(ours),
        "metric_rows_that_differ": sum(a != b for a, b in zip(rows, ours, strict=False)) + abs(len(rows) - len(ours)),
    }


def first_and_last(watched: list[tuple[float, int, int]]) -> dict[str, Any] | None:
    """Return memory and open files after start-up (a tenth of the run) and at the end, as medians of five samples."""
    if len(watched) < 3 * STARTED:
        return None
    begins = (max(STARTED, len(watched) // 10), len(watched) - ENDING)
    first, last = (_median(watched[begin : begin + 5]) for begin in begins)
    return {
        "seconds": round(watched[-1][0]),
        "resident_mib": [round(first[0] / 2**20, 1), round(last[0] / 2**20, 1)],
        "open_files": [first[1], last[1]],
    }


def _median(counts: list[tuple[float, int, int]]) -> tuple[int, int]:
    middle = len(counts) // 2
    return sorted(count[1] for count in counts)[middle], sorted(count[2] for count in counts)[middle]


def grows(watched: list[tuple[float, int, int]]) -> bool:
    """Whether open files or memory grew beyond the limits between a tenth of the run and its end."""
    counts = first_and_last(watched)
    if counts is None:
        return False
    (memory, more), (files, more_files) = counts["resident_mib"], counts["open_files"]
    return more > GROWTH * memory or more_files > files + MORE_FILES


def grows_over_lives(run: Run) -> bool:
    """Whether the last start used more open files or memory than the first at the same age, beyond the limits."""
    if not run.lives or min(len(run.lives[0]), len(run.watched)) < STARTED:
        return False
    length = min(len(run.lives[0]), len(run.watched))
    first, last = (_median(watched[length - 6 : length - 1]) for watched in (run.lives[0], run.watched))
    return last[0] > GROWTH * first[0] or last[1] > first[1] + MORE_FILES


if __name__ == "__main__":
    sys.exit(report_user_errors(main)())
