"""Save a checkpoint and exit on SIGTERM or SIGINT.

Preemption, a scheduler's time limit and `kill` send SIGTERM, Ctrl-C sends SIGINT. All ranks stop after the same batch:
the signals received are reduced together with the counts of every batch (:mod:`electra_composer.training.trainer`).
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
from electra_composer.signals import LAUNCHED

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


class StopOnSignal(Callback):
    """Ends a run after the batch in which any rank received SIGTERM or SIGINT.

    Saves a checkpoint of that batch, prints one line that names it, and exits with 128 + the signal number, as in a
    shell: 143 or 130. After the last batch the run ends normally, with 0. A second SIGINT ends the process at once
    without saving. The handlers are installed while training runs; before and after, the previous ones apply.

    Must come after the savers in the list of callbacks. The trainer must sum :meth:`received` over ranks and pass the
    result to :meth:`agree`.

    Args:
        saver: saves the checkpoint; None: end without one.
    """

    def __init__(self, saver: AtomicCheckpointSaver | None) -> None:
        self.saver = saver
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def received(self) -> list[int]:
        """Return 1 for the one of :data:`SIGNALS` that this rank has received, else 0."""
        return [int(self._received == number) for number in SIGNALS]

    def agree(self, counts: Sequence[float]) -> None:
        """Take the number of ranks that have received each of :data:`SIGNALS`."""
        self._agreed = next((number for number, count in zip(SIGNALS, counts, strict=True) if count), None)

    def fit_start(self, state: State, logger: Logger) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python delivers signals to the main thread only
        for number in SIGNALS:
            before = signal.signal(number, self._receive)
            self._before.setdefault(number, before)  # a fit that failed has left our handler
        end_with_launcher()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # From now on SIGINT ends the process in the kernel, even while it waits for other ranks.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._received is None:
            self._received = signal.Signals(number)
            if dist.get_global_rank() == 0:
                text = f"{self._received.name}: stopping after this batch; Ctrl-C stops at once without saving\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._agreed is None or state.max_duration is None:
            return
        if state.timestamp.get(state.max_duration.unit) >= state.max_duration:
            return  # the last batch: the run ends normally
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        saved = self.saver.save(state, logger) if self.saver is not None else None
        if dist.get_global_rank() == 0:
            done = f"stopped by {self._agreed.name} after batch {state.timestamp.batch.value}"
            kept = f"saved {saved}; rerun the same command to resume" if saved else "this run keeps no checkpoints"
            print(f"{done}: {kept}", file=sys.stderr, flush=True)
        dist.barrier()
        raise SystemExit(128 + self._agreed)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._restore_handlers()

    def close(self, state: State, logger: Logger) -> None:
        if not LAUNCHED:  # a launcher sends SIGTERM to the other ranks when the first has ended
            self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def end_with_launcher() -> None:
    """Make Linux send SIGTERM to this rank when the process that launched it ends."""
    # Workaround (composer 0.32): the launcher forwards signals, but the ranks of one that is killed train on; goes when
    # they end with it.
    if sys.platform.startswith("linux") and LAUNCHED:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
