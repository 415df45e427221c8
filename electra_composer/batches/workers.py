"""Loader worker processes that only their parent can end."""

from __future__ import annotations

import gc
import os
import signal
import sys
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess
from typing import Any

END_OF_WORKER = signal.SIGUSR2
ENDS_WORKERS = sys.platform.startswith("linux")  # where PyTorch forks them


def loader_workers(number: int) -> dict[str, Any]:
    """Arguments of a `DataLoader` for `number` processes that live until their parent ends them.

    Ctrl-C and many schedulers signal every process of a run, but the batch that is to be finished needs its workers:
    they ignore SIGINT and, on Linux, SIGTERM. PyTorch ends by SIGTERM what does not end by itself, and so does Python
    at its exit: there, these processes get :data:`END_OF_WORKER` instead, and leave with the status 0 that PyTorch
    expects of them.
    """
    if number == 0:
        return {"num_workers": 0}
    context = _WorkerContext() if ENDS_WORKERS else None
    return {"num_workers": number, "multiprocessing_context": context, "worker_init_fn": leave_signals_to_parent}


def leave_signals_to_parent(_: int = 0) -> None:
    """What a process of :func:`loader_workers` does first."""
    # What a worker has a copy of is its parent's to close: no garbage collection is to do it here.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ENDS_WORKERS:
        signal.signal(END_OF_WORKER, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _WorkerPopen(Popen):
    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, END_OF_WORKER)


class _WorkerProcess(ForkProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        return _WorkerPopen(process)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess
