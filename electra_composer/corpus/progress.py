"""Progress bars over bytes of text, fed by worker processes."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

_REFRESH = 0.25  # seconds between updates


def progress_bar(what: str, enabled: bool, total: int | None = None) -> tqdm:
    """Return a bar of bytes of text; where stderr is not a terminal (batch jobs), it prints every 30 seconds."""
    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
        maxinterval=30.0,
        disable=not enabled,
    )


@contextlib.contextmanager
def follow(bar: tqdm, done: Any) -> Iterator[None]:
    """Update a bar from a shared counter (`multiprocessing.Value`) while the block runs."""
    stopped = threading.Event()

    def update() -> None:
        # Not `.value`, which waits for a lock that a killed worker may hold.
        bar.update(done.get_obj().value - bar.n)

    def run() -> None:
        while not stopped.wait(_REFRESH):
            update()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        update()
