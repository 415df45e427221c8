"""Shared memory through which loader workers hand over batches.

torch.multiprocessing sends a tensor as a file of shared memory, and the receiver requests its descriptor from the
sender: a connection, its authentication and several messages for each tensor, between which the processes wait for each
other. Here the memory exists before the workers start, and a message says only where in it a batch is.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from electra_composer.batches.collation import Batch

SLOTS = 6
"""Per worker: two batches that DataLoader requests in advance, and four that the receiver may hold."""

ALIGNMENT = 64  # bytes, as torch aligns its tensors

_arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Place(NamedTuple):
    """Where a tensor is in a slot."""

    offset: int  # bytes
    dtype: str
    shape: tuple[int, ...]


class Arena:
    """Slots of anonymous memory, shared with the worker processes that are forked from this one.

    Each slot has a flag, 1 while it is in use. A slot belongs to one worker, which alone sets its flag; the process
    that receives the batches alone clears it, once no tensor refers to the slot any more: no lock is needed. The memory
    has no name, so that nothing is left of it however its processes end. Slots that are never used take no memory.

    Args:
        workers: number of worker processes, of one DataLoader with `persistent_workers`: others with the same numbers
            would write to the same slots.
        slot_bytes: size of a slot.
    """

    def __init__(self, workers: int, slot_bytes: int) -> None:
        self._number = next(_numbers)  # forked workers know it by the same number
        _arenas[self._number] = self
        self._receiver = os.getpid()
        self._slot_bytes = _round_up(slot_bytes, mmap.PAGESIZE)
        self._first = _round_up(workers * SLOTS, mmap.PAGESIZE)  # byte; the flags are before
        self._memory = mmap.mmap(-1, self._first + workers * SLOTS * self._slot_bytes)

    def put(self, batch: Batch) -> Batch | Message:
        """Copy the tensors of a batch into a free slot; called by a worker.

        Returns:
            What to send: the batch itself, which then goes the usual way, if no slot is free or large enough.
        """
        arrays = {name: value.numpy() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        places, end = {}, 0
        for name, array in arrays.items():
            places[name] = Place(end, array.dtype.str, array.shape)
            end = _round_up(end + array.nbytes, ALIGNMENT)
        slot = self._free_slot()
        if slot is None or end > self._slot_bytes:
            return batch
        memory = self._bytes_of(slot)
        for name, place in places.items():
            _at(memory, place)[...] = arrays[name]
        self._memory[slot] = 1
        return Message(self._number, slot, places, {name: batch[name] for name in batch if name not in places})

    def get(self, slot: int, places: dict[str, Place], others: dict[str, Any]) -> Batch:
        """Return the batch of a slot, which is free again when all of its tensors are gone; called by the receiver."""
        memory = self._bytes_of(slot)
        weakref.finalize(memory, self._clear, slot).atexit = False
        return {**{name: torch.from_numpy(_at(memory, place)) for name, place in places.items()}, **others}

    def _free_slot(self) -> int | None:
        worker = get_worker_info()
        assert worker is not None
        slot = self._memory.find(b"\0", worker.id * SLOTS, (worker.id + 1) * SLOTS)
        return None if slot < 0 else slot

    def _clear(self, slot: int) -> None:
        if os.getpid() == self._receiver:  # not a process forked from it while it held the batch
            self._memory[slot] = 0

    def _bytes_of(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8, self._slot_bytes, self._first + slot * self._slot_bytes)


class Message:
    """What a worker sends instead of a batch. It is the batch again when it is unpickled."""

    def __init__(self, arena: int, *contents: Any) -> None:
        self._arena = arena
        self._contents = contents

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        return _receive, (self._arena, *self._contents)


def _receive(arena: int, *contents: Any) -> Batch:
    return _arenas[arena].get(*contents)


class ArenaCollation:
    """Collation in worker processes whose batches are handed over in an :class:`Arena`.

    Args:
        collate: returns a batch, a dictionary of CPU tensors and other values.
        arena: created before the workers start.
    """

    def __init__(self, collate: Callable[[Any], Batch], arena: Arena) -> None:
        self._collate = collate
        self._arena = arena

    def __call__(self, items: Any) -> Batch | Message:
        return self._arena.put(self._collate(items))


def _at(memory: NDArray[np.uint8], place: Place) -> NDArray[Any]:
    dtype = np.dtype(place.dtype)
    end = place.offset + dtype.itemsize * int(np.prod(place.shape))
    return memory[place.offset : end].view(dtype).reshape(place.shape)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
