"""Kill and restart a pretraining run, and sample its memory and open files; used by soak.py."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.errors import UserError

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
QUIET = 0.25  # fraction of the time, at the end, without kills
TIMES = ("time/", "throughput/", "memory/")  # metrics that differ between identical runs


class Run:
    """A pretraining run in its own folder, restarted after each kill.

    Attributes:
        kills: signal → number of times it was sent to the running run.
        resumes: number of starts from a checkpoint.
        watched: samples of the current or last start, one per second: (age in seconds, resident bytes, open files).
        lives: `watched` of all earlier starts.
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
                start_new_session=True,  # a process group that signals can be sent to, as from a terminal
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            )
        if self.watched:
            self.lives.append(self.watched)
        self.watched = []

    def wait(self, seconds: float = math.inf) -> int | None:
        """Wait for the run's end while sampling memory and files; return its exit status, or None after `seconds`."""
        assert self.process is not None
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            try:
                return self.process.wait(min(1.0, max(0.01, seconds - (time.monotonic() - start))))
            except subprocess.TimeoutExpired:
                self._watch()
        return self.process.poll()

    def _watch(self) -> None:
        if self.process is not None and time.monotonic() >= self.next_watch:
            self.next_watch = time.monotonic() + 1.0
            with contextlib.suppress(psutil.Error, OSError):  # it is ending
                self.watched.append(_usage(psutil.Process(self.process.pid)))

    def until_done(self) -> None:
        """Start the run and wait for its end.

        Raises:
            UserError: the run fails.
        """
        self.start()
        self._check(self.wait())

    def through_kills(self, kills: int, seconds: float, batches: int, rng: random.Random) -> None:
        """Start the run until it is done, and kill it `kills` times on the way.

        Each kill comes after a random time or at a random batch, whichever is first, so that the run cannot finish
        before all kills.
        """
        share = (1 - QUIET) / kills
        stops = sorted(rng.uniform(0.0, 1 - QUIET) for _ in range(kills))
        while True:
            self.start()
            # The signals take turns; the last start is not killed.
            done = sum(self.kills.values())
            number = SIGNALS[done % len(SIGNALS)]
            moment = rng.uniform(0.02, 2.0) * share * seconds
            status = self._wait_for(moment, math.ceil(stops[done] * batches)) if done < kills else self.wait()
            if status is not None:
                self._check(status)
                return
            self._kill(number, rng)

    def _wait_for(self, seconds: float, batch: int) -> int | None:
        """Wait until `seconds` have passed, `batch` is done or the run has ended; return its exit status if ended."""
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
        # A scheduler may signal the first process only; a terminal signals all. SIGKILL must not leave any process.
        if number == signal.SIGTERM and rng.random() < 0.5:
            self.process.send_signal(number)
        else:
            os.killpg(self.process.pid, number)
        status = self.wait(120.0)
        if status is None:
            raise UserError(f"{self.folder}: still running two minutes after {number.name}")
        output = self.folder / "output.txt"
        if number == signal.SIGINT and output.read_bytes().rstrip().endswith(b"KeyboardInterrupt"):
            return  # interrupted during imports, before our signal handler was installed
        if status not in (0, -number, 128 + number):  # 0: it finished before the signal
            raise UserError(f"{self.folder}: ended with {status} after {number.name}; see its output.txt")
        # Ranks whose launcher was ended by the signal save and end by themselves.
        deadline = time.monotonic() + 120.0
        while any(_group_of(process) == self.process.pid for process in psutil.process_iter()):
            if time.monotonic() > deadline:
                raise UserError(f"{self.folder}: processes of the run are still alive two minutes after its end")
            time.sleep(0.1)

    def _check(self, status: int | None) -> None:
        if status != 0:
            raise UserError(f"{self.folder}: the run ended with {status}; see its output.txt")

    def end(self) -> None:
        """Kill the run if it is still running."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def lines(self) -> int:
        """Count the batches done by all ranks, including those that a resumed run repeated."""
        paths = (self.folder / "record").glob("rank*.jsonl")
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of the metrics file without metrics that depend on the clock."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return read_checkpoint(str(self.folder / "run")).state


def last_batch(record: Path, position: int) -> int:
    """Return the last batch in a record after a position in bytes, or -1 if there is none yet."""
    with open(record, "rb") as file:
        file.seek(max(position, record.stat().st_size - 2**16))  # longer than any line
        text = file.read().decode(errors="replace")
    return int(numbers[-1]) if (numbers := re.findall(r'"batch": (\d+),', text)) else -1


def _usage(main: psutil.Process) -> tuple[float, int, int]:
    """Return the age of a process in seconds, and the resident bytes and open files of it and its descendants."""
    age = time.time() - main.create_time()
    processes = [main, *main.children(recursive=True)]
    resident = sum(process.memory_info().rss for process in processes)
    return age, resident, sum(process.num_fds() for process in processes)


def _group_of(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, OSError):
        return None
