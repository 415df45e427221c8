"""Iteration in a thread of the same process, a few items ahead of the consumer."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

T = TypeVar("T")

AHEAD = 4
"""Items that are kept ready: enough for a slow shard or a busy interpreter not to be noticed."""

TICK = 0.2
"""Seconds after which a thread with nothing to do looks whether it is still needed."""


class BackgroundIterator(Generic[T]):
    """Runs an iterator in a thread and yields its items in order.

    An exception of the iterator is raised by the `next` that would have returned its item. The thread ends with the
    iterator, when this object is closed or garbage-collected, and at the end of the process.

    Args:
        iterator: used by the thread only.
        ahead: items to keep ready.
    """

    def __init__(self, iterator: Iterator[T], ahead: int = AHEAD) -> None:
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        stopped = threading.Event()
        # The thread must not refer to this object, or it would never be collected.
        thread = threading.Thread(target=_fill, args=(iterator, self._items, stopped), daemon=True)
        self.close = weakref.finalize(self, _stop, thread, self._items, stopped)
        thread.start()

    def __iter__(self) -> BackgroundIterator[T]:
        return self

    def __next__(self) -> T:
        if not self.close.alive:
            raise StopIteration
        item, error = self._items.get()
        if error is not None:
            self.close()
            raise error
        return item  # type: ignore[return-value]


class BackgroundLoader(DataLoader):
    """DataLoader that loads in a thread of this process, where NumPy copies without the interpreter's lock."""

    # Workaround (torch 2.7): DataLoader loads in advance only in worker processes, from which a batch takes longer to
    # come than to be packed, and the method that creates its iterator is private; goes when it can use a thread.
    def _get_iterator(self) -> Any:
        return BackgroundIterator(super()._get_iterator())


def _fill(
    iterator: Iterator[T], items: queue.Queue[tuple[T | None, BaseException | None]], stopped: threading.Event
) -> None:
    error: BaseException | None = None
    while error is None and not stopped.is_set():
        item: T | None = None
        try:
            item = next(iterator)
        except BaseException as raised:
            error = raised
        while not stopped.is_set():
            try:
                items.put((item, error), timeout=TICK)
                break
            except queue.Full:
                pass


def _stop(thread: threading.Thread, items: queue.Queue[Any], stopped: threading.Event) -> None:
    stopped.set()
    with contextlib.suppress(queue.Empty):  # wake the thread if it waits for a place
        while True:
            items.get_nowait()
    if thread is not threading.current_thread():  # the garbage collector may run in the thread itself
        thread.join(timeout=5 * TICK)
