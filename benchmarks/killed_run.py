"""A pretraining run that is killed and started again, and watched meanwhile; for soak.py."""

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
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.errors import UserError

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
QUIET = 0.25  # share of the time, at the end, in which nothing is killed any more
TIMES = ("time/", "throughput/", "memory/")  # metrics that no two runs share


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
