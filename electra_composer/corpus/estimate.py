"""What a conversion will need, before it begins: text, tokens, disk and time, from a sample of the sources."""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.corpus.documents import ReadStats, UnreadableFile, documents_of_slice
from electra_composer.corpus.source_parts import Slice
from electra_composer.corpus.sources import DOCSTRINGS, HUB, Source, Sources, compression_of, find_files, format_of
from electra_composer.errors import UserError

WHOLE_BELOW = 1 << 20  # bytes; smaller files are read to the end, since decompressing runs ahead by some of that
SAMPLED_FILES = 16  # of each source, evenly spaced
_BUFFER = 1 << 14
BYTES_PER_TOKEN = 3.0  # of text; fewer than any vocabulary for natural language needs, so that disk is never too small


@dataclass
class TextEstimate:
    """How much text there is."""

    documents: float
    text_bytes: float
    sample: list[str]  # documents that were read for it


def estimate_text(sources: Sources, sample_bytes: int) -> TextEstimate | None:
    """Read a sample of local sources, and scale it up by the part of the files that was read, and by their weights.

    Args:
        sources: as for a conversion; its limits count.
        sample_bytes: of text to read, in all.

    Returns:
        None where a source is the hub's, made here (`docstrings`) or an archive: only reading all of it tells how much
        there is.

    Raises:
        UserError: as reading raises them.
    """
    if any(source.path in (HUB, DOCSTRINGS) for source in sources.sources):
        return None
    files = [find_files(source.path) for source in sources.sources]
    if any(format_of(path) == ".tar" for found in files for path in found):
        return None
    total = sum(os.path.getsize(path) for found in files for path in found)
    whole = TextEstimate(0, 0, [])
    for source, found in zip(sources.sources, files, strict=True):
        size = sum(os.path.getsize(path) for path in found)
        chosen = found[:: max(1, len(found) // SAMPLED_FILES)]
        limit = round(sample_bytes * size / max(1, total)) // len(chosen)
        sampled = [_sample_file(path, source, sources, limit, whole.sample) for path in chosen]
        if read := sum(part for part, _, _ in sampled):
            whole.documents += source.weight * size / read * sum(count for _, count, _ in sampled)
            whole.text_bytes += source.weight * size / read * sum(length for _, _, length in sampled)
    share = 1.0
    if sources.max_documents is not None and whole.documents:
        share = min(share, sources.max_documents / whole.documents)
    if sources.max_bytes is not None and whole.text_bytes:
        share = min(share, sources.max_bytes / whole.text_bytes)
    return TextEstimate(whole.documents * share, whole.text_bytes * share, whole.sample)


def _sample_file(path: str, source: Source, sources: Sources, limit: int, sample: list[str]) -> tuple[float, int, int]:
    """Read documents of a file until there is enough text: bytes of the file gone through, documents, bytes of text."""
    size, documents, length = os.path.getsize(path), 0, 0
    parquet = format_of(path) == ".parquet"
    with open(path, "rb", buffering=0) as raw:  # whose place tells how far the reader is, decompressing or not
        lines = None
        if not parquet:
            stream, codec = pa.PythonFile(raw, mode="r"), compression_of(path)
            # A small buffer, so that the reader is hardly ahead of what it gave out.
            lines = io.BufferedReader(stream if codec is None else pa.CompressedInputStream(stream, codec), _BUFFER)
        try:
            for text in documents_of_slice(Slice(path), source, ReadStats(), lines):
                documents += 1
                length += len(text.encode("utf-8", "replace"))
                if text.strip():
                    sample.append(text)
                if length >= limit and size >= WHOLE_BELOW:
                    if parquet:
                        return size * documents / pq.read_metadata(path).num_rows, documents, length
                    return size if raw.closed else raw.tell(), documents, length  # closed at its end
        except UnreadableFile:
            if not sources.skip_unreadable:
                raise
    return size, documents, length


def check_free_space(out: str, text_bytes: float) -> None:
    """Refuse to begin where the shards will not fit, or nothing may be written.

    Two bytes for a token, and at least three bytes of text in it: two thirds of the text are asked for. An object store
    has room enough.

    Raises:
        UserError: with both sizes, or what is wrong with the place.
    """
    if "://" in out:
        return
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(out)))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: it is read-only, or not yours; choose another --out")
    needed, free = text_bytes * 2 / BYTES_PER_TOKEN, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {_size(free)} left, and the shards may need {_size(needed)}; make room, choose "
            "another --out, or pass --ignore-disk to try"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
