"""What a conversion will need, before it begins: text, tokens, disk and time, from a sample of the sources."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.documents import (
    DOCSTRINGS,
    HUB,
    ReadStats,
    Sources,
    documents_of_file,
    find_files,
    is_parquet,
    is_tar,
    lines_of,
)
from electra_composer.errors import UserError

WHOLE_BELOW = 1 << 20  # bytes; smaller files are read to the end, since decompressing runs ahead by some of that
SAMPLED_FILES = 16  # of each source, evenly spaced
_SMALL_BUFFER = 1 << 14  # so that the reader is hardly ahead of what it gave out
BYTES_PER_TOKEN = 3.0  # of text; fewer than any vocabulary for natural language needs, so that disk is never too small


@dataclass
class TextEstimate:
    """How much text there is."""

    documents: float
    text_bytes: float
    sample: list[str]  # documents that were read for it


def estimate_text(sources: Sources, sample_bytes: int) -> TextEstimate | None:
    """Read a sample of local sources, and scale it up by the part of the files that was read.

    Args:
        sources: as for a conversion; its limits count.
        sample_bytes: of text to read, in all.

    Returns:
        None where a source is the hub's, made here (`docstrings`) or an archive: only reading all of it tells how much
        there is.

    Raises:
        UserError: as reading raises them.
    """
    if any(source in (HUB, DOCSTRINGS) for source in sources.sources):
        return None
    files = [path for source in sources.sources for path in find_files(source)]
    if any(is_tar(path) for path in files):
        return None
    chosen = files[:: max(1, len(files) // SAMPLED_FILES)]
    sample: list[str] = []
    sampled = [_sample_file(path, sources, sample_bytes // len(chosen), sample) for path in chosen]
    read = sum(part for part, _, _ in sampled)
    size = sum(os.path.getsize(path) for path in files)
    if not sample or not read:
        return TextEstimate(0, 0, [])
    documents = sum(count for _, count, _ in sampled) * size / read
    text_bytes = sum(length for _, _, length in sampled) * size / read
    share = 1.0
    if sources.max_documents is not None:
        share = min(share, sources.max_documents / documents)
    if sources.max_bytes is not None:
        share = min(share, sources.max_bytes / text_bytes)
    return TextEstimate(documents * share, text_bytes * share, sample)


def _sample_file(path: str, sources: Sources, limit: int, sample: list[str]) -> tuple[float, int, int]:
    """Read documents of a file until there is enough text: bytes of the file gone through, documents, bytes of text."""
    size, documents, length = os.path.getsize(path), 0, 0
    parquet = is_parquet(path)
    with open(path, "rb", buffering=0) as raw:  # whose place tells how far the reader is, decompressing or not
        lines = None
        if not parquet:
            stream = pa.PythonFile(raw, mode="r")
            codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1].lower())
            lines = lines_of(stream if codec is None else pa.CompressedInputStream(stream, codec), _SMALL_BUFFER)
        for text in documents_of_file(path, sources, ReadStats(), lines):
            documents += 1
            length += len(text.encode("utf-8", "replace"))
            if text.strip():
                sample.append(text)
            if length >= limit and size >= WHOLE_BELOW:
                if parquet:
                    return size * documents / pq.read_metadata(path).num_rows, documents, length
                return size if raw.closed else raw.tell(), documents, length  # closed at its end
    return size, documents, length


def check_free_space(out: str, text_bytes: float) -> None:
    """Refuse to begin where the shards will not fit.

    Two bytes for a token, and at least three bytes of text in it: two thirds of the text are asked for.

    Raises:
        UserError: with both sizes.
    """
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(out)))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    needed, free = text_bytes * 2 / BYTES_PER_TOKEN, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB left, and the shards may need {needed / 1e9:.1f} GB; make room, choose "
            "another --out, or pass --ignore-disk to try"
        )
