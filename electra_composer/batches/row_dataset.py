"""Batches of rows out of a folder of shards: Streaming's order, resuming and fetching; our reading and collation."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import Stream, StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader
from streaming.base.shared import SharedMemory
from streaming.base.util import retry
from streaming.base.world import World

from electra_composer.batches.row_reader import RowReader, Rows
from electra_composer.batches.shared_memory import all_shared_memory, choosing_a_prefix, release, shared_memory_of
from electra_composer.batches.stale_memory import own
from electra_composer.batches.streams import Folder
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.storage.object_store import download_whole, explain
from electra_composer.storage.shard_folder import HASH

log = logging.getLogger(__name__)

Batch = dict[str, Any]
COLUMNS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")  # of a batch
MIX = "rows_of_streams"  # in the state of a loader
PICKS = 1_000_000  # of a stream of which a part is taken; Streaming draws them one by one


def stream_of(folder: Folder, split: str) -> Stream:
    """One split of a folder as Streaming reads it."""
    kind = _RemoteStream if folder.remote is not None else _FolderStream
    return kind(local=folder.path, remote=folder.remote, split=split, **folder.weight)


class _RemoteStream(Stream):
    """A cache whose files are whole as soon as they have their names: readers look for nothing else."""

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        remote = os.path.join(self.remote, self.split, from_basename)
        local = os.path.join(self.local, self.split, to_basename or from_basename)
        retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)(
            lambda: download_whole(self._downloader, remote, local, self.download_timeout)
        )()
        return local


class _FolderStream(Stream):
    """Shards that are no cache of a remote: they do not count for its limit (and are not evicted, see RowDataset)."""

    present = 0  # bytes of shards

    def get_index_size(self) -> int:
        return 0

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        super().set_up_local(shards, cache_usage_per_shard)
        self.present = int(cache_usage_per_shard.sum())

    def prepare_shard(self, shard: Reader) -> int:
        super().prepare_shard(shard)
        return 0


class RowDataset(StreamingDataset):
    """One split of one or several folders of shards: an iterable of its rows' numbers, and what makes batches of them.

    Args:
        streams: of :func:`stream_of`; rows are numbered through in their order.
        config: how shards of a remote are fetched and kept.
        batch_size: rows per device; Streaming deals whole batches to the loader's workers by it.
        shuffle, seed: order of the rows; a new one in each epoch.
        max_seq_length: width of the batches.
        pad_id: id of `[PAD]`.
        epoch_size: rows of all streams in an epoch; None: as many as they hold, or as their weights say.
        batching_method: how the streams are put in batches, see config.py.
        full_batches: an epoch is as many global batches as its rows fill, on any number of processes. Streaming gives
            all processes as many rows by repeating some, which may make one batch more than on one process.

    Streaming keeps what a data set shares with its workers open until the process ends, and every further data set
    opens all of that again, to see that it is in use: a process that builds many (a notebook, the tests) runs out of
    file descriptors. Here the one goes with the data set, the other at once.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        config: ShardsConfig,
        batch_size: int,
        shuffle: bool,
        seed: int,
        max_seq_length: int,
        pad_id: int,
        epoch_size: int | None = None,
        batching_method: str = "random",
        full_batches: bool = False,
    ) -> None:
        self._max_seq_length, self._pad_id = max_seq_length, pad_id
        self._full_batches = full_batches
        self._is_remote = any(stream.remote is not None for stream in streams)
        self._reader: RowReader | None = None
        self._ahead: _FetchAhead | None = None
        with choosing_a_prefix():
            before = all_shared_memory()
            super().__init__(
                streams=streams,
                batch_size=batch_size,
                shuffle=shuffle,
                shuffle_seed=seed,
                epoch_size=epoch_size,
                batching_method=batching_method,
                num_canonical_nodes=config.num_canonical_nodes,
                predownload=config.predownload,
                cache_limit=config.cache_limit,
                download_retry=config.download_attempts,
                download_timeout=config.download_timeout,
                validate_hash=HASH,
            )
            # The client that fetched the indices has connections, which processes that are forked would all talk over.
            for stream in streams:
                stream._downloader.clean_up()
            mine = shared_memory_of(self)
            release([block for block in all_shared_memory() if block not in before + mine])
            if World.detect().is_local_leader:
                weakref.finalize(self, own(self._shm_prefix_int).close)
        self._release_with_me(mine)
        # Read at the start of an epoch. One pick a row would take a minute for a hundred million of them.
        self.sampling_granularity = max(1, int(self.samples_per_stream.max()) // PICKS)
        self._is_cache = np.array([stream.remote is not None for stream in streams])[self.stream_per_shard]
        if self._unique_rank_world.is_local_leader:
            self.cache_usage -= sum(stream.present for stream in streams if isinstance(stream, _FolderStream))

    def _evict_coldest_shard(self) -> None:
        """Make room in the cache. Streaming's own takes any shard, those of a folder that is no cache too."""
        local = self._shard_states.numpy() == _ShardState.LOCAL
        candidates = np.flatnonzero(local & self._is_cache)
        if not len(candidates):
            raise ValueError("no shard of a remote is here that could make room; raise data.cache_limit")
        self._evict_shard(int(candidates[np.argmin(self._shard_access_times.numpy()[candidates])]))

    def __iter__(self) -> Iterator[int]:
        """The numbers of this worker's rows in one epoch, from where the loader's state says.

        :meth:`collate` reads what they stand for, a batch at a time. Shards that are not on this machine are fetched
        ahead, and breaking off ends that.
        """
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        epoch, sample_in_epoch = self._resume_incr_epoch()
        numbers = self._get_work(epoch, sample_in_epoch)
        numbers = numbers[numbers >= 0]  # Streaming fills the last rank's share up with -1
        if self._full_batches:
            world = self._parallel_worker_world
            assert self.batch_size is not None
            left = len(self) // self.batch_size - sample_in_epoch // (self.batch_size * world.num_ranks)
            mine = len(range(world.worker_of_rank, left, world.workers_per_rank))  # batches go to the workers in turn
            numbers = numbers[: mine * self.batch_size]
        ahead = None
        if self._is_remote and len(numbers):
            ahead = self._ahead = _FetchAhead(self, numbers)
        try:
            yield from numbers.tolist()
        finally:
            if ahead is not None:
                ahead.stop()

    def __len__(self) -> int:
        """Rows of an epoch for each process."""
        if not self._full_batches:
            return int(super().__len__())
        assert self.batch_size is not None
        return int(self.epoch_size) // (self.batch_size * self._parallel_rank_world.num_ranks) * self.batch_size

    def collate(self, numbers: Sequence[int]) -> dict[str, Any]:
        """A batch of rows by their numbers; see :func:`collate_rows` for what :class:`RowLoader` makes of it."""
        if self._reader is None:  # in the worker that uses it
            self._reader = RowReader(self.shards, self._wait_for_shard)
        rows = self._reader.read(np.asarray(numbers, np.int64))
        if self._ahead is not None:
            self._ahead.position += len(numbers)
        packed = collate_rows(rows, self._max_seq_length, self._pad_id)
        num_tokens = int(rows.row_lengths.sum())
        return {"packed": torch.from_numpy(packed), "num_tokens": num_tokens, "rows": [int(row) for row in numbers]}

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Streaming's, for which a shard that could not be fetched is on its way for ever, and who wants it waits.

        It may also leave the cache locked. Here the next one tries again, and has an error of its own.
        """
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            lock = self._cache_filelock
            if not lock.is_locked:
                lock.acquire()
            self._shard_states[shard_id] = _ShardState.REMOTE if self._is_cache[shard_id] else _ShardState.LOCAL
            lock.release()
            raise

    def _wait_for_shard(self, shard: int) -> None:
        """Fetch or unpack a shard, or wait for whoever is at it; it may have failed, and the shard not be there then.

        Raises:
            UserError: it is not there, not what was written (by its hash), or its server does not answer.
        """
        try:
            self.prepare_shard(shard)
        except Exception as error:  # every storage client has errors of its own
            stream = self.streams[self.stream_per_shard[shard]]
            name = self.shards[shard].raw_data.basename
            where = stream.local if stream.remote is None else stream.remote
            raise UserError(
                f"{where}/{stream.split}/{name}: the shard cannot be fetched or unpacked: "
                f"{explain(error, where)}; the same command goes on from the last checkpoint once it can"
            ) from error

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's, with what its place refers to. Between two epochs, where it would name the one that is over, it
        names the next one.
        """
        state = {**super().state_dict(num_samples, from_beginning), MIX: self._mix()}
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Streaming's. Goes on at the same place in another order if the data is another, and says so."""
        if obj.get(MIX, self._mix()) != self._mix() and self._unique_rank_world.is_local_leader:
            print(
                f"warning: the checkpoint's data is not this run's (rows there, in an epoch: {obj[MIX]}; now: "
                f"{self._mix()}); its epoch {obj['epoch']} goes on after {obj['sample_in_epoch']:,} rows of another "
                "order",
                file=sys.stderr,
                flush=True,
            )
        super().load_state_dict(obj)
        if hasattr(self, "_resume_shm"):
            self._release_with_me([self._resume_shm])

    def _mix(self) -> list[list[int]]:
        """Of each stream, its rows and how many of them are in an epoch."""
        return [
            [int(rows), int(stream.choose)] for rows, stream in zip(self.samples_per_stream, self.streams, strict=True)
        ]

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """As Streaming's, which opens the block with the state once more each time that it is asked, and keeps it open.

        It is asked at each epoch and each checkpoint: a run that was resumed would run out of file descriptors.
        """
        if not hasattr(self, "_resume_shm"):
            return super()._resume(world, epoch)
        before = all_shared_memory()
        place: tuple[int, int] = super()._resume(world, epoch)
        release([block for block in all_shared_memory() if block not in before])
        return place

    def _release_with_me(self, blocks: list[SharedMemory]) -> None:
        finalizer = weakref.finalize(self, release, blocks, os.getpid())
        finalizer.atexit = False  # Streaming's part


class _FetchAhead:
    """Fetches the shards of an epoch in the order of their first row, so many rows ahead of the reader.

    What it cannot fetch, the reader tries again when it gets there, and has the error if it still fails.

    Args:
        dataset: whose `prepare_shard` it calls, and whose `predownload` is how many rows it may be ahead.
        numbers: the rows that will be read.

    Attributes:
        position: how many of them have been read.
    """

    def __init__(self, dataset: RowDataset, numbers: NDArray[np.int64]) -> None:
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
            except ReferenceError:  # the data set is gone
                return
            except Exception as error:  # every storage client has errors of its own
                log.info(f"shard {shard} could not be fetched ahead: {error}")


class RowLoader(StreamingDataLoader):
    """A `StreamingDataLoader` of :class:`RowDataset`.

    The four tensors of a batch come from the worker as one, and the rows' numbers as a list, since each tensor costs a
    file descriptor and system calls.

    Its workers end at once when nothing refers to it any more:
    Composer's objects refer to each other in circles. When the garbage collector breaks one up, it closes the queues to
    the workers before it tells the workers to end, and PyTorch then waits five seconds for each of them in vain.
    """

    def __iter__(self) -> Iterator[Batch]:
        """Batches of int64 tensors `[rows, max_seq_length]`, `num_tokens`, and `rows`, int64 `[rows]`: their numbers in
        the split, by which a batch can be found again. See :func:`collate_rows`."""
        for batch in super().__iter__():
            columns = dict(zip(COLUMNS, batch["packed"], strict=True))
            yield {**columns, "num_tokens": batch["num_tokens"], "rows": torch.tensor(batch["rows"])}

    def _get_batch_size(self, batch: Any) -> int:
        return int(batch["packed"].shape[1])

    def _get_iterator(self) -> Any:
        iterator = super()._get_iterator()
        if self.num_workers > 0:
            weakref.finalize(self, iterator._shutdown_workers)  # which keeps the iterator, and so its queues, alive
        return iterator


def collate_rows(rows: Rows, max_seq_length: int, pad_id: int = 0) -> NDArray[np.int64]:
    """Rows of whole examples to a padded batch.

    Args:
        rows: of :class:`RowReader`.
        max_seq_length: width of the batch, whatever the rows' lengths: one shape for compiled code.
        pad_id: id of `[PAD]`.

    Returns:
        int64 `[4, rows, max_seq_length]`, :data:`COLUMNS`: `input_ids`; `token_type_ids`, 0 in A and 1 in B;
        `position_ids`, from 0 in every example; `sequence_ids`, 0 = padding, 1… = which example of the row.

    Raises:
        UserError: segment lengths that do not add up to the ids, as in a corrupt shard.
    """
    segment_lengths = rows.segment_lengths.astype(np.int64)
    example_lengths = segment_lengths.reshape(-1, 2).sum(1)
    first_examples = np.cumsum(rows.examples_per_row) - rows.examples_per_row  # index of each row's first example
    sums = np.add.reduceat(example_lengths, first_examples)
    if (sums != rows.row_lengths).any() or rows.row_lengths.max() > max_seq_length:
        raise UserError(
            f"a row of the shards is corrupt: its examples do not add up to its tokens, or these are more than "
            f"{max_seq_length}; copy the shards again or make them anew"
        )

    # One value for each token of the batch, row after row; then all are put in their places at once.
    num_rows, num_tokens = len(rows.row_lengths), len(rows.input_ids)
    num_examples = len(example_lengths)
    example_of_row = np.arange(num_examples) - np.repeat(first_examples, rows.examples_per_row) + 1
    starts = np.cumsum(example_lengths) - example_lengths
    of_example = np.stack([starts, example_of_row]).repeat(example_lengths, axis=1)  # [2, tokens]
    packed = np.zeros((4, num_rows * max_seq_length), np.int64)
    packed[0] = pad_id
    places = np.flatnonzero(np.arange(max_seq_length) < rows.row_lengths[:, None])
    packed[0, places] = rows.input_ids
    packed[1, places] = np.tile(np.array([0, 1]), num_examples).repeat(segment_lengths)
    packed[2, places] = np.arange(num_tokens) - of_example[0]
    packed[3, places] = of_example[1]
    return packed.reshape(4, num_rows, max_seq_length)
