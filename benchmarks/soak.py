"""Trains, kills the run at random moments, resumes it, and compares with a run that nothing happened to; one JSON line.

    python benchmarks/soak.py --minutes 30 --kills 30

Both runs are started by the same command, over the same shards and at the same time. One is killed by SIGKILL, SIGTERM
and SIGINT in turn at moments that a seed decides, start-up and saving included, and started again each time; the number
of batches is chosen so that it lasts about the minutes asked for. At the end rows, losses, metrics and weights of both
must be the same to the bit. Every second, the resident memory and the open files of all processes are counted. The
exit status is 1 if anything differs or grows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import describe
from recorded_run import read_record

from electra_composer.checkpoint import read_checkpoint
from electra_composer.conversion import Conversion, convert
from electra_composer.errors import UserError, report_user_errors
from electra_composer.sources import Sources

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LENGTH = 64
CALIBRATION = 200  # batches
QUIET = 0.25  # share of the time, at the end, in which nothing is killed any more
STARTED = 60  # seconds after which a run has all it needs
GROWTH = 1.1  # of memory, from a tenth of a run to its end, that is no leak yet
MORE_FILES = 10  # of all processes together, likewise: they come and go
ENDING = 30  # seconds before its end, in which a run stops its workers
TIMES = ("time/", "throughput/", "memory/")  # metrics that no two runs share

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
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/soak.py", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="about how long the killed run lasts")
    parser.add_argument("--kills", type=int, default=30, help="at least")
    parser.add_argument("--processes", type=int, default=1, help="more than one: under Composer's launcher")
    parser.add_argument("--workers", type=int, default=2, help="loader workers per process")
    parser.add_argument("--interval", type=int, default=50, help="batches between checkpoints")
    parser.add_argument("--batches", type=int, help="of the run, instead of as many as the minutes have room for")
    parser.add_argument("--documents", type=int, default=2000, help="of the invented corpus")
    parser.add_argument("--seed", type=int, default=0, help="of signals and moments")
    parser.add_argument("--folder", help="where everything goes; default: a temporary one, which is removed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    options = parser.parse_args(arguments)
    if options.kills < 1 or options.minutes <= 0 or options.processes < 1:
        raise UserError("--kills, --minutes and --processes: expected more than nothing")
    with tempfile.TemporaryDirectory() as temporary:
        result = soak(options, Path(options.folder or temporary))
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, and how they compare."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = make_shards(folder / "corpus", options.documents)
    text = YAML.format(shards=shards, length=LENGTH, workers=options.workers, interval=options.interval)
    (folder / "soak.yaml").write_text(text)
    batches, seconds = options.batches, options.minutes * 60
    if batches is None:
        batches = batches_for(options, folder, seconds)
    whole, killed = Run(options, folder, "whole", batches), Run(options, folder, "killed", batches)
    undisturbed = threading.Thread(target=whole.until_done)
    undisturbed.start()
    start = time.monotonic()
    try:
        killed.through_kills(options.kills, seconds, batches, random.Random(options.seed))
        lasted = time.monotonic() - start
        undisturbed.join()
    finally:
        whole.end()
        killed.end()
    result = compare(whole, killed)
    kills = sum(killed.kills.values())
    failures = {
        f"{kills} kills instead of {options.kills}": kills < options.kills,
        "the undisturbed run grows": grows(whole.watched),
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
        "undisturbed": first_and_last(whole.watched),
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
    """Text of an invented language, in which no two rows are the same."""
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
    """How many batches fit: two runs at once, and a start for each kill."""
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
    lost = options.interval / 2 / rate / 3  # a third of the signals loses half an interval
    return max(options.kills, math.ceil(rate * max(seconds - options.kills * (start_up + lost), seconds / 4)))


class Run:
    """A pretraining run in a folder of its own, started as often as it takes.

    Attributes:
        kills: signal → how often it was sent to a run that had not ended.
        resumes: starts from a checkpoint.
        watched: of the present or last start: (seconds since it, bytes resident, open files), once a second.
        lives: `watched` of every start before.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, name: str, batches: int) -> None:
        self.folder = folder / name
        (self.folder / "record").mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("recorded_run.py")
        launcher = [str(Path(sys.executable).with_name("composer")), "-n", str(options.processes)]
        self.command = [
            *(launcher if options.processes > 1 else [sys.executable]),
            str(script),
            str(folder / "soak.yaml"),
            f"checkpoints.folder={self.folder / 'run'}",
            f"callbacks.record.folder={self.folder / 'record'}",
            f"trainer.max_duration={batches}ba",
            *options.overrides,
        ]
        self.kills: Counter[str] = Counter()
        self.resumes = 0
        self.watched: list[tuple[float, int, int]] = []
        self.lives: list[list[tuple[float, int, int]]] = []
        self.next_watch = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        root = str(Path(__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.resumes += (self.folder / "run" / "latest-rank0.pt").exists()
        with open(self.folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal can go to all of its processes, as from a terminal
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        if self.watched:
            self.lives.append(self.watched)
        self.watched = []

    def wait(self, seconds: float = math.inf) -> int | None:
        """Its exit status, or None if it is still running after that time; memory and files are counted meanwhile."""
        assert self.process is not None
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            try:
                return self.process.wait(min(1.0, max(0.01, seconds - (time.monotonic() - start))))
            except subprocess.TimeoutExpired:
                self._watch()
        return self.process.poll()

    def _watch(self) -> None:
        assert self.process is not None
        if time.monotonic() < self.next_watch:
            return
        self.next_watch = time.monotonic() + 1.0
        resident = files = 0
        try:
            main = psutil.Process(self.process.pid)
            age = time.time() - main.create_time()
            for process in [main, *main.children(recursive=True)]:
                resident += process.memory_info().rss
                files += process.num_fds()
        except (psutil.Error, OSError):
            return  # just ending
        self.watched.append((age, resident, files))

    def until_done(self) -> None:
        """Start it and wait for its end.

        Raises:
            UserError: it fails.
        """
        self.start()
        self._check(self.wait())

    def through_kills(self, kills: int, seconds: float, batches: int, rng: random.Random) -> None:
        """Start it until it is done, and kill it `kills` times on the way.

        At any moment of the time, or when it comes to a batch, whichever is first: it must not be done before.
        """
        share = (1 - QUIET) / kills
        stops = sorted(rng.uniform(0.0, 1 - QUIET) for _ in range(kills))
        while True:
            self.start()
            # Every signal as often as any other; the last start is left alone.
            done = sum(self.kills.values())
            number = SIGNALS[done % len(SIGNALS)]
            moment = rng.uniform(0.02, 2.0) * share * seconds
            status = self._wait_for(moment, math.ceil(stops[done] * batches)) if done < kills else self.wait()
            if status is not None:
                self._check(status)
                return
            self._kill(number, rng)

    def _wait_for(self, seconds: float, batch: int) -> int | None:
        """Until so much time has passed, or a batch has been done since, or the run has ended: its status then."""
        end = time.monotonic() + seconds
        record = self.folder / "record" / "rank0.jsonl"
        position = record.stat().st_size if record.exists() else 0
        while time.monotonic() < end:
            if (status := self.wait(0.05)) is not None:
                return status
            if record.exists() and last_batch(record, position) >= batch:
                return None
        return None

    def _kill(self, number: signal.Signals, rng: random.Random) -> None:
        assert self.process is not None
        self.kills[number.name] += 1
        # A scheduler may tell the first process alone, a terminal tells all of them; of SIGKILL none may be left.
        if number == signal.SIGTERM and rng.random() < 0.5:
            self.process.send_signal(number)
        else:
            os.killpg(self.process.pid, number)
        expected = {-number, 128 + number}
        status = self.wait(120.0)
        if status is None:
            raise UserError(f"{self.folder}: still running two minutes after {number.name}")
        if number == signal.SIGINT and self._ended_by_interrupt():
            return  # before any code of ours was there: Python's own way to end, whatever it imported
        if status != 0 and status not in expected:  # 0: it was done
            raise UserError(f"{self.folder}: ended with {status} after {number.name}; its output is in output.txt")
        self._await_orphans()

    def _ended_by_interrupt(self) -> bool:
        return (self.folder / "output.txt").read_bytes().rstrip().endswith(b"KeyboardInterrupt")

    def _await_orphans(self) -> None:
        """Ranks whose launcher a signal has ended save and end by themselves."""
        assert self.process is not None
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline:
            if not any(_group_of(process) == self.process.pid for process in psutil.process_iter()):
                return
            time.sleep(0.1)
        raise UserError(f"{self.folder}: processes of the run are left two minutes after its end")

    def _check(self, status: int | None) -> None:
        if status != 0:
            raise UserError(f"{self.folder}: the run ended with {status}; its output is in output.txt")

    def end(self) -> None:
        """Leave nothing running."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def lines(self) -> int:
        """How many batches were done by all ranks, those that a resumed run did again included."""
        paths = (self.folder / "record").glob("rank*.jsonl")
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of the metrics file, without what the clock has a part in."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return read_checkpoint(str(self.folder / "run")).state


def last_batch(record: Path, position: int) -> int:
    """The last batch in a record after a position in bytes; -1: there is none yet."""
    with open(record, "rb") as file:
        file.seek(max(position, record.stat().st_size - 2**16))  # a line has far less
        text = file.read().decode(errors="replace")
    return int(numbers[-1]) if (numbers := re.findall(r'"batch": (\d+),', text)) else -1


def _group_of(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, OSError):
        return None


def compare(whole: Run, killed: Run) -> dict[str, Any]:
    """How a run that was killed differs from one that was not."""
    expected, seen = read_record(whole.folder / "record"), read_record(killed.folder / "record")
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
    left, right = whole.weights(), killed.weights()
    weight = max(float((left[name] - right[name]).abs().max()) for name in left)
    rows, ours = whole.metrics(), killed.metrics()
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
    """Memory and files after a tenth of the time, but not during the start, and at the end: medians of a few counts."""
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
    """Whether a process ends with more open files, or clearly more memory, than it had after a tenth of its time."""
    counts = first_and_last(watched)
    if counts is None:
        return False
    (memory, more), (files, more_files) = counts["resident_mib"], counts["open_files"]
    return more > GROWTH * memory or more_files > files + MORE_FILES


def grows_over_lives(run: Run) -> bool:
    """Whether the last start had more open files, or clearly more memory, than the first at the same age."""
    if not run.lives or min(len(run.lives[0]), len(run.watched)) < STARTED:
        return False
    length = min(len(run.lives[0]), len(run.watched))
    first, last = (_median(watched[length - 6 : length - 1]) for watched in (run.lives[0], run.watched))
    return last[0] > GROWTH * first[0] or last[1] > first[1] + MORE_FILES


if __name__ == "__main__":
    sys.exit(report_user_errors(main)())
