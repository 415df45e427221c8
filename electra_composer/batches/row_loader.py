"""DataLoader of packed rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from streaming import StreamingDataLoader

from electra_composer.batches.collation import COLUMNS, Batch


class RowLoader(StreamingDataLoader):
    """`StreamingDataLoader` of a :class:`RowDataset`.

    A worker sends the four tensors of a batch as one and the row numbers as a list, since each tensor sent between
    processes costs a file descriptor and system calls.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches: int64 tensors `[rows, max_seq_length]` (see :func:`collate_rows`), `num_tokens`, and `rows`,
        int64 `[rows]`, the row numbers in the split, which identify a batch's content."""
        for batch in super().__iter__():
            columns = dict(zip(COLUMNS, batch["packed"], strict=True))
            yield {**columns, "num_tokens": batch["num_tokens"], "rows": torch.tensor(batch["rows"])}

    # Workaround (streaming 0.13): StreamingDataLoader takes the length of a batch's first value for its number of
    # rows, and the hook to count otherwise is private; goes when the hook is public.
    def _get_batch_size(self, batch: Any) -> int:
        return int(batch["packed"].shape[1])

    # Workaround (torch 2.7): Composer's objects form reference cycles. When the garbage collector breaks one up, it
    # closes the queues to the workers before DataLoader tells the workers to exit, and DataLoader then waits five
    # seconds for each worker. The finalizer keeps the iterator, and so its queues, alive until the workers have
    # exited. `_get_iterator` and `_shutdown_workers` are private; goes when DataLoader has a public close.
    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers > 0:
            weakref.finalize(self, iterator._shutdown_workers)
        return iterator
