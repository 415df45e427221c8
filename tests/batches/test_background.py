"""Iteration in a thread: order, errors, and the end of the thread."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from electra_composer.batches import row_loader
from electra_composer.batches.background import BackgroundIterator
from electra_composer.batches.collation import COLUMNS
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.config import ShardsConfig


def threads() -> int:
    return threading.active_count()


def wait_for(number: int) -> None:
    deadline = time.monotonic() + 20
    while threads() > number:
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def test_items_come_in_order_and_the_thread_ends() -> None:
    before = threads()
    assert list(BackgroundIterator(iter(range(100)))) == list(range(100))
    wait_for(before)


def test_it_stays_a_few_items_ahead() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    items = BackgroundIterator(numbers(), ahead=3)
    deadline = time.monotonic() + 20
    while len(taken) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(taken) == 4  # three in the queue, one that waits for a place
    assert next(items) == 0
    items.close()


def test_an_error_comes_in_its_place_and_ends_the_iteration() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    before = threads()
    items = BackgroundIterator(fails())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    wait_for(before)


@pytest.mark.parametrize("how", ["closed", "collected"])
def test_the_thread_ends_when_nobody_needs_it(how: str) -> None:
    finished = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            finished.set()

    before = threads()
    items = BackgroundIterator(endless())
    assert next(items) == 1
    if how == "closed":
        items.close()
    del items
    gc.collect()
    wait_for(before)
    assert finished.wait(20)  # the iterator is closed too


def test_every_tensor_of_a_batch_is_pinned(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that the transform adds; the columns as one tensor."""
    pinned: set[int] = set()

    def pin_memory(values: Any) -> Any:
        if isinstance(values, torch.Tensor):
            copy = values.clone()
            pinned.add(copy.untyped_storage().data_ptr())
            return copy
        return {name: pin_memory(value) for name, value in values.items()} if isinstance(values, dict) else values

    monkeypatch.setattr(row_loader, "pin_memory", pin_memory)
    config = ShardsConfig(path=str(shards), max_seq_length=32)

    def count(batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "loss_scale": torch.ones(len(batch["rows"]), 2)}

    loader = build_data_spec(config, "train", 4, read_data(config), 1, batch_transforms=count).dataloader
    loader.pin_memory = True
    for batch in loader:
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        assert {"loss_scale", "rows", *COLUMNS} == set(tensors)
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} <= pinned
        assert len({tensors[name].untyped_storage().data_ptr() for name in COLUMNS}) == 1


@pytest.mark.parametrize("workers", ["auto", 0, 2])
def test_a_batch_does_not_change_after_it_was_handed_over(shards: Path, workers: int | str) -> None:
    """While the next ones are read: no memory of a batch in use is written again."""
    config = ShardsConfig(path=str(shards), max_seq_length=32, num_workers=workers)
    held = []
    for batch in build_data_spec(config, "train", 4, read_data(config), 1).dataloader:
        held.append((batch, {name: torch.as_tensor(value).clone() for name, value in batch.items()}))
    assert len(held) > 10
    for batch, copy in held:
        assert all(torch.equal(torch.as_tensor(batch[name]), value) for name, value in copy.items())
