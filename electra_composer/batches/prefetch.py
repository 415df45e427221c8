"""Background thread that fetches shards ahead of the reader."""

from __future__ import annotations

import logging
import threading
import weakref

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK

log = logging.getLogger(__name__)


class Prefetcher:
    """Fetches an epoch's shards in the order of their first row, a limited number of rows ahead of the reader.

    A shard that it fails to fetch is fetched again by the reader, which raises the error if that fails too.

    Args:
        dataset: calls its `prepare_shard`; stays at most `dataset.predownload` rows ahead (0: no limit).
        numbers: rows to be read, in order.

    Attributes:
        position: number of rows read so far, updated by the reader.
    """

    def __init__(self, dataset: StreamingDataset, numbers: NDArray[np.int64]) -> None:
        self.position = 0
        self._dataset = weakref.proxy(dataset)
        self._limit = dataset.predownload or len(numbers)
        ends = np.cumsum([shard.samples for shard in dataset.shards])
        shards, firsts = np.unique(np.searchsorted(ends, numbers, side="right"), return_index=True)
        order = np.argsort(firsts)
        self._plan = list(zip(shards[order].tolist(), firsts[order].tolist(), strict=True))
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        for shard, first in self._plan:
            try:
                while first > self.position + self._limit:
                    if self._stopped.wait(TICK):
                        return
                if self._stopped.is_set():
                    return
                self._dataset.prepare_shard(shard, blocking=False)
            except ReferenceError:  # the dataset has been garbage-collected
                return
            except Exception as error:  # each storage client raises its own types
                log.info(f"shard {shard} could not be fetched ahead: {error}")
