"""Read the texts of a slice of a source: parquet, Arrow, JSON Lines, CSV, plain text, archives, the Hugging Face Hub.

Every reader yields pairs `(text, invalid)`; `invalid` texts held bytes that are not UTF-8, which are read as U+FFFD.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.corpus.arrow_files import arrow_batches
from electra_composer.corpus.columns import TEXT, column_of, column_path, nested_value
from electra_composer.corpus.delimited import chosen_column, read_delimited
from electra_composer.corpus.files import TABLES, UnreadableFile, format_of, open_lines, reason_of
from electra_composer.corpus.source_parts import Slice
from electra_composer.corpus.sources import HUB, Source, Sources, hub_name, open_hub
from electra_composer.errors import UserError

Texts = Iterator[tuple[str, bool]]

_PARQUET_BATCH = 1000  # rows held at a time
_SKIP_BYTES = 1 << 20


def read_slice(piece: Slice, source: Source, lines: Iterable[bytes] | None = None) -> Texts:
    """Yield the texts of one slice of a source, empty ones included.

    Args:
        lines: of the file, if it is open already.

    Raises:
        UserError: the text column is missing or holds something else; reading from the hub failed.
        UnreadableFile: the file cannot be read.
    """
    if piece.path == HUB:
        yield from _read_hub(source, piece)
        return
    path, kind = piece.path, format_of(piece.path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(piece, source.text_column)
        elif kind == ".arrow":
            batches = itertools.islice(arrow_batches(path), piece.begin, piece.end)
            yield from _read_batches(batches, path, source.text_column)
        elif kind == ".tar":
            with open(path, "rb") as archive:
                yield from _read_tar(archive, piece)
        elif kind == ".txt":
            lines = slice_lines(piece, source.txt_documents == "blank") if lines is None else lines
            yield from _read_txt(lines, source.txt_documents)
        elif kind in TABLES:
            lines = slice_lines(Slice(path), False) if lines is None else lines
            every = slice(piece.begin, None, piece.end)
            texts = read_delimited(path, lines, kind == ".csv", source.text_column, every)
            yield from map(_decode, texts)
        else:
            lines = slice_lines(piece, False) if lines is None else lines
            yield from _read_json_lines(path, piece.begin, lines, source.text_column)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise UnreadableFile(f"{path}: cannot be read as {kind}: {reason_of(error)}") from error


def describe_columns(sources: Sources) -> Iterator[str]:
    """Yield a line for each source whose first csv or tsv file has its text in a column that the user has not named.

    Raises:
        UserError: there is no such column, or a source cannot be found.
    """
    for source in sources.sources:
        path = next((path for path in source.files if format_of(path) in TABLES), None) if source.is_path else None
        if path is None or source.text_column != TEXT:
            continue
        with contextlib.suppress(UnreadableFile, OSError):  # reported when it is read
            name = chosen_column(path, slice_lines(Slice(path), False), format_of(path) == ".csv")
            if name not in (TEXT, None):
                yield f"{path}: the text is the column {name!r}; --text-column chooses another"


def slice_lines(piece: Slice, by_blank_lines: bool) -> Iterator[bytes]:
    """Yield the lines of a slice of a text file: complete lines, or complete paragraphs separated by blank lines.

    A compressed file cannot be read backwards, so the end of a slice and the beginning of the next follow one rule. A
    slice ends after the line that contains its last byte; by paragraphs, after the first blank line that begins after
    that byte.
    """
    with open_lines(piece.path) as file:
        rest = piece.begin
        while rest and (skipped := file.read(min(rest, _SKIP_BYTES))):
            rest -= len(skipped)
        position, inside = piece.begin, piece.begin == 0
        for line in file:
            start, position = position, position + len(line)
            if start == 0:
                line = without_mark(line, piece.path)
            if inside:
                yield line
            blank = by_blank_lines and not line.strip()
            if _is_border(piece.begin, start, position, by_blank_lines, blank):
                inside = True
            if piece.end is not None and _is_border(piece.end, start, position, by_blank_lines, blank):
                return


def without_mark(begin: bytes, path: str) -> bytes:
    """Return the first bytes of a text file without UTF-8's byte-order mark.

    Raises:
        UnreadableFile: the mark is that of UTF-16.
    """
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableFile(f"{path}: is UTF-16; expected UTF-8: convert it, for example with iconv -f UTF-16")
    return begin.removeprefix(b"\xef\xbb\xbf")


def _is_border(place: int, start: int, end: int, by_blank_lines: bool, blank: bool) -> bool:
    """Return whether the border wanted at byte `place` may be after the line at bytes `start` to `end`."""
    return blank and start > place if by_blank_lines else end > place


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def _read_txt(lines: Iterable[bytes], ends: int | str) -> Texts:
    """Yield documents that end at blank lines, at the end of the file, or after a number of lines that are not blank.

    The last document of a slice may have fewer lines.
    """
    document: list[bytes] = []
    count = 0
    for line in lines:
        blank = not line.strip()
        if ends == "blank" and blank:
            yield _decode(b"".join(document))
            document.clear()
        else:
            document.append(line)
        count += not blank
        if count == ends:
            yield _decode(b"".join(document))
            document.clear()
            count = 0
    yield _decode(b"".join(document))


def _read_tar(archive: IO[bytes], piece: Slice) -> Texts:
    """Yield every .txt of an archive, also of archives in it: OpenWebText's holds .xz archives of documents.

    Members are read in order and never written to disk, so their names are harmless. A slice has every n-th member of
    the outer archive.
    """
    with tarfile.open(fileobj=archive, mode="r|*") as tar:
        for number, member in enumerate(tar):
            if not member.isfile() or (piece.end is not None and number % piece.end != piece.begin):
                continue
            file = tar.extractfile(member)
            assert file is not None  # as member.isfile()
            if member.name.endswith(".txt"):
                yield _decode(file.read())
            elif member.name.endswith((".xz", ".tar")):
                yield from _read_tar(file, Slice(member.name))


def _read_json_lines(path: str, begin: int, lines: Iterable[bytes], column: str) -> Texts:
    after = f" after byte {begin:,}" if begin else ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, invalid = _decode(line)
        where = f"{path}, line {number}{after}"
        record = parse_object(text, where)
        value = nested_value(record, column, where)
        if not isinstance(value, str | None):
            raise UserError(f"{where}: {column!r} is a {type(value).__name__}; expected text")
        yield value or "", invalid


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse a line of a JSON Lines file.

    Args:
        where: file and line, for messages.

    Raises:
        UnreadableFile: it is not JSON.
        UserError: it is not an object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        # the message of a JSONDecodeError has a line number, which is not that of the file
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UnreadableFile(f"{where}: not JSON ({reason}); expected one object per line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, found a {type(record).__name__}")
    return record


def _read_parquet(piece: Slice, column: str) -> Texts:
    with pq.ParquetFile(piece.path) as file:
        column_path(file.schema_arrow, column, piece.path)
        groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
        # One thread: the worker processes already use all cores.
        batches = file.iter_batches(_PARQUET_BATCH, row_groups=groups, columns=[column], use_threads=False)
        yield from _read_batches(batches, piece.path, column)


def _read_batches(batches: Iterable[pa.RecordBatch], where: str, column: str) -> Texts:
    for batch in batches:
        yield from _column_texts(column_of(batch, column_path(batch.schema, column, where)), where, column)


def _column_texts(values: pa.Array, where: str, column: str) -> Texts:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{where}: {column!r} holds {values.type}; expected text")
    # As bytes: parquet does not guarantee UTF-8, and one invalid document must not end the conversion.
    for value in values.cast(pa.large_binary()).to_pylist():
        yield _decode(value or b"")


def _read_hub(source: Source, piece: Slice) -> Texts:
    stream = open_hub(source)
    if piece.end is not None and piece.end > 1:
        stream = stream.shard(num_shards=piece.end, index=piece.begin)
    where = hub_name(source)
    batches = stream.select_columns([source.text_column]).with_format("arrow").iter(_PARQUET_BATCH)
    while True:
        try:
            table = next(batches, None)
        except Exception as error:
            raise UserError(f"{where}: reading from the hub failed: {reason_of(error)}") from error
        if table is None:
            return
        for chunk in table.column(source.text_column).chunks:
            yield from _column_texts(chunk, where, source.text_column)
