"""What Streaming shares between processes: let go when its data set is gone, and named by one process at a time."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.shared import SharedMemory
from streaming.base.world import World

from electra_composer.batches.stale_memory import remove_stale


@contextmanager
def choosing_a_prefix() -> Iterator[None]:
    """One data set of this machine and user at a time takes the next free name of Streaming's shared memory.

    Two runs that start together would otherwise both find the same name free, and one of them fails. All ranks of a
    run look for the name, each by itself: none starts before the lock is had, and before each has let go what the data
    sets of earlier trainers held, so that all find the same.
    """
    gc.collect()
    lock = FileLock(os.path.join(tempfile.gettempdir(), f"electra_composer_{os.getuid()}.lock"))
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_first = _is_first_on_this_machine()
    if is_first:
        lock.acquire()
    try:
        if is_first:
            remove_stale()
        if ranks:
            torch.distributed.barrier()
        yield
        if ranks:
            torch.distributed.barrier()
    finally:
        lock.release()


def _is_first_on_this_machine() -> bool:
    """Whether this process is to take the lock: the first of its run that would find the same file.

    Not the first of its node: several launchers on one machine are several nodes, and would wait for each other.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return World.detect().is_local_leader
    place = os.stat(tempfile.gettempdir())
    machines: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(machines, (socket.gethostname(), place.st_dev, place.st_ino))
    rank = torch.distributed.get_rank()
    return machines.index(machines[rank]) == rank


def release(blocks: Sequence[SharedMemory], owner: int | None = None) -> None:
    """Close blocks of shared memory now, and remove those that this process made, instead of at its end.

    `owner` is the process that may; a worker's copy of the data set leaves everything as it is.
    """
    if owner not in (None, os.getpid()):
        return
    for block in blocks:
        block.cleanup()
        atexit.unregister(block.cleanup)


def all_shared_memory() -> list[SharedMemory]:
    return [block for block in gc.get_referrers(SharedMemory) if isinstance(block, SharedMemory)]


def shared_memory_of(dataset: StreamingDataset) -> list[SharedMemory]:
    """The blocks of shared memory that a data set holds, found in its attributes and one or two levels below."""
    blocks, values = [], list(vars(dataset).values())
    for _ in range(3):
        blocks += [value for value in values if isinstance(value, SharedMemory)]
        values = [part for value in values for name in ("shm", "arr", "_arr") if (part := getattr(value, name, None))]
    return blocks
