"""Iteration in a thread: order, errors, and the end of the thread."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from electra_composer.batches.background import BackgroundIterator


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
