"""Divide the sources into parts, which are converted independently.

A part is a list of slices of files: of text (plain or compressed) a range of bytes, of parquet a range of row groups,
of Arrow a range of record batches, of CSV and TSV every n-th record, of an archive or a data set on the hub every n-th
member or file. The division depends on the files only, so that the
output does not depend on the number of processes or machines.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.corpus.arrow_files import arrow_sizes
from electra_composer.corpus.files import TABLES, compression_of, format_of
from electra_composer.corpus.sources import DOCSTRINGS, HUB, Source, Sources, open_hub

# Each part has its own shards, of about half the size of its text. A killed conversion loses the parts in progress.
PARTS = 64  # approximate number of parts, if their sizes are within the limits
MIN_PART, MAX_PART = 2 << 20, 1 << 27  # bytes of text
MAX_SLICES = 16  # of a compressed file, which is decompressed from its start for each slice
_TAR_RATIO = 4  # text to compressed archive; a rough guess suffices to choose the number of slices


class Slice(NamedTuple):
    """A range of one file.

    Text: bytes `begin` to `end` of the uncompressed content; :func:`readers.slice_lines` says which slice has a
    document on a border. Parquet, Arrow: row groups, record batches. CSV, TSV, archive, hub: records, members or files
    number `begin`, `begin + end`, ….
    """

    path: str
    begin: int = 0
    end: int | None = None  # None: to the end


class Part(NamedTuple):
    """Unit of work of one process."""

    source: int  # index into Sources.sources
    copy: int  # a source with a weight above 1 has several copies of each part
    slices: tuple[Slice, ...]


def list_parts(sources: Sources, docstrings: list[str]) -> list[Part]:
    """Return the parts of the first copy of all sources, in the order of the sources and of their files.

    Args:
        sources: checked by :func:`check_sources`.
        docstrings: files of the source `docstrings`.

    Raises:
        UserError: a data set cannot be read from the hub.
    """
    files: list[list[tuple[str, float]]] = []  # by source: path and bytes of text
    for source in sources.sources:
        paths = docstrings if source.path == DOCSTRINGS else [] if source.path == HUB else source.files
        files.append([(path, _text_size(path)) for path in paths])
    total = sum(size for found in files for _, size in found)
    target = min(max(total / PARTS, MIN_PART), MAX_PART)
    parts = []
    for number, (source, found) in enumerate(zip(sources.sources, files, strict=True)):
        if source.path == HUB:
            parts += [Part(number, 0, (piece,)) for piece in _hub_slices(source)]
        else:
            slices = [piece for path, size in found for piece in _slices(path, size, target, source)]
            parts += [Part(number, 0, group) for group in _groups(slices, target)]
    return parts


def interleave(parts: list[Part], sources: Sources) -> list[Part]:
    """Return the parts of all copies in the order of their numbers, each source evenly spread over it."""
    placed: list[tuple[float, Part]] = []
    for number, source in enumerate(sources.sources):
        mine = [part for part in parts if part.source == number]
        copies = [part._replace(copy=copy) for copy in range(math.ceil(source.weight)) for part in mine]
        placed += [((index + 0.5) / len(copies), part) for index, part in enumerate(copies)]
    return [part for _, part in sorted(placed, key=lambda place: place[0])]


def _groups(slices: list[tuple[Slice, float]], target: float) -> list[tuple[Slice, ...]]:
    """Group adjacent slices up to about the size of a part: a corpus may consist of millions of small files."""
    groups: list[tuple[Slice, ...]] = []
    group: list[Slice] = []
    size = 0.0
    for piece, length in slices:
        group.append(piece)
        size += length
        if size >= 0.75 * target:
            groups.append(tuple(group))
            group, size = [], 0.0
    return [*groups, tuple(group)] if group else groups


def _text_size(path: str) -> float:
    """Estimate the bytes of text in a file, if compressed from the compression ratio of its first megabyte."""
    size = os.path.getsize(path)
    kind, codec = format_of(path), compression_of(path)
    if kind == ".tar":
        return size if path.lower().endswith(".tar") else size * _TAR_RATIO
    if codec is None or size < MIN_PART // 16:  # too small to measure the ratio
        return size if codec is None else 3.0 * size
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    return size * _uncompressed(head, codec) / len(head)


def _uncompressed(head: bytes, codec: str) -> int:
    """Return the uncompressed size of the start of a compressed file; its own size if it is not compressed."""
    length = 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(head), codec) as stream:
            while data := stream.read(1 << 16):
                length += len(data)
    except (OSError, EOFError):  # truncated, as expected; a corrupt file is reported when it is read
        pass
    return length or len(head)


def _slices(path: str, size: float, target: float, source: Source) -> list[tuple[Slice, float]]:
    """Divide a file into slices of about the size of a part, and return each with its size."""
    kind = format_of(path)
    count = max(1, round(size / target))
    if kind == ".parquet":
        return _group_slices(path, _parquet_sizes(path, source.text_column), target)
    if kind == ".arrow":
        return _group_slices(path, arrow_sizes(path, source.text_column), target)
    if kind == ".tar" or kind in TABLES:
        count = min(count, MAX_SLICES)
        return [(Slice(path, index, count), size / count) for index in range(count)]
    if kind == ".txt" and source.txt_documents == "file":
        count = 1
    if compression_of(path) is not None:
        count = min(count, MAX_SLICES)
    length = math.ceil(size / count)
    ends: list[int | None] = [length * index for index in range(1, count)]
    begins = [0, *ends]
    return [(Slice(path, begin or 0, end), size / count) for begin, end in zip(begins, [*ends, None], strict=True)]


def _parquet_sizes(path: str, column: str) -> list[int]:
    """Return the bytes of a column in each row group; nothing if the file cannot be read or has no such column."""
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):  # reported when the file is read
        return []
    names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    if column not in names:
        return []
    index = names.index(column)
    return [metadata.row_group(group).column(index).total_uncompressed_size for group in range(metadata.num_row_groups)]


def _group_slices(path: str, sizes: list[int], target: float) -> list[tuple[Slice, float]]:
    slices: list[tuple[Slice, float]] = []
    begin, size = 0, 0.0
    for end, length in enumerate(sizes, 1):
        size += length
        if size >= 0.75 * target or end == len(sizes):
            slices.append((Slice(path, begin, end), size))
            begin, size = end, 0.0
    return slices or [(Slice(path), 0.0)]


def _hub_slices(source: Source) -> list[Slice]:
    count = max(1, open_hub(source).num_shards)
    return [Slice(HUB, index, count) for index in range(count)]
