"""Read rows from MDS shards, one batch at a time.

Shards stay memory-mapped. The headers of a shard's rows are decoded together when it is opened, since a shuffled batch
has few rows of each shard. The format is Streaming's (`format/mds`), unchanged.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from streaming import LocalDataset
from streaming.base.format.mds.reader import MDSReader

from electra_composer.errors import UserError

_PLACES = np.arange(4)  # byte offsets within a length
OPEN_SHARDS = 64  # at most; each needs a file descriptor. A shuffled epoch reads about 16 large ones at a time


ROWS_AT_ONCE = 2**14  # whose headers are decoded together


class Rows(NamedTuple):
    """Concatenated rows, the input of :func:`electra_composer.batches.collation.collate_rows`."""

    input_ids: NDArray[np.integer]  # [tokens of all rows]
    row_lengths: NDArray[np.int64]  # [rows]
    segment_lengths: NDArray[np.uint16]  # [2 × examples of all rows]
    examples_per_row: NDArray[np.int64]  # [rows]


def reader_of_split(path: str, split: str) -> RowReader | None:
    """Return a reader of a local split; None if some shards are missing (still in an object store) or compressed."""
    shards = LocalDataset(local=path, split=split).shards
    reader = RowReader(shards, _vanished)
    return reader if all(os.path.isfile(reader.name(shard)) for shard in range(len(shards))) else None


def _vanished(shard: int) -> None:
    raise UserError(f"shard {shard} was deleted while being read; copy the shards again or recreate them")


# Workaround (streaming 0.13): MDSReader opens the shard's file for every sample and decodes it column by column, about
# 100 µs per row; goes when it reads many samples at once.
class RowReader:
    """Reads rows by their numbers in a list of shards.

    Args:
        shards: Streaming's readers, in row order, with the columns described in `shard_folder.py`.
        prepare: called with a shard's number when its file is missing; should return once it exists.
        fetched: True for shards of a remote, for which `prepare` is called before they are opened in any case: their
            file may be there and not checked yet.

    Attributes:
        rows: total number of rows.
    """

    def __init__(
        self, shards: list[MDSReader], prepare: Callable[[int], None], fetched: Sequence[bool] | None = None
    ) -> None:
        self._shards = shards
        self._prepare = prepare
        self._fetched = [False] * len(shards) if fetched is None else fetched
        self._samples = np.array([shard.samples for shard in shards])
        self._ends = np.cumsum(self._samples)
        self.rows = int(self._ends[-1])
        self._open: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.uint32]]] = OrderedDict()
        self._id_dtype = np.dtype(shards[0].column_encodings[0].removeprefix("ndarray:"))
        expected = ["input_ids", "segment_lengths"], [f"ndarray:{self._id_dtype.name}", "ndarray:uint16"]
        for number, shard in enumerate(shards):
            found = shard.column_names, shard.column_encodings
            if self._id_dtype not in ("uint16", "uint32") or found != expected:
                raise UserError(
                    f"{self.name(number)}: its columns are {dict(zip(*found, strict=True))}, those of "
                    f"{self.name(0)} {dict(zip(*expected, strict=True))}; expected ids of uint16 or uint32, the "
                    "same in all shards; recreate the shards"
                )

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """Read rows, in the order of `numbers`.

        Raises:
            UserError: a shard is corrupt.
        """
        shards = np.searchsorted(self._ends, numbers, side="right")
        firsts = self._ends[shards] - self._samples[shards]
        ids, segments = [], []
        for shard, row in zip(shards.tolist(), (numbers - firsts).tolist(), strict=True):
            data, places = self._open.get(shard) or self._map(shard)
            begin, middle, end, last = places[row].tolist()
            ids.append(data[begin:middle])
            segments.append(data[end:last])
        if len(self._open) > 1:
            self._forget(set(shards.tolist()))
        return Rows(
            np.concatenate(ids).view(self._id_dtype),
            np.array([len(row) for row in ids], np.int64) // self._id_dtype.itemsize,
            np.concatenate(segments).view(np.uint16),
            np.array([len(row) for row in segments], np.int64) // 4,
        )

    def _forget(self, used: set[int]) -> None:
        """Mark these shards as used last, and close those unused for longest, down to :data:`OPEN_SHARDS`."""
        for shard in used:
            self._open.move_to_end(shard)
        while len(self._open) > max(OPEN_SHARDS, len(used)):
            self._open.popitem(last=False)

    def _map(self, shard: int) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Map a shard into memory; return its bytes and the :meth:`_places` of its rows."""
        if self._fetched[shard]:
            self._prepare(shard)
        while True:
            try:
                data = np.asarray(np.memmap(self.name(shard), np.uint8, "r"))
                break
            except FileNotFoundError:
                self._prepare(shard)
            except ValueError as error:  # an empty file
                raise self._corrupt(shard) from error
        samples = self._shards[shard].samples
        if len(data) < 4 * (samples + 2) or int(data[:4].view("<u4")[0]) != samples:
            raise self._corrupt(shard)
        offsets = data[4 : 4 * (samples + 2)].view("<u4").astype(np.int64)
        places = np.empty((samples, 4), np.uint32)
        for first in range(0, samples, ROWS_AT_ONCE):
            part = offsets[first : first + ROWS_AT_ONCE + 1]
            places[first : first + ROWS_AT_ONCE] = self._places(shard, data, part[:-1], part[1:])
        self._open[shard] = data, places
        return data, places

    def _places(
        self, shard: int, data: NDArray[np.uint8], begins: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return where the values of some samples are, `[rows, 4]`: begin and end of the ids, of the segment lengths.

        A sample is the sizes of its two columns, four bytes each, followed by the columns. A column is one byte
        (4 × number of dimensions + code of the shape's type), the shape, and the values.

        Raises:
            UserError: the bytes are not that.
        """
        if (ends - begins < 8).any() or ends.max(initial=0) > len(data):
            raise self._corrupt(shard)
        sizes = data[begins[:, None] + np.arange(8)].view("<u4").astype(np.int64)
        first = begins + 8
        second = first + sizes[:, 0]
        columns = np.stack([first, second], axis=1)
        if (second + sizes[:, 1] != ends).any() or (sizes < 3).any() or (columns >= ends[:, None]).any():
            raise self._corrupt(shard)
        heads = data[np.minimum(columns[:, :, None] + np.arange(5), len(data) - 1)].astype(np.int64)
        shape_bytes = 1 << (heads[:, :, 0] & 3)
        starts, lasts = columns + 1 + shape_bytes, columns + sizes
        lengths = np.where(shape_bytes[:, :, None] > _PLACES, heads[:, :, 1:] << 8 * _PLACES, 0).sum(2)
        if (
            (heads[:, :, 0] >> 2 != 1).any()
            or (shape_bytes > 4).any()
            or (lasts - starts != lengths * (self._id_dtype.itemsize, 2)).any()
            or (lengths < 1).any()
            or (lengths[:, 1] % 2 != 0).any()
        ):
            raise self._corrupt(shard)
        return np.stack([starts, lasts], axis=2).reshape(-1, 4)

    def name(self, shard: int) -> str:
        """Return the path of a shard's file, whether or not it exists."""
        reader = self._shards[shard]
        return os.path.join(reader.dirname, reader.split, reader.raw_data.basename)

    def _corrupt(self, shard: int) -> UserError:
        return UserError(f"{self.name(shard)}: the shard is corrupt; copy the shards again or recreate them")
