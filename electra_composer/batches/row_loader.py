"""DataLoader of packed rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from streaming import StreamingDataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from electra_composer.batches.background import BackgroundIterator
from electra_composer.batches.collation import COLUMNS, Batch
from electra_composer.batches.row_dataset import RowDataset
from electra_composer.batches.workers import WorkerLoader

GROUP_ROWS = 64
"""Rows that are packed at once. NumPy's calls cost the same time for few rows as for many."""


class RowLoader(StreamingDataLoader, WorkerLoader):
    """`StreamingDataLoader` of a :class:`RowDataset`.

    A batch stays one tensor, of which its columns are views, so that a device can get it in one copy.

    Args:
        dataset: gives row numbers.
        background: without worker processes, load in a thread of this process. NumPy copies without the interpreter's
            lock, and no process waits for another.
        transform: applied to every batch in that thread; needs `background`.
        options: of StreamingDataLoader.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        background: bool = False,
        transform: Callable[[Batch], Batch] | None = None,
        **options: Any,
    ) -> None:
        self.background = background
        self.transform = transform
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader promises its private iterator
        """Yield batches: int64 tensors `[rows, max_seq_length]` (see :func:`collate_rows`), `num_tokens`, and `rows`,
        int64 `[rows]`, the row numbers in the split, which identify a batch's content."""
        for batch in super().__iter__():
            yield batch if self.background else unpack(batch)

    # Workaround (streaming 0.13): StreamingDataLoader takes the length of a batch's first value for its number of
    # rows, and the hook to count otherwise is private; goes when the hook is public.
    def _get_batch_size(self, batch: Any) -> int:
        return len(batch["rows"])

    # Workaround (torch 2.7): the method that creates DataLoader's iterator is private; goes when DataLoader can use a
    # thread, and has a public close.
    def _get_iterator(self) -> Any:
        return BackgroundIterator(self.batches()) if self.background else super()._get_iterator()

    def batches(self) -> Iterator[Batch]:
        """Yield the batches that DataLoader would, packing several small ones at once."""
        assert isinstance(self.dataset, RowDataset)
        assert self.batch_size is not None
        numbers = iter(self.dataset)
        group = self.batch_size * max(1, GROUP_ROWS // self.batch_size)
        while chunk := list(itertools.islice(numbers, group)):
            for batch in self.dataset.collate_group(chunk, self.batch_size):
                if len(batch["rows"]) < self.batch_size and self.drop_last:
                    continue
                unpacked = unpack(pin_memory(batch) if self.pin_memory else batch)
                made = unpacked if self.transform is None else self.transform(unpacked)
                if self.pin_memory:  # the columns are pinned together; copies of what is not pinned wait for the device
                    made = {**made, **pin_memory({name: made[name] for name in made if name not in COLUMNS})}
                yield made


def unpack(batch: Batch) -> Batch:
    """Convert a batch of :meth:`RowDataset.collate` to the form that :class:`RowLoader` yields; the tensors are views
    of one tensor."""
    columns = dict(zip(COLUMNS, batch["packed"], strict=True))
    return {**columns, "num_tokens": batch["num_tokens"], "rows": torch.tensor(batch["rows"])}
