"""Estimate the text in the sources from a sample, and check the free disk space, before a conversion begins."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from electra_composer.corpus.arrow_files import arrow_rows
from electra_composer.corpus.files import COLUMNAR, UnreadableFile, format_of, open_lines
from electra_composer.corpus.readers import read_slice
from electra_composer.corpus.source_parts import Slice
from electra_composer.corpus.sources import DOCSTRINGS, HUB, Source, Sources
from electra_composer.errors import UserError

READ_FULLY_BELOW = 1 << 20  # bytes; in smaller files, decompression reads ahead by a large fraction of the file
SAMPLED_FILES = 16  # of each source, evenly spaced
_BUFFER = 1 << 14  # bytes; a small buffer keeps the read-ahead small
BYTES_PER_TOKEN = 3.0  # of text; below that of any vocabulary for natural language, so that disk space suffices


@dataclass
class TextEstimate:
    """Estimated amount of text."""

    documents: float
    text_bytes: float
    sample: list[str]  # the documents read


def estimate_text(sources: Sources, sample_bytes: int) -> TextEstimate | None:
    """Read a sample of local sources, and scale it up by the fraction of the files read and by source weights.

    Args:
        sources: limits (`max_documents`, `max_bytes`) are applied.
        sample_bytes: of text to read in total.

    Returns:
        None if a source is `hub`, `docstrings` or an archive, whose text is only known after reading all of it.

    Raises:
        UserError: a source cannot be read.
    """
    if any(source.path in (HUB, DOCSTRINGS) for source in sources.sources):
        return None
    files = [source.files for source in sources.sources]
    if any(format_of(path) == ".tar" for found in files for path in found):
        return None
    total = sum(os.path.getsize(path) for found in files for path in found)
    estimate = TextEstimate(0, 0, [])
    for source, found in zip(sources.sources, files, strict=True):
        size = sum(os.path.getsize(path) for path in found)
        chosen = found[:: max(1, len(found) // SAMPLED_FILES)]
        limit = round(sample_bytes * size / max(1, total)) // len(chosen)
        sampled = [_sample_file(path, source, sources, limit, estimate.sample) for path in chosen]
        if read := sum(part for part, _, _ in sampled):
            estimate.documents += source.weight * size / read * sum(count for _, count, _ in sampled)
            estimate.text_bytes += source.weight * size / read * sum(length for _, _, length in sampled)
    fraction = 1.0
    if sources.max_documents is not None and estimate.documents:
        fraction = min(fraction, sources.max_documents / estimate.documents)
    if sources.max_bytes is not None and estimate.text_bytes:
        fraction = min(fraction, sources.max_bytes / estimate.text_bytes)
    return TextEstimate(estimate.documents * fraction, estimate.text_bytes * fraction, estimate.sample)


def _sample_file(path: str, source: Source, sources: Sources, limit: int, sample: list[str]) -> tuple[float, int, int]:
    """Append documents of a file to `sample` until they reach `limit` bytes of text.

    Returns:
        Bytes of the file read, documents, bytes of text.
    """
    size, documents, length = os.path.getsize(path), 0, 0
    kind = format_of(path)
    with pa.OSFile(path) as raw:  # its position tells how much of the file was read, compressed or not
        lines = None if kind in COLUMNAR else open_lines(path, raw, _BUFFER)
        try:
            for text, _ in read_slice(Slice(path), source, lines):
                documents += 1
                length += len(text.encode("utf-8", "replace"))
                if text.strip():
                    sample.append(text)
                if length >= limit and size >= READ_FULLY_BELOW:
                    if kind in COLUMNAR:
                        rows = pq.read_metadata(path).num_rows if kind == ".parquet" else arrow_rows(path)
                        return size * documents / rows, documents, length
                    return raw.tell(), documents, length
        except UnreadableFile:
            if not sources.skip_unreadable:
                raise
    return size, documents, length


def check_free_space(out: str, text_bytes: float) -> None:
    """Check that the output folder is writable and has room for the shards; object stores are not checked.

    A token takes two bytes, and stands for at least three bytes of text: two thirds of the text are required.

    Raises:
        UserError: too little space, or not writable.
    """
    if "://" in out:
        return
    folder = os.path.dirname(os.path.abspath(os.path.expanduser(out)))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    if os.statvfs(folder).f_flag & os.ST_RDONLY or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: it is read-only, or owned by another user; choose another --out")
    needed, free = text_bytes * 2 / BYTES_PER_TOKEN, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {_size(free)} left, and the shards may need {_size(needed)}; free some space, choose "
            "another --out, or pass --ignore-disk to try"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
