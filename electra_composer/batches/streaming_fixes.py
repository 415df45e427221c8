"""Streaming's `Stream` and `StreamingDataset` with the faults of version 0.13 repaired."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.shared import SharedMemory
from streaming.base.util import retry
from streaming.base.world import World

from electra_composer.batches.shared_memory import exclusive_prefix, release, release_new_blocks, shared_memory_of
from electra_composer.batches.stale_memory import mark_in_use
from electra_composer.storage.object_store import download_atomically
from electra_composer.storage.shard_folder import HASH

PICKS = 1_000_000  # approximate maximum per stream and epoch


class RemoteStream(Stream):
    """Stream of an object store; `local` is its cache."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._hashes: dict[str, str] = {}  # of the shards' files

    # Workaround (streaming 0.13): GCSDownloader writes under the final name, where readers find partial files. A file
    # with a wrong hash keeps its name, and the next reader does not check it again. `_download_file`,
    # `_prepare_shard_part` and `_downloader` are private. Goes when files are checked and then renamed.
    def _prepare_shard_part(self, raw_info: FileInfo, zip_info: FileInfo | None = None, *args: Any) -> int:
        for info in (raw_info, zip_info):
            if info is not None and HASH in info.hashes:
                self._hashes[info.basename] = info.hashes[HASH]
        return int(super()._prepare_shard_part(raw_info, zip_info, *args))

    def _check(self, name: str, path: str) -> None:
        if name in self._hashes:
            with open(path, "rb") as file:
                if get_hash(HASH, file.read()) != self._hashes[name]:
                    raise ValueError(f"checksum failure: {name}")

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        remote = os.path.join(self.remote, self.split, from_basename)
        local = os.path.join(self.local, self.split, to_basename or from_basename)
        retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)(
            lambda: download_atomically(
                self._downloader, remote, local, self.download_timeout, lambda path: self._check(from_basename, path)
            )
        )()
        return local


# Workaround (streaming 0.13): StreamingDataset counts the files of streams without a remote towards `cache_limit`. Such
# a stream reports sizes of zero, except from `set_up_local`, where zero would mean that a shard is missing: the dataset
# subtracts `present`. Goes when only remote streams are counted.
class FolderStream(Stream):
    """Stream of a local folder, which does not count towards `cache_limit` and is never evicted.

    Attributes:
        present: bytes of shards.
    """

    present = 0

    def get_index_size(self) -> int:
        return 0

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        super().set_up_local(shards, cache_usage_per_shard)
        self.present = int(cache_usage_per_shard.sum())

    def prepare_shard(self, shard: Reader) -> int:
        super().prepare_shard(shard)
        return 0


class FixedStreamingDataset(StreamingDataset):
    """StreamingDataset that releases its resources, survives failed downloads and keeps local shards.

    Args:
        streams: each a :class:`RemoteStream` or a :class:`FolderStream`.
        options: of StreamingDataset.
    """

    def __init__(self, streams: Sequence[Stream], **options: Any) -> None:
        with exclusive_prefix():
            # Workaround (streaming 0.13): a dataset keeps its shared memory open until the process exits, and each
            # further dataset opens the blocks of all others to find a free name and keeps those open too. A process
            # that builds many datasets (a notebook, the tests) runs out of file descriptors. Goes when datasets have a
            # close method.
            with release_new_blocks(keep=lambda: shared_memory_of(self)):
                super().__init__(streams=streams, **options)
            # Workaround (streaming 0.13): the client that fetched the indices stays open in the private `_downloader`;
            # forked loader workers would all talk over its connections. Goes when downloaders close after the index.
            for stream in streams:
                stream._downloader.clean_up()
            if World.detect().is_local_leader:
                weakref.finalize(self, mark_in_use(self._shm_prefix_int).close)
        self._release_with_self(shared_memory_of(self))
        # Workaround (streaming 0.13): get_sampling loops in Python over its picks, by default one per row: a minute
        # for 100 million rows. It reads this attribute at the start of an epoch. Goes when it is vectorised.
        self.sampling_granularity = max(1, int(self.samples_per_stream.max()) // PICKS)
        self._is_cache = np.array([stream.remote is not None for stream in streams])[self.stream_per_shard]
        if World.detect().is_local_leader:
            self.cache_usage -= sum(stream.present for stream in streams if isinstance(stream, FolderStream))

    # Workaround (streaming 0.13): _evict_coldest_shard also deletes shards of streams without a remote, which cannot be
    # fetched again; it and `_evict_shard`, `_shard_states`, `_shard_access_times` are private. Goes when only shards of
    # remote streams are evicted.
    def _evict_coldest_shard(self) -> None:
        """Evict the least recently used shard of a remote stream."""
        local = self._shard_states.numpy() == _ShardState.LOCAL
        candidates = np.flatnonzero(local & self._is_cache)
        if not len(candidates):
            raise ValueError("no shard of a remote stream can be evicted to make room; raise data.cache_limit")
        self._evict_shard(int(candidates[np.argmin(self._shard_access_times.numpy()[candidates])]))

    # Workaround (streaming 0.13): when a download fails, prepare_shard leaves the shard in the state PREPARING, for
    # which other workers wait for ever, and may leave the cache locked (`_shard_states`, `_cache_filelock`, private).
    # Goes when prepare_shard restores the state itself.
    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Same as StreamingDataset, except that a shard that failed is tried again by the next caller."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            lock = self._cache_filelock
            if not lock.is_locked:
                lock.acquire()
            self._shard_states[shard_id] = _ShardState.REMOTE if self._is_cache[shard_id] else _ShardState.LOCAL
            lock.release()
            raise

    # Workaround (streaming 0.13): between two epochs state_dict names the finished epoch, which a resumed run would
    # train again; goes when it names the next one.
    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Same as StreamingDataset, except that between two epochs the state names the next epoch."""
        state: dict[str, Any] = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state

    # Workaround (streaming 0.13): the block that holds a loaded state (`_resume_shm`, private) stays open until the
    # process exits; goes when datasets have a close method.
    def load_state_dict(self, obj: dict[str, Any]) -> None:
        super().load_state_dict(obj)
        if hasattr(self, "_resume_shm"):
            self._release_with_self([self._resume_shm])

    # Workaround (streaming 0.13): once a state is loaded, _resume (private) opens its shared memory block again at each
    # epoch and each checkpoint and keeps it open; a resumed run would run out of file descriptors. Goes when it closes
    # the block.
    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        if not hasattr(self, "_resume_shm"):
            return super()._resume(world, epoch)
        with release_new_blocks():
            place: tuple[int, int] = super()._resume(world, epoch)
        return place

    def _release_with_self(self, blocks: list[SharedMemory]) -> None:
        """Release blocks when this dataset is garbage-collected."""
        finalizer = weakref.finalize(self, release, blocks, os.getpid())
        finalizer.atexit = False  # Streaming releases them at exit
