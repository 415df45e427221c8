"""One part of the sources to shards of its own: read, tokenized, packed and written by one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from electra_composer.corpus.chunks import Task, convert_documents, group_documents, is_validation, share_of
from electra_composer.corpus.documents import Document, ReadStats, part_documents
from electra_composer.corpus.examples import Packer, Row, one_per_row
from electra_composer.corpus.part_writer import PartWriter, Place
from electra_composer.corpus.selection import Selection
from electra_composer.corpus.source_parts import Part
from electra_composer.corpus.sources import Sources
from electra_composer.storage.shard_folder import SourceCounts, SplitCounts


class Plan(NamedTuple):
    """What is the same for all parts; sent once to each process."""

    task: Task
    sources: Sources
    packing: Literal["packed", "one"]
    place: Place


class Job(NamedTuple):
    """One part to convert."""

    number: int
    part: Part
    selection: Selection


def convert_part(plan: Plan, tokenizer: Tokenizer, job: Job, progress: Callable[[int], None]) -> dict[str, Any]:
    """Convert a part and write its shards.

    Args:
        tokenizer: `plan.task.tokenizer()`.
        progress: is told bytes of text as they are done.

    Returns:
        The record of the part: its `source`, `counts` (:class:`SourceCounts`), `splits` (:class:`SplitCounts` by name),
        `unreadable` files with what was wrong, and `shards`, see :meth:`PartWriter.finish`.

    Raises:
        UserError: text that cannot be read, a remote that cannot be written to.
        OSError: no room for the shards.
    """
    task, stats = plan.task, ReadStats()
    splits = {split: SplitCounts() for split in task.splits}
    counts = SourceCounts(duplicate_documents=job.selection.duplicates)
    packers = {split: Packer(task.max_seq_length) for split in task.splits}
    writer = PartWriter(plan.place, job.number, task.splits)

    def write(split: str, rows: Iterable[Row]) -> None:
        for row in rows:
            splits[split].rows += 1
            splits[split].tokens += len(row.input_ids)
            writer.write(split, row)

    try:
        documents = _taken(part_documents(job.part, plan.sources, stats), plan, job)
        for index, chunk in enumerate(group_documents(documents)):
            found = convert_documents(task, tokenizer, f"{job.number} {index}", chunk)
            for split, examples in zip(task.splits, found, strict=True):
                splits[split].documents += examples.documents
                splits[split].examples += len(examples.lengths)
                splits[split].dropped_tokens += examples.dropped_tokens
                if plan.packing == "one":
                    write(split, one_per_row(examples.examples()))
                else:
                    write(split, itertools.chain.from_iterable(map(packers[split].add, examples.examples())))
            size = sum(document.size for document in chunk)
            counts.documents += len(chunk)
            counts.text_bytes += size
            progress(size)
        for split in task.splits:
            write(split, packers[split].finish())
        counts.tokens = sum(split.tokens for split in splits.values())
        counts.invalid_documents, counts.short_documents, counts.dropped_lines = stats.invalid, stats.short, stats.lines
        return writer.finish(
            {
                "source": job.part.source,
                "counts": asdict(counts),
                "splits": {name: asdict(split) for name, split in splits.items()},
                "unreadable": stats.unreadable,
            }
        )
    except BaseException:
        writer.cancel()
        raise


def _taken(documents: Iterable[Document], plan: Plan, job: Job) -> Iterator[Document]:
    """What this copy of the part takes of its documents; validation gets none of them twice."""
    weight, copy, task = plan.sources.sources[job.part.source].weight, job.part.copy, plan.task
    chosen = job.selection.chosen
    last = None if chosen is None else int(chosen.nonzero()[0][-1]) if chosen.any() else -1
    for index, document in enumerate(documents):
        if last is not None and index > last:
            return
        if chosen is not None and not chosen[index]:
            continue
        if copies(task.seed, document.digest, weight) <= copy:
            continue
        if copy and is_validation(task.seed, document.digest, task.val_fraction):
            continue
        yield document


def copies(seed: int, digest: int, weight: float) -> int:
    """How often a document of a source is taken: `weight` on average, and one of the two whole numbers around it."""
    return math.floor(weight + share_of(f"{seed} copies {digest}")) if weight % 1 else int(weight)
