"""The documents of a part of the sources: of parquet, JSON lines, plain text, archives, the hub."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.corpus.docstrings import read_docstrings
from electra_composer.corpus.source_parts import Part, Slice
from electra_composer.corpus.sources import (
    DOCSTRINGS,
    HUB,
    Source,
    Sources,
    find_files,
    format_of,
    hub_name,
    missing_column,
    open_hub,
    open_lines,
    reason_of,
)
from electra_composer.errors import UserError

_PARQUET_BATCH = 1000  # rows held at a time
_SKIP_BYTES = 1 << 20


class UnreadableFile(UserError):
    """A file that is cut short, damaged, or not of the kind that its name says."""


class Document(NamedTuple):
    """One document, and what identifies its text."""

    text: str
    size: int  # bytes of UTF-8
    digest: int  # 64 bits of BLAKE2b of the text


@dataclass
class ReadStats:
    """What has been read so far."""

    documents: int = 0
    bytes: int = 0
    invalid: int = 0  # documents with bytes that are not UTF-8, read as U+FFFD
    short: int = 0  # left out by min_characters
    duplicates: int = 0  # left out by deduplicate
    lines: int = 0  # left out by drop_lines
    unreadable: dict[str, str] = field(default_factory=dict)  # file → what was wrong; left out by skip_unreadable


def part_documents(part: Part, sources: Sources, stats: ReadStats) -> Iterator[Document]:
    """The documents of one part in their order; empty ones and those that `sources` leaves out are not among them.

    Deduplication and limits need to know the other parts: they are in selection.py.

    Args:
        stats: counts are added here as documents are given out.

    Raises:
        UserError: a file that is not there, not readable (unless `skip_unreadable`), or without the text column.
    """
    source = sources.sources[part.source]
    for piece in part.slices:
        texts = _read_hub(source, piece, stats) if piece.path == HUB else documents_of_slice(piece, source, stats)
        try:
            yield from kept_documents(texts, sources, stats)
        except UnreadableFile as error:
            if not sources.skip_unreadable:
                raise
            stats.unreadable[piece.path] = str(error)


def read_documents(sources: Sources, stats: ReadStats, workers: int = 1) -> Iterator[str]:
    """All documents one after another, source after source, each once whatever its weight.

    Args:
        workers: processes for parsing docstrings.

    Raises:
        UserError: as :func:`part_documents`; or no document at all.
    """
    seen: set[int] = set()
    before = ReadStats(stats.documents, stats.bytes)
    for number, source in enumerate(sources.sources):
        if source.path == DOCSTRINGS:
            documents = kept_documents(read_docstrings(workers), sources, stats)
        else:
            slices = (Slice(HUB, 0, 1),) if source.path == HUB else tuple(map(Slice, find_files(source.path)))
            documents = part_documents(Part(number, 0, slices), sources, stats)
        for document in documents:
            if sources.deduplicate:
                if document.digest in seen:
                    stats.duplicates += 1
                    continue
                seen.add(document.digest)
            if not_wanted(sources, stats.documents - before.documents, stats.bytes - before.bytes):
                return
            stats.documents += 1
            stats.bytes += document.size
            yield document.text
    if stats.documents == before.documents:
        raise no_text(sources)


def not_wanted(sources: Sources, documents: int, size: int) -> bool:
    """Whether so many documents and bytes are enough; the document that reaches the limit of bytes is the last."""
    enough_documents = sources.max_documents is not None and documents >= sources.max_documents
    return enough_documents or (sources.max_bytes is not None and size >= sources.max_bytes)


def no_text(sources: Sources) -> UserError:
    return UserError(f"no text in {sources}; expected at least one document that is not empty")


def kept_documents(texts: Iterable[str], sources: Sources, stats: ReadStats) -> Iterator[Document]:
    """What is not left out, brought into the form that is asked for."""
    dropped = [re.compile(pattern) for pattern in sources.drop_lines]
    for text in texts:
        if sources.normalize is not None:
            text = unicodedata.normalize(sources.normalize, text)
        if dropped:
            lines = text.split("\n")
            kept = [line for line in lines if not any(pattern.search(line) for pattern in dropped)]
            stats.lines += len(lines) - len(kept)
            text = "\n".join(kept)
        if not text or text.isspace():
            continue
        if len(text) < sources.min_characters:
            stats.short += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair, from a JSON escape
            data = text.encode("utf-8", "replace")
            text = data.decode("utf-8")
            stats.invalid += 1
        digest = hashlib.blake2b(data, digest_size=8).digest()
        yield Document(text, len(data), int.from_bytes(digest, "big"))


def documents_of_slice(
    piece: Slice, source: Source, stats: ReadStats, lines: Iterable[bytes] | None = None
) -> Iterator[str]:
    """Texts of the documents of one slice of a file, empty ones too. `lines`: those of the file, if opened already."""
    path, kind = piece.path, format_of(piece.path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(piece, source.text_column, stats)
        elif kind == ".tar":
            with open(path, "rb") as archive:
                yield from _read_tar(archive, piece, stats)
        elif kind == ".txt":
            ends_with_blank = source.txt_documents == "blank"
            lines = slice_lines(piece, ends_with_blank) if lines is None else lines
            yield from _read_txt(lines, source.txt_documents, stats)
        else:
            lines = slice_lines(piece, False) if lines is None else lines
            yield from _read_json_lines(path, piece.begin, lines, source.text_column, stats)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise UnreadableFile(f"{path}: cannot be read as {kind}: {reason_of(error)}") from error


def slice_lines(piece: Slice, by_blank_lines: bool) -> Iterator[bytes]:
    """The lines of a slice of a text file, in whole lines, or in whole paragraphs that blank lines separate.

    Where a slice ends and the next one begins is said by a rule that both follow, since a compressed file cannot be
    looked at elsewhere: after the line that holds the byte of the border; by paragraphs, after the first blank line
    that begins behind that byte.
    """
    with open_lines(piece.path) as file:
        rest = piece.begin
        while rest and (skipped := file.read(min(rest, _SKIP_BYTES))):
            rest -= len(skipped)
        position, inside = piece.begin, piece.begin == 0
        for line in file:
            start, position = position, position + len(line)
            if start == 0:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise UnreadableFile(f"{piece.path}: is UTF-16; expected UTF-8: convert it, as by iconv -f UTF-16")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if inside:
                yield line
            blank = by_blank_lines and not line.strip()
            if _is_border(piece.begin, start, position, by_blank_lines, blank):
                inside = True
            if piece.end is not None and _is_border(piece.end, start, position, by_blank_lines, blank):
                return


def _is_border(place: int, start: int, end: int, by_blank_lines: bool, blank: bool) -> bool:
    """Whether the border that is wanted at byte `place` may be after the line at bytes `start` to `end`."""
    return blank and start > place if by_blank_lines else end > place


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), True


def _read_txt(lines: Iterable[bytes], ends: Literal["blank", "file"], stats: ReadStats) -> Iterator[str]:
    document: list[bytes] = []

    def take() -> str:
        text, invalid = _decode(b"".join(document))
        stats.invalid += invalid
        document.clear()
        return text

    for line in lines:
        if ends == "blank" and not line.strip():
            yield take()
        else:
            document.append(line)
    yield take()


def _read_tar(archive: IO[bytes], piece: Slice, stats: ReadStats) -> Iterator[str]:
    """Every .txt of an archive is a document. OpenWebText's own archive holds archives (.xz) of them, in any order.

    Members are read one after another and never written to disk, so that their names cannot lead anywhere. Of the outer
    archive's members, every n-th belongs to a slice.
    """
    with tarfile.open(fileobj=archive, mode="r|*") as tar:
        for number, member in enumerate(tar):
            if not member.isfile() or (piece.end is not None and number % piece.end != piece.begin):
                continue
            file = tar.extractfile(member)
            assert file is not None  # of a file it never is
            if member.name.endswith(".txt"):
                text, invalid = _decode(file.read())
                stats.invalid += invalid
                yield text
            elif member.name.endswith((".xz", ".tar")):
                yield from _read_tar(file, Slice(member.name), stats)


def _read_json_lines(path: str, begin: int, lines: Iterable[bytes], column: str, stats: ReadStats) -> Iterator[str]:
    after = f" after byte {begin:,}" if begin else ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, invalid = _decode(line)
        where = f"{path}, line {number}{after}"
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UnreadableFile(f"{where}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found a {type(record).__name__}")
        if column not in record:
            raise missing_column(where, column, list(record))
        stats.invalid += invalid
        yield _as_text(record[column], where, column)


def _as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is a {type(value).__name__}; expected text")
    return value


def _read_parquet(piece: Slice, column: str, stats: ReadStats) -> Iterator[str]:
    with pq.ParquetFile(piece.path) as file:
        if column not in file.schema_arrow.names:
            raise missing_column(piece.path, column, file.schema_arrow.names)
        groups = range(piece.begin, file.num_row_groups if piece.end is None else piece.end)
        # One thread: the processes are the parallelism.
        for batch in file.iter_batches(_PARQUET_BATCH, row_groups=groups, columns=[column], use_threads=False):
            yield from _column_texts(batch.column(0), piece.path, column, stats)


def _column_texts(values: pa.Array, where: str, column: str, stats: ReadStats) -> Iterator[str]:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{where}: {column!r} holds {values.type}; expected text")
    # As bytes, because parquet does not promise UTF-8: one bad document must not end the conversion.
    for value in values.cast(pa.large_binary()).to_pylist():
        text, invalid = _decode(value or b"")
        stats.invalid += invalid
        yield text


def _read_hub(source: Source, piece: Slice, stats: ReadStats) -> Iterator[str]:
    stream = open_hub(source)
    if piece.end is not None and piece.end > 1:
        stream = stream.shard(num_shards=piece.end, index=piece.begin)
    where = hub_name(source)
    batches = stream.select_columns([source.text_column]).with_format("arrow").iter(_PARQUET_BATCH)
    while True:
        try:
            table = next(batches, None)
        except Exception as error:
            raise UserError(f"{where}: reading from the hub broke off: {reason_of(error)}") from error
        if table is None:
            return
        for chunk in table.column(source.text_column).chunks:
            yield from _column_texts(chunk, where, source.text_column, stats)
