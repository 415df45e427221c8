"""Convert one part of the sources to its own shards: read, tokenize, pack and write in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from electra_composer.corpus.chunks import (
    EncodingSettings,
    convert_documents,
    group_documents,
    hash_fraction,
    is_validation,
)
from electra_composer.corpus.documents import Document, ReadStats, part_documents
from electra_composer.corpus.examples import Packer, Row, one_per_row
from electra_composer.corpus.part_writer import PartWriter, Place
from electra_composer.corpus.selection import Selection
from electra_composer.corpus.source_parts import Part
from electra_composer.corpus.sources import Sources
from electra_composer.corpus.splits import extremes
from electra_composer.storage.shard_folder import SourceCounts, SplitCounts


class PartContext(NamedTuple):
    """Arguments common to all parts; sent to each process once."""

    settings: EncodingSettings
    sources: Sources
    packing: Literal["packed", "one"]
    place: Place


class Job(NamedTuple):
    """A part to convert."""

    number: int
    part: Part
    selection: Selection


def convert_part(
    context: PartContext, tokenizer: Tokenizer, job: Job, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Convert a part and write its shards.

    Args:
        tokenizer: `context.settings.tokenizer()`.
        progress: called with the bytes of text of each chunk once it is done.

    Returns:
        The record of the part: its `source`, `counts` (:class:`SourceCounts`), `splits` (:class:`SplitCounts` by name),
        `unreadable` files with their error messages, `val_fraction` and `split_hashes` (see splits.py), and `shards`,
        see :meth:`PartWriter.finish`.

    Raises:
        UserError: text cannot be read, or an upload to the remote failed.
        OSError: disk full.
    """
    settings, stats = context.settings, ReadStats()
    splits = {split: SplitCounts() for split in settings.splits}
    counts = SourceCounts(duplicate_documents=job.selection.duplicates)
    packers = {split: Packer(settings.max_seq_length) for split in settings.splits}
    writer = PartWriter(context.place, job.number, settings.splits)
    hashes: list[float] = []  # lowest and highest of the part

    def write(split: str, rows: Iterable[Row]) -> None:
        for row in rows:
            splits[split].rows += 1
            splits[split].tokens += len(row.input_ids)
            writer.write(split, row)

    try:
        documents = _selected_documents(part_documents(job.part, context.sources, stats), context, job)
        for index, chunk in enumerate(group_documents(documents)):
            found = convert_documents(settings, tokenizer, f"{job.number} {index}", chunk)
            hashes = extremes([*hashes, *itertools.chain.from_iterable(examples.split_hashes for examples in found)])
            for split, examples in zip(settings.splits, found, strict=True):
                splits[split].documents += examples.documents
                splits[split].examples += len(examples.lengths)
                splits[split].dropped_tokens += examples.dropped_tokens
                if context.packing == "one":
                    write(split, one_per_row(examples.examples()))
                else:
                    write(split, itertools.chain.from_iterable(map(packers[split].add, examples.examples())))
            size = sum(document.size for document in chunk)
            counts.documents += len(chunk)
            counts.text_bytes += size
            progress(size)
        for split in settings.splits:
            write(split, packers[split].finish())
        counts.tokens = sum(split.tokens for split in splits.values())
        counts.invalid_documents, counts.short_documents, counts.dropped_lines = stats.invalid, stats.short, stats.lines
        record = {"source": job.part.source, "counts": asdict(counts), "unreadable": stats.unreadable}
        record["splits"] = {name: asdict(split) for name, split in splits.items()}
        return writer.finish({**record, "val_fraction": settings.val_fraction, "split_hashes": hashes})
    except BaseException:
        writer.cancel()
        raise


def _selected_documents(documents: Iterable[Document], context: PartContext, job: Job) -> Iterator[Document]:
    """Yield the documents of this copy of the part; no document is in validation more than once."""
    weight, copy, settings = context.sources.sources[job.part.source].weight, job.part.copy, context.settings
    chosen = job.selection.chosen
    if chosen is not None:
        last = int(chosen.nonzero()[0][-1])
        documents = itertools.compress(documents, chosen[: last + 1].tolist())  # reads no further than needed
    for document in documents:
        if copy_count(settings.seed, document.digest, weight) <= copy:
            continue
        if copy and is_validation(settings.seed, document.digest, settings.val_fraction):
            continue
        yield document


def copy_count(seed: int, digest: int, weight: float) -> int:
    """Return how often a document is taken: `weight` on average, rounded up or down by the document's hash."""
    return math.floor(weight + hash_fraction(f"{seed} copies {digest}")) if weight % 1 else int(weight)
