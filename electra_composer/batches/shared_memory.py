"""Shared memory of Streaming's datasets: pick a free name exclusively, and release blocks before the process exits."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from composer.utils import dist
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from electra_composer.batches.stale_memory import remove_stale_memory


# Workaround (streaming 0.13): get_shm_prefix picks the first free name without a lock, so that two runs that start at
# the same time find the same name and one of them fails. Every rank searches by itself, in the private
# `_check_and_find_retrying`. Goes when Streaming locks the search and shares what it found.
@contextlib.contextmanager
def exclusive_prefix() -> Iterator[None]:
    """Let one dataset of this machine and user at a time pick the next free name of Streaming's shared memory.

    No rank enters before the lock is held and every rank has released the datasets of earlier trainers. The ranks of a
    machine take the name that its first one finds: another run may exit, and free its name, at any time.
    """
    gc.collect()
    is_first = _is_first_on_this_machine()
    lock = FileLock(os.path.join(tempfile.gettempdir(), f"electra_composer_{os.getuid()}.lock"))
    with lock if is_first else contextlib.nullcontext():
        if is_first:
            remove_stale_memory()
        if _is_distributed():
            torch.distributed.barrier()
        find = prefix._check_and_find_retrying
        prefix._check_and_find_retrying = _same_on_all_ranks(find, is_first)
        try:
            yield
        finally:
            prefix._check_and_find_retrying = find
        if _is_distributed():
            torch.distributed.barrier()


def _same_on_all_ranks(find: Callable[..., int], is_first: bool) -> Callable[..., int]:
    """Make every rank return, or raise, what `find` does on the first rank of its machine."""

    def find_once(*arguments: Any, **options: Any) -> int:
        if not _is_distributed():
            return find(*arguments, **options)
        found: int | ValueError | None = None
        if is_first:
            try:
                found = find(*arguments, **options)
            except ValueError as error:  # the folder is in use
                found = error
        of_ranks = dist.all_gather_object((_machine(), found))
        found = next(found for machine, found in of_ranks if machine == _machine() and found is not None)
        if isinstance(found, ValueError):
            raise found
        return found

    return find_once


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_first_on_this_machine() -> bool:
    """Return whether this rank takes the lock: the first one of its run that sees the same lock file.

    It is not the first of its node: several launchers on one machine count as several nodes and would wait for each
    other.
    """
    if not _is_distributed():
        return World.detect().is_local_leader
    machines = dist.all_gather_object(_machine())
    return machines.index(machines[dist.get_global_rank()]) == dist.get_global_rank()


def _machine() -> tuple[str, int, int]:
    place = os.stat(tempfile.gettempdir())
    return socket.gethostname(), place.st_dev, place.st_ino


# Workaround (streaming 0.13): blocks are released by exit handlers alone; goes when datasets have a close method.
def release(blocks: Sequence[SharedMemory], owner: int | None = None) -> None:
    """Close blocks of shared memory now instead of at exit, and unlink those that this process created.

    Args:
        owner: id of the only process that may release them: a loader worker's copy of a dataset must not. None: any.
    """
    if owner not in (None, os.getpid()):
        return
    for block in blocks:
        block.cleanup()
        atexit.unregister(block.cleanup)


@contextlib.contextmanager
def release_new_blocks(keep: Callable[[], list[SharedMemory]] = list) -> Iterator[None]:
    """Release the blocks of shared memory opened in the `with` statement, except those that `keep()` then returns."""
    before = _all_shared_memory()
    yield
    kept = before + keep()
    release([block for block in _all_shared_memory() if block not in kept])


def _all_shared_memory() -> list[SharedMemory]:
    return [block for block in gc.get_referrers(SharedMemory) if isinstance(block, SharedMemory)]


# Workaround (streaming 0.13): a dataset does not list its blocks; goes when datasets have a close method.
def shared_memory_of(dataset: StreamingDataset) -> list[SharedMemory]:
    """Return the blocks of shared memory that a dataset holds in its attributes, or up to two levels below."""
    blocks, values = [], list(vars(dataset).values())
    for _ in range(3):
        blocks += [value for value in values if isinstance(value, SharedMemory)]
        values = [part for value in values for name in ("shm", "arr", "_arr") if (part := getattr(value, name, None))]
    return blocks
