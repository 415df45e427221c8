"""DataLoader worker processes that only their parent can terminate, and that hand over batches in shared memory."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from electra_composer.batches.arena import Arena, ArenaCollation
from electra_composer.batches.collation import Batch

END_OF_WORKER = signal.SIGUSR2
SIGNALS_OF_WORKER = {signal.SIGINT, signal.SIGTERM, END_OF_WORKER}
ENDS_WORKERS = sys.platform.startswith("linux")  # PyTorch forks its workers there


def loader_workers(number: int, collate: Callable[[Any], Batch] | None = None, batch_bytes: int = 0) -> dict[str, Any]:
    """Return the `DataLoader` arguments for `number` workers that run until their parent terminates them.

    Ctrl-C and many schedulers signal every process of a run, but finishing the current batch needs the workers: they
    ignore SIGINT and, on Linux, SIGTERM.

    Args:
        collate: the loader's `collate_fn`.
        batch_bytes: on Linux, batches of up to this size are handed over in an :class:`Arena`.
    """
    collation: dict[str, Any] = {} if collate is None else {"collate_fn": collate}
    if collation and number > 0 and ENDS_WORKERS:
        collation["collate_fn"] = ArenaCollation(collation["collate_fn"], Arena(number, batch_bytes))
    if number == 0:
        return {"num_workers": 0, **collation}
    context = _WorkerContext() if ENDS_WORKERS else None
    return {
        "num_workers": number,
        "persistent_workers": True,
        "multiprocessing_context": context,
        "worker_init_fn": leave_signals_to_parent,
        **collation,
    }


def leave_signals_to_parent(_: int = 0) -> None:
    """Initialise a worker: ignore signals that are meant for the parent."""
    # The parent closes the resources that a worker has copies of: garbage collection here must not.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ENDS_WORKERS:
        signal.signal(END_OF_WORKER, lambda number, frame: os._exit(0))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_OF_WORKER)


class WorkerLoader(DataLoader):
    """DataLoader that shuts its workers down when it is garbage-collected, and at exit."""

    # Workaround (torch 2.7): a loader that is alive at exit has not told its workers to end. Persistent workers of
    # pinned batches, as on CUDA, are joined for five seconds each before they are terminated: 8 of them hold the
    # process for 40 seconds (torch 2.15 tells them). Nor have loaders in reference cycles, as Composer's objects form
    # them: the garbage collector closes the queues to the workers first. The finalizer keeps the iterator, and so its
    # queues, alive until the workers have exited. `_get_iterator` and `_shutdown_workers` are private; goes when
    # DataLoader has a public close.
    def _get_iterator(self) -> Any:
        iterator: Any = super()._get_iterator()
        if self.num_workers > 0:
            shut_down = weakref.finalize(self, iterator._shutdown_workers)
            atexit.register(shut_down)  # what is registered last runs first: before the iterator's own waiting
        return iterator


# Workaround (torch 2.7): DataLoader, and Python at exit, terminate workers by SIGTERM, which these workers ignore. They
# get END_OF_WORKER instead, and exit with the status 0 that DataLoader expects. `_Popen` is private to
# Python's multiprocessing. Goes when DataLoader lets the caller choose the signal.
class _WorkerPopen(Popen):
    def __init__(self, process: BaseProcess) -> None:
        # Until the worker has its handlers, a signal would kill it with a status that DataLoader takes for a fault: it
        # starts with these signals blocked, and one that arrives early waits for `leave_signals_to_parent`.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_WORKER)
        try:
            super().__init__(process)  # forks; returns in the parent only
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, END_OF_WORKER)


class _WorkerProcess(ForkProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        return _WorkerPopen(process)


class _WorkerContext(ForkContext):
    Process = _WorkerProcess
