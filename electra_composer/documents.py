"""Documents from where people keep them: the hub, parquet, JSON lines, plain text, folders and globs, docstrings."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import lzma
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.docstrings import read_docstrings
from electra_composer.errors import UserError

HUB = "hub"
DOCSTRINGS = "docstrings"
_COMPRESSIONS = (".gz", ".zst")
_FORMATS = (".parquet", ".jsonl", ".json", ".txt")
_TARS = (".tar", ".tar.xz", ".tar.gz", ".tgz")
_PARQUET_BATCH = 1000  # rows held at a time


@dataclass
class Sources:
    """What to read, and how.

    `dataset` etc. are for the source `hub`. OpenWebText's own repository holds a loading script, which `datasets` no
    longer runs; the hub keeps a parquet conversion of such data sets on the branch `refs/convert/parquet`.
    """

    sources: list[str] = field(default_factory=lambda: [HUB])  # hub, docstrings, or paths of files, folders, globs
    dataset: str = "Skylion007/openwebtext"
    config: str | None = None
    revision: str | None = "refs/convert/parquet"
    text_column: str = "text"
    txt_documents: Literal["blank", "file"] = "blank"  # what ends a document in .txt: a blank line, or the file
    min_characters: int = 0  # shorter documents are left out
    deduplicate: bool = False  # leave out documents whose text was there before, to the letter
    normalize: Literal["NFC", "NFKC"] | None = None  # Unicode form that all text is brought into
    max_documents: int | None = None
    max_bytes: int | None = None  # of UTF-8 text


@dataclass
class ReadStats:
    """What has been read so far."""

    documents: int = 0
    bytes: int = 0
    invalid: int = 0  # documents with bytes that are not UTF-8, read as U+FFFD
    short: int = 0  # left out by min_characters
    duplicates: int = 0  # left out by deduplicate


def read_documents(sources: Sources, stats: ReadStats, workers: int = 1) -> Iterator[str]:
    """Documents one after another, in an order that depends on the sources alone; empty ones are left out.

    Args:
        sources: what to read.
        stats: counts are added here as documents are given out.
        workers: processes for parsing docstrings.

    Raises:
        UserError: a source that is not there, not readable, cut short, without the text column, or no document at all.
    """
    before = stats.documents
    seen: set[bytes] = set()  # digests of 8 bytes, some 60 with what Python adds: half a gigabyte for OpenWebText
    for text in _texts(sources, stats, workers):
        if not text.strip():
            continue
        if sources.normalize is not None:
            text = unicodedata.normalize(sources.normalize, text)
        if len(text) < sources.min_characters:
            stats.short += 1
            continue
        if sources.deduplicate:
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
            if digest in seen:
                stats.duplicates += 1
                continue
            seen.add(digest)
        if sources.max_documents is not None and stats.documents - before >= sources.max_documents:
            return
        if sources.max_bytes is not None and stats.bytes >= sources.max_bytes:
            return
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:  # half of a surrogate pair, from a JSON escape
            text = text.encode("utf-8", "replace").decode("utf-8")
            size = len(text.encode("utf-8"))
            stats.invalid += 1
        stats.documents += 1
        stats.bytes += size
        yield text
    if stats.documents == before:
        raise UserError(f"no text in {', '.join(sources.sources)}; expected at least one document that is not empty")


def check_sources(sources: Sources) -> None:
    """Find all files now, so that a mistyped path stops the program before the work begins."""
    for source in sources.sources:
        if source not in (HUB, DOCSTRINGS):
            find_files(source)


def find_files(source: str) -> list[str]:
    """The files of a path, a folder (all below it that we can read) or a glob, sorted.

    Raises:
        UserError: none there, or not of a kind that we can read.
    """
    if os.path.isfile(source):
        if _format(source) is None:
            raise UserError(f"{source}: cannot tell what this file is; expected {_kinds()}")
        return [source]
    if os.path.isdir(source):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    else:
        found = [path for path in glob.glob(os.path.expanduser(source), recursive=True) if os.path.isfile(path)]
        if not found:
            raise UserError(f"{source}: no such file or folder, and no file matches it as a glob")
    files = sorted(path for path in found if _format(path))
    if not files:
        raise UserError(f"{source}: holds no file that can be read; expected {_kinds()}")
    return files


def _kinds() -> str:
    packed = " or ".join(_COMPRESSIONS)
    return f"{', '.join(_FORMATS)} (all but .parquet also with {packed}), or {', '.join(_TARS)} of .txt"


def _format(path: str) -> str | None:
    name = os.path.basename(path).lower()
    if name.endswith(_TARS) and not name.startswith("."):
        return ".tar"
    stem, suffix = os.path.splitext(name)
    if suffix in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in _FORMATS and suffix != ".parquet" else None
    return suffix if suffix in _FORMATS and not name.startswith(".") else None


def _texts(sources: Sources, stats: ReadStats, workers: int) -> Iterator[str]:
    for source in sources.sources:
        if source == HUB:
            yield from _read_hub(sources, stats)
        elif source == DOCSTRINGS:
            yield from read_docstrings(workers)
        else:
            for path in find_files(source):
                yield from documents_of_file(path, sources, stats)


def is_tar(path: str) -> bool:
    return _format(path) == ".tar"


def is_parquet(path: str) -> bool:
    return _format(path) == ".parquet"


def documents_of_file(
    path: str, sources: Sources, stats: ReadStats, lines: Iterable[bytes] | None = None
) -> Iterator[str]:
    """Documents of one file, empty ones too. `lines`: its lines, where they have been opened already."""
    kind = _format(path)
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, sources.text_column, stats)
        elif kind == ".tar":
            with open(path, "rb") as archive:
                yield from _read_tar(archive, stats)
        elif kind == ".txt":
            yield from _read_txt(_lines(path) if lines is None else lines, sources.txt_documents, stats)
        else:
            yield from _read_json_lines(path, _lines(path) if lines is None else lines, sources.text_column, stats)
    except UserError:
        raise
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as {kind}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _lines(path: str) -> Iterator[bytes]:
    return lines_of(pa.input_stream(path, compression="detect"))


def lines_of(stream: pa.NativeFile, buffer_size: int = 1 << 20) -> Iterator[bytes]:
    """Lines of a stream of plain bytes; one that is cut short is an OSError."""
    with io.BufferedReader(stream, buffer_size) as file:
        first = True
        for line in file:
            yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False


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


def _read_tar(archive: IO[bytes], stats: ReadStats) -> Iterator[str]:
    """Every .txt of an archive is a document. OpenWebText's own archive holds archives (.xz) of them, in any order.

    Members are read one after another and never written to disk, so that their names cannot lead anywhere.
    """
    with tarfile.open(fileobj=archive, mode="r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            file = tar.extractfile(member)
            assert file is not None  # of a file it never is
            if member.name.endswith(".txt"):
                text, invalid = _decode(file.read())
                stats.invalid += invalid
                yield text
            elif member.name.endswith((".xz", ".tar")):
                yield from _read_tar(file, stats)


def _read_json_lines(path: str, lines: Iterable[bytes], column: str, stats: ReadStats) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, invalid = _decode(line)
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: expected an object, found a {type(record).__name__}")
        if column not in record:
            raise _missing_column(f"{path}, line {number}", column, list(record))
        stats.invalid += invalid
        yield _as_text(record[column], f"{path}, line {number}", column)


def _as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is a {type(value).__name__}; expected text")
    return value


def _missing_column(where: str, column: str, columns: list[str]) -> UserError:
    return UserError(
        f"{where}: no column {column!r}; there are {', '.join(map(repr, columns))}: choose by --text-column"
    )


def _read_parquet(path: str, column: str, stats: ReadStats) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise _missing_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(_PARQUET_BATCH, columns=[column]):
            yield from _column_texts(batch.column(0), path, column, stats)


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


def _read_hub(sources: Sources, stats: ReadStats) -> Iterator[str]:
    import datasets  # here, because it takes seconds and only this source needs it

    name = f"{sources.dataset}{f' ({sources.config})' if sources.config else ''}"
    where = f"data set {name}{f' at revision {sources.revision}' if sources.revision else ''}"
    try:
        stream = datasets.load_dataset(
            sources.dataset, sources.config, revision=sources.revision, split="train", streaming=True
        )
        columns = stream.column_names or list(next(iter(stream)))
    except Exception as error:  # offline, unknown name, gated, needs a script, unreadable: all the person's to choose
        raise UserError(
            f"{where} cannot be read from the hub: {_reason(error)}; check the name, the revision (--revision) and the "
            "network, or give local files as --source"
        ) from error
    if sources.text_column not in columns:
        raise _missing_column(where, sources.text_column, columns)
    batches = stream.select_columns([sources.text_column]).with_format("arrow").iter(_PARQUET_BATCH)
    while True:
        try:
            table = next(batches, None)
        except Exception as error:
            raise UserError(f"{where}: reading from the hub broke off: {_reason(error)}") from error
        if table is None:
            return
        for chunk in table.column(sources.text_column).chunks:
            yield from _column_texts(chunk, where, sources.text_column, stats)
