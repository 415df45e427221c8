"""`convert_owt.py --dry-run`: a sample is converted in memory, and what comes out is scaled up to the whole."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np

from electra_composer.corpus.chunks import group_documents
from electra_composer.corpus.conversion import TRAIN, Conversion, check_options, task_of
from electra_composer.corpus.documents import ReadStats, kept_documents
from electra_composer.corpus.engines import tokenize_sample
from electra_composer.corpus.estimate import estimate_text
from electra_composer.corpus.examples import Packer, Row
from electra_composer.corpus.sources import check_sources
from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer, train_tokenizer

SAMPLE_BYTES = 1 << 24  # of text


@dataclass
class DryRun:
    """What a conversion would make and need, by a sample."""

    documents: float
    text_bytes: float
    tokens: float
    disk_bytes: float
    seconds: float  # with the workers given

    def __str__(self) -> str:
        hours, rest = divmod(round(self.seconds), 3600)
        return (
            f"by a sample: {self.documents:,.0f} documents, {self.text_bytes / 1e9:.3g} GB of text, "
            f"{self.tokens / 1e6:,.1f} M tokens, {self.disk_bytes / 1e9:.3g} GB of shards, "
            f"{hours} h {rest // 60} min {rest % 60} s"
        )


def dry_run(options: Conversion) -> DryRun:
    """Convert a sample of some 16 MB without writing it, and scale that up; nothing is written.

    Raises:
        UserError: as :func:`convert`; and for sources that only reading all of them can measure.
    """
    check_options(options)
    check_sources(options.sources)
    text = estimate_text(options.sources, SAMPLE_BYTES)
    if text is None:
        raise UserError(
            f"--dry-run knows local files only: how much there is in {options.sources}, reading all "
            "of it tells; --max-documents converts a part to measure"
        )
    if not text.sample:
        raise UserError(f"no text in {options.sources}; expected at least one document")
    if options.tokenizer == TRAIN:
        tokenizer = train_tokenizer(text.sample, options.vocab_size, options.cased, options.keep_accents)
    else:
        tokenizer = load_tokenizer(options.tokenizer, options.cased, options.keep_accents)
    sampled = sum(len(document.encode("utf-8", "replace")) for document in text.sample)
    task = task_of(options, tokenizer)
    packers = {name: Packer(options.max_seq_length) for name in task.splits}
    rows: list[Row] = []
    chunks = group_documents(kept_documents(text.sample, options.sources, ReadStats()))
    start = time.monotonic()
    for found in tokenize_sample(task, chunks, options.workers):
        for name, part in zip(task.splits, found, strict=True):
            rows += itertools.chain.from_iterable(map(packers[name].add, part.examples()))
    rows += itertools.chain.from_iterable(packer.finish() for packer in packers.values())
    seconds = time.monotonic() - start
    scale = text.text_bytes / sampled
    tokens = sum(len(row.input_ids) for row in rows)
    # A sample has 14 bytes of sizes and shapes, its offset included, and two bytes for each segment length.
    size = tokens * np.dtype(task.dtype).itemsize + sum(14 + 2 * len(row.segment_lengths) for row in rows)
    return DryRun(text.documents, text.text_bytes, tokens * scale, size * scale, seconds * scale)
