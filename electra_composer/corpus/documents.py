"""Read documents from parts of the sources, clean them, and leave out what is not wanted."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from electra_composer.corpus.docstrings import read_docstrings
from electra_composer.corpus.files import UnreadableFile
from electra_composer.corpus.readers import read_slice
from electra_composer.corpus.source_parts import Part, Slice
from electra_composer.corpus.sources import DOCSTRINGS, HUB, Sources
from electra_composer.errors import UserError


class Document(NamedTuple):
    """A document and the hash of its text."""

    text: str
    size: int  # bytes of UTF-8
    digest: int  # 64 bits of BLAKE2b of the text


@dataclass
class ReadStats:
    """Counts of what has been read."""

    documents: int = 0
    bytes: int = 0
    invalid: int = 0  # documents with bytes that are not UTF-8, read as U+FFFD
    short: int = 0  # left out by min_characters
    duplicates: int = 0  # left out by deduplicate
    lines: int = 0  # left out by drop_lines
    unreadable: dict[str, str] = field(default_factory=dict)  # file → error message; left out by skip_unreadable


def part_documents(part: Part, sources: Sources, stats: ReadStats) -> Iterator[Document]:
    """Yield the documents of one part in order, without empty ones and those that `sources` leaves out.

    Deduplication and limits depend on other parts and are applied in selection.py.

    Args:
        stats: updated as documents are yielded.

    Raises:
        UserError: a file is missing, unreadable (unless `skip_unreadable`), or has no text column.
    """
    source = sources.sources[part.source]
    for piece in part.slices:
        try:
            yield from filter_documents(_count_invalid(read_slice(piece, source), stats), sources, stats)
        except UnreadableFile as error:
            if not sources.skip_unreadable:
                raise
            stats.unreadable[piece.path] = str(error)


def read_documents(sources: Sources, stats: ReadStats, workers: int = 1) -> Iterator[str]:
    """Yield all documents in order, source after source, each once whatever its weight.

    Args:
        workers: processes for parsing docstrings.

    Raises:
        UserError: as :func:`part_documents`; or there is no document at all.
    """
    seen: set[int] = set()
    before = ReadStats(stats.documents, stats.bytes)
    for number, source in enumerate(sources.sources):
        if source.path == DOCSTRINGS:
            documents = filter_documents(read_docstrings(workers), sources, stats)
        else:
            slices = (Slice(HUB, 0, 1),) if source.path == HUB else tuple(map(Slice, source.files))
            documents = part_documents(Part(number, 0, slices), sources, stats)
        for document in documents:
            if sources.deduplicate:
                if document.digest in seen:
                    stats.duplicates += 1
                    continue
                seen.add(document.digest)
            if limit_reached(sources, stats.documents - before.documents, stats.bytes - before.bytes):
                return
            stats.documents += 1
            stats.bytes += document.size
            yield document.text
    if stats.documents == before.documents:
        raise no_text_error(sources)


def limit_reached(sources: Sources, documents: int, size: int) -> bool:
    """Return whether `max_documents` or `max_bytes` is reached; the document that reaches `max_bytes` is the last."""
    enough_documents = sources.max_documents is not None and documents >= sources.max_documents
    return enough_documents or (sources.max_bytes is not None and size >= sources.max_bytes)


def no_text_error(sources: Sources) -> UserError:
    return UserError(f"no text in {sources}; expected at least one document that is not empty")


def filter_documents(texts: Iterable[str], sources: Sources, stats: ReadStats) -> Iterator[Document]:
    """Normalize texts, drop unwanted lines, clean the others, and leave out empty and short documents.

    Source of `clean: seed`: richarddwang/electra_pytorch, `ELECTRADataProcessor.clean` in `_utils/utils.py`. Lines are
    dropped before, as there.
    """
    dropped = [re.compile(pattern) for pattern in sources.drop_lines]
    for text in texts:
        if sources.normalize is not None:
            text = unicodedata.normalize(sources.normalize, text)
        if dropped:
            lines = text.split("\n")
            kept = [line for line in lines if not any(pattern.search(line) for pattern in dropped)]
            stats.lines += len(lines) - len(kept)
            text = "\n".join(kept)
        if sources.clean == "seed":
            text = text.replace("()", "")
        if not text or text.isspace():
            continue
        if len(text) < sources.min_characters:
            stats.short += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # an unpaired surrogate from a JSON escape
            data = text.encode("utf-8", "replace")
            text = data.decode("utf-8")
            stats.invalid += 1
        digest = hashlib.blake2b(data, digest_size=8).digest()
        yield Document(text, len(data), int.from_bytes(digest, "big"))


def _count_invalid(texts: Iterable[tuple[str, bool]], stats: ReadStats) -> Iterator[str]:
    for text, invalid in texts:
        stats.invalid += invalid
        yield text
