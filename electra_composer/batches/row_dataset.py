"""Iterable dataset of packed rows: Streaming's order, resuming and downloads; our own reading and collation."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from streaming import Stream
from streaming.base.world import World

from electra_composer.batches.collation import Batch, collate_rows
from electra_composer.batches.prefetch import Prefetcher
from electra_composer.batches.row_reader import RowReader
from electra_composer.batches.streaming_fixes import FixedStreamingDataset
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.object_store import explain
from electra_composer.storage.shard_folder import HASH, Meta

MIX = "rows_of_streams"  # key in the loader's state


class RowDataset(FixedStreamingDataset):
    """Row numbers of one split of one or several folders of shards, and the collation of their rows.

    Args:
        streams: rows are numbered across them in order.
        config: how shards of a remote are fetched and cached.
        meta: of the shards; gives the width of the batches and the id of `[PAD]`.
        full_batches: give an epoch as many global batches as its rows fill, on any number of ranks.
        options: of StreamingDataset: `batch_size` (rows per device), order and size of an epoch.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        config: ShardsConfig,
        meta: Meta,
        full_batches: bool,
        **options: Any,
    ) -> None:
        self._meta = meta
        self._full_batches = full_batches
        self._reader: RowReader | None = None
        self._prefetcher: Prefetcher | None = None
        super().__init__(
            streams,
            num_canonical_nodes=config.num_canonical_nodes,
            predownload=config.predownload,
            cache_limit=config.cache_limit,
            download_retry=config.download_attempts,
            download_timeout=config.download_timeout,
            validate_hash=HASH,
            **options,
        )

    # Workaround (streaming 0.13): StreamingDataset.__iter__ decodes one sample at a time. `_resume_incr_epoch`,
    # `_get_work` and the `_*_world` attributes, which it uses to find a worker's rows, are private. Goes when Streaming
    # has an iterator of sample numbers.
    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of this worker's rows in one epoch, starting from the loaded state.

        :meth:`collate` reads the rows, one batch at a time. Shards of a remote are prefetched until the iterator is
        exhausted or closed.
        """
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        epoch, sample_in_epoch = self._resume_incr_epoch()
        numbers = self._get_work(epoch, sample_in_epoch)
        numbers = numbers[numbers >= 0]  # Streaming pads the last rank's share with -1
        if self._full_batches:
            world = self._parallel_worker_world
            assert self.batch_size is not None
            left = len(self) // self.batch_size - sample_in_epoch // (self.batch_size * world.num_ranks)
            mine = len(range(world.worker_of_rank, left, world.workers_per_rank))  # batches go to the workers in turn
            numbers = numbers[: mine * self.batch_size]
        prefetcher = None
        if self._is_cache.any() and len(numbers):
            prefetcher = self._prefetcher = Prefetcher(self, numbers)
        try:
            yield from numbers.tolist()
        finally:
            if prefetcher is not None:
                prefetcher.stop()

    # Workaround (streaming 0.13): Streaming repeats rows to give all ranks equally many, which can add a global batch
    # compared with one rank; `_parallel_rank_world` is private. Goes when it can drop the incomplete global batch.
    def __len__(self) -> int:
        """Return the rows of an epoch per rank."""
        if not self._full_batches:
            return int(super().__len__())
        assert self.batch_size is not None
        return int(self.epoch_size) // (self.batch_size * self._parallel_rank_world.num_ranks) * self.batch_size

    def collate(self, numbers: Sequence[int]) -> Batch:
        """Read rows by their numbers and collate them; see :func:`collate_rows` and :class:`RowLoader`."""
        return self.collate_group(numbers, len(numbers))[0]

    def collate_group(self, numbers: Sequence[int], batch_size: int) -> list[Batch]:
        """Read rows by their numbers and collate them into batches of `batch_size`; the last one may be smaller."""
        if self._reader is None:  # opened in the worker that uses it
            self._reader = RowReader(self.shards, self._wait_for_shard, self._is_cache.tolist())
        rows = self._reader.read(np.asarray(numbers, np.int64))
        if self._prefetcher is not None:
            self._prefetcher.position += len(numbers)
        packed = collate_rows(rows, self._meta.max_seq_length, self._meta.tokenizer.special_ids["pad"])
        batches = []
        for first in range(0, len(numbers), batch_size):
            part = slice(first, first + batch_size)
            columns = packed if batch_size >= len(numbers) else np.ascontiguousarray(packed[:, part])
            num_tokens = int(rows.row_lengths[part].sum())
            batch = {
                "packed": torch.from_numpy(columns),
                "num_tokens": num_tokens,
                "rows": [int(row) for row in numbers[part]],
            }
            batches.append(batch)
        return batches

    def _wait_for_shard(self, shard: int) -> None:
        """Fetch or decompress a shard, or wait for the worker that does; if that worker fails, it is still missing.

        Raises:
            UserError: the shard is missing, does not match its hash, or its server does not answer.
        """
        try:
            self.prepare_shard(shard)
        except Exception as error:  # each storage client raises its own types
            stream = self.streams[self.stream_per_shard[shard]]
            name = self.shards[shard].raw_data.basename
            where = stream.local if stream.remote is None else stream.remote
            raise UserError(
                f"{where}/{stream.split}/{name}: the shard cannot be fetched or decompressed: "
                f"{explain(error, where)}; once fixed, rerun the same command to resume from the last checkpoint"
            ) from error

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the state, with the number of rows of each stream that it refers to."""
        return {**super().state_dict(num_samples, from_beginning), MIX: self._mix()}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Load a state. If its streams differ, warn and resume at the same position of a different order.

        Raises:
            UserError: An epoch has fewer rows now than were read when the state was saved.
        """
        rows = sum(rows_per_epoch for _, rows_per_epoch in self._mix())
        if obj["sample_in_epoch"] > rows:
            raise UserError(
                f"the checkpoint was written after {obj['sample_in_epoch']:,} rows of an epoch, and the data now has "
                f"{rows:,} rows per epoch; use the data of the checkpoint, or start another run from its weights "
                "(checkpoints.load_path, checkpoints.load_weights_only=true)"
            )
        if obj.get(MIX, self._mix()) != self._mix() and World.detect().is_local_leader:
            print(
                "warning: the checkpoint's data differs from this run's ([rows, rows per epoch] of each stream there: "
                f"{obj[MIX]}; now: {self._mix()}); epoch {obj['epoch']} resumes after {obj['sample_in_epoch']:,} rows "
                "of a different order",
                file=sys.stderr,
                flush=True,
            )
        super().load_state_dict(obj)

    def _mix(self) -> list[list[int]]:
        """Rows and rows per epoch of each stream."""
        return [
            [int(rows), int(stream.choose)] for rows, stream in zip(self.samples_per_stream, self.streams, strict=True)
        ]
