"""Batches handed over in shared memory: their values, when a slot is free again, errors, and what is left behind."""

from __future__ import annotations

import collections
import gc
import multiprocessing
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from electra_composer.batches.arena import SLOTS
from electra_composer.batches.collation import COLUMNS
from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.batches.workers import loader_workers
from electra_composer.config import ShardsConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch forks no workers")

ROWS = 60
BYTES = 1024


class Numbers(IterableDataset):
    """0 to ROWS - 1, shared among the workers in turn, in batches of 2."""

    def __iter__(self):
        worker = get_worker_info()
        for first in range(2 * worker.id, ROWS, 2 * worker.num_workers):
            yield from (first, first + 1)


def collate(numbers):
    """Return tensors of several types and shapes, one of them empty, beside other values."""
    if -1 in numbers:
        raise ZeroDivisionError("row -1")
    rows = torch.tensor(numbers)
    return {
        "ids": rows[:, None] + 1000 * torch.arange(5),
        "weights": rows.float() / 7,
        "even": rows % 2 == 0,
        "none": torch.empty(0, 3),
        "scalar": rows.sum(),
        "rows": numbers,
        "name": f"batch of {numbers[0]}",
    }


def assert_same(batch, numbers):
    expected = collate(numbers)
    assert list(batch) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert batch[name].dtype == value.dtype
            assert torch.equal(batch[name], value), name
        else:
            assert batch[name] == value


class Loader(DataLoader):
    """DataLoader with an arena that it can be asked about."""

    def __init__(self, workers, dataset=None, function=collate, slot_bytes=BYTES, **options):
        self.slots = workers * SLOTS
        super().__init__(dataset or Numbers(), batch_size=2, **loader_workers(workers, function, slot_bytes), **options)
        self.arena = self.collate_fn._arena

    def holds(self, batch):
        """Whether the tensors of a batch are in the arena."""
        begin = np.frombuffer(self.arena._memory, np.uint8).__array_interface__["data"][0]
        return all(begin <= value.data_ptr() < begin + len(self.arena._memory) for value in tensors(batch))

    def used(self):
        gc.collect()
        return sum(self.arena._memory[: self.slots])


def tensors(batch):
    return [value for value in batch.values() if isinstance(value, torch.Tensor) and value.numel()]


def expected():
    return [[first, first + 1] for first in range(0, ROWS, 2)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_in_order_epoch_after_epoch(workers):
    loader = Loader(workers)
    for _ in range(3):
        in_arena = []
        for number, batch in enumerate(loader):
            assert_same(batch, expected()[number])
            in_arena.append(loader.holds(batch))
        # Near the end of an epoch, a worker may be asked for more batches than it has slots for.
        assert len(in_arena) == ROWS // 2
        assert all(in_arena[: -2 * workers])
        del batch
    assert loader.used() == 0


def test_no_slot_is_written_while_a_tensor_refers_to_it():
    """One that holds two batches, another that keeps one tensor of each, and one that holds everything."""
    loader = Loader(2)
    window = collections.deque(maxlen=3)
    for number, batch in enumerate(loader):
        window.append((batch, number))
        for held, of in window:
            assert_same(held, expected()[of])
            assert loader.holds(held)
    window.clear()
    batch = held = None
    assert loader.used() == 0
    kept = [batch["ids"][1:] for batch in loader]
    for tensor, numbers in zip(kept, expected(), strict=True):
        assert torch.equal(tensor, collate(numbers)["ids"][1:])
    batch = None
    assert loader.used() == loader.slots  # the other batches went the usual way
    everything = list(loader)
    for batch, numbers in zip(everything, expected(), strict=True):
        assert_same(batch, numbers)
    batch = tensor = None
    assert not any(map(loader.holds, everything))
    del kept, everything
    assert all(loader.holds(batch) for batch, _ in zip(loader, range(20), strict=False))


def test_an_iterator_that_is_left_early_keeps_no_slot():
    loader = Loader(2)
    for _ in range(SLOTS):
        for batch, numbers in zip(loader, expected()[:5], strict=False):
            assert_same(batch, numbers)
            assert loader.holds(batch)
    for number, batch in enumerate(loader):
        assert_same(batch, expected()[number])
    del batch
    assert loader.used() == 0


def test_loaders_beside_each_other_and_one_within_another():
    outer, inner = Loader(1), Loader(2)
    for batch, numbers in zip(outer, expected(), strict=True):
        if numbers[0] % 20 == 0:
            for other, others in zip(inner, expected(), strict=True):
                assert_same(other, others)
        assert_same(batch, numbers)
        assert outer.holds(batch)
        assert not inner.holds(batch)


def test_what_is_larger_than_a_slot_goes_the_usual_way():
    def varying(numbers):
        return {"ids": torch.full((4 if numbers[0] % 8 else 4096,), numbers[0])}

    loader = Loader(2, function=varying, slot_bytes=4096)
    for batch, numbers in zip(loader, expected(), strict=True):
        assert torch.equal(batch["ids"], varying(numbers)["ids"])
        assert loader.holds(batch) == (len(batch["ids"]) == 4)


def test_a_copy_of_the_process_frees_no_slot():
    loader = Loader(1)
    batches = [next(iter(loader))]
    used = loader.used()
    assert used >= 1
    copy = multiprocessing.get_context("fork").Process(target=batches.clear)
    copy.start()
    copy.join(60)
    assert copy.exitcode == 0
    assert loader.used() >= used
    assert_same(batches[0], expected()[0])


def test_errors_of_the_collation_are_raised_in_their_place():
    loader = Loader(1, dataset=[0, 1, 2, -1, 4, 5])
    batches = iter(loader)
    assert_same(next(batches), [0, 1])
    with pytest.raises(ZeroDivisionError, match=r"in DataLoader worker process 0(.|\n)*row -1"):
        next(batches)
    assert_same(next(batches), [4, 5])


def test_a_killed_worker_is_noticed():
    batches = iter(Loader(2))
    next(batches)
    # Workaround (torch 2.7): `_workers` is private; goes when DataLoader lists its workers.
    os.kill(batches._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(is killed by signal|exited unexpectedly)"):
        list(batches)


def hold_batches_and_die(pipe):
    batches = iter(Loader(2))
    held = [next(batches), next(batches)]
    pids = [os.getpid(), *(worker.pid for worker in batches._workers)]
    pipe.send((pids, shared_memory_of(pids), len(held)))
    os.kill(os.getpid(), signal.SIGKILL)


def shared_memory_of(pids):
    """List what these processes have in shared memory, by torch's names."""
    return [name for name in os.listdir("/dev/shm") if re.match(f"torch_({'|'.join(map(str, pids))})_", name)]


def test_a_killed_process_leaves_no_shared_memory():
    ours, theirs = multiprocessing.Pipe()
    program = multiprocessing.get_context("fork").Process(target=hold_batches_and_die, args=(theirs,))
    program.start()
    program.join()  # with a timeout it would wait for the workers, which inherit its pipe
    assert program.exitcode == -signal.SIGKILL
    pids, names, held = ours.recv()
    assert (len(pids), held) == (3, 2)
    assert names == shared_memory_of(pids) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_pinned_batches_take_no_slot():
    loader = Loader(2, pin_memory=True)
    batches = list(loader)
    for batch, numbers in zip(batches, expected(), strict=True):
        assert_same(batch, numbers)
        assert all(value.is_pinned() for value in tensors(batch))
    assert loader.used() == 0


def test_the_columns_of_a_batch_are_views_of_one_tensor(shards):
    meta = read_meta(str(shards))
    loaders = [
        build_dataloader(
            ShardsConfig(str(shards), 32, num_workers=workers), meta, "train", 4, shuffle=True, drop_last=True, seed=1
        )
        for workers in (0, 2)
    ]
    memory = loaders[1].collate_fn._arena._memory
    begin = np.frombuffer(memory, np.uint8).__array_interface__["data"][0]
    for _ in range(2):
        for number, (plain, batch) in enumerate(zip(*loaders, strict=True)):
            assert all(torch.equal(plain[name], batch[name]) for name in (*COLUMNS, "rows"))
            assert plain["num_tokens"] == batch["num_tokens"]
            whole = batch["input_ids"]._base
            assert whole.shape == (4, 4, 32)
            assert all(torch.equal(batch[name], row) for name, row in zip(COLUMNS, whole, strict=True))
            assert all(batch[name]._base is whole for name in COLUMNS)
            assert begin <= whole.data_ptr() < begin + len(memory) or number >= len(loaders[1]) - 4
