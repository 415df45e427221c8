"""SIGTERM and SIGINT: a checkpoint at the end of the running batch, and out.

Preemption, a scheduler's time limit and `kill` send SIGTERM, Ctrl-C sends SIGINT. All processes of a run stop after the
same batch: what each has received goes along with the counts that they add up for every batch anyway
(:mod:`electra_composer.training.trainer`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from electra_composer.checkpoints.saving import AtomicCheckpointSaver

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
LAUNCHED = "LOCAL_RANK" in os.environ  # asked now: Composer sets it later for a process that starts by itself, too


class StopOnSignal(Callback):
    """Ends a run after the batch in which any of its processes received SIGTERM or SIGINT.

    A checkpoint of that batch is saved, one line says which, and the process exits with 128 + the signal's number, as a
    shell would have it: 143 or 130; after the last batch the run ends as ever, with 0. A second SIGINT stops at once,
    as if nothing were there to save. Signals are the business of this callback while training runs; before and after,
    they do what they did.

    It must come after the savers in the list of callbacks, and a trainer must hand it what the processes agreed on:
    :meth:`received` summed over them, to :meth:`agree`.

    Args:
        saver: of the checkpoint; None: the run keeps none, and just ends.
    """

    def __init__(self, saver: AtomicCheckpointSaver | None) -> None:
        self.saver = saver
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def received(self) -> list[int]:
        """1 for the one of :data:`SIGNALS` that this process has received."""
        return [int(self._received == number) for number in SIGNALS]

    def agree(self, counts: Sequence[float]) -> None:
        """How many processes have received each of :data:`SIGNALS`."""
        self._agreed = next((number for number, count in zip(SIGNALS, counts, strict=True) if count), None)

    def fit_start(self, state: State, logger: Logger) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python gives signals to the main thread alone
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        end_with_launcher()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # From now on the system itself ends the process on SIGINT, even while it waits for other processes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._received is None:
            self._received = signal.Signals(number)
            if dist.get_global_rank() == 0:
                text = f"{self._received.name}: stopping after this batch; Ctrl-C stops at once, and saves nothing\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._agreed is None or state.max_duration is None:
            return
        if state.timestamp.get(state.max_duration.unit) >= state.max_duration:
            return  # it was the last batch: the run ends as it would have
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        saved = self.saver.save(state, logger) if self.saver is not None else None
        if dist.get_global_rank() == 0:
            done = f"stopped by {self._agreed.name} after batch {state.timestamp.batch.value}"
            kept = f"saved {saved}; the same command goes on from there" if saved else "this run keeps no checkpoints"
            print(f"{done}: {kept}", file=sys.stderr, flush=True)
        dist.barrier()
        raise SystemExit(128 + self._agreed)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._give_back()

    def close(self, state: State, logger: Logger) -> None:
        if not LAUNCHED:  # a launcher sends SIGTERM to the others when the first has ended
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def end_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the process that launched this rank ends.

    Composer's launcher hands on Ctrl-C, but it dies of a SIGTERM, as schedulers send it, and its ranks would train on.
    """
    if sys.platform.startswith("linux") and LAUNCHED:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
