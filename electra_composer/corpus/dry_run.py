"""Estimate the results of a conversion (`convert_owt.py --dry-run`) from a sample converted in memory."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass

import numpy as np

from electra_composer.corpus.added_words import add_words
from electra_composer.corpus.chunks import group_documents
from electra_composer.corpus.documents import ReadStats, filter_documents
from electra_composer.corpus.engines import tokenize_sample
from electra_composer.corpus.estimate import estimate_text
from electra_composer.corpus.examples import Packer, Row, one_per_row
from electra_composer.corpus.options import Conversion, check_options
from electra_composer.corpus.tokenizer import encoding_settings, load_given
from electra_composer.errors import UserError
from electra_composer.vocabulary import train_tokenizer

SAMPLE_BYTES = 1 << 24  # of text


@dataclass
class DryRun:
    """Estimated results and cost of a conversion."""

    documents: float
    text_bytes: float
    tokens: float
    disk_bytes: float
    seconds: float  # with the given number of workers

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        hours, rest = divmod(round(self.seconds), 3600)
        return (
            f"estimated from a sample: {self.documents:,.0f} documents, {self.text_bytes / 1e9:.3g} GB of text, "
            f"{self.tokens / 1e6:,.1f} M tokens, {self.disk_bytes / 1e9:.3g} GB of shards "
            f"before compression, {hours} h {rest // 60} min {rest % 60} s"
        )


def dry_run(options: Conversion) -> DryRun:
    """Convert a sample of about 16 MB in memory and scale the results up; nothing is written.

    Raises:
        UserError: as :func:`convert`; or the size of a source is only known after reading all of it.
    """
    check_options(options)
    text = estimate_text(options.sources, SAMPLE_BYTES)
    if text is None:
        raise UserError(
            f"--dry-run estimates local text and parquet files only, not {options.sources}; convert a part with "
            "--max-documents to measure it"
        )
    if not text.sample:
        raise UserError(f"no text in {options.sources}; expected at least one document")
    tokenizer = load_given(options)
    if tokenizer is None:
        tokenizer = train_tokenizer(text.sample, options.vocab_size, options.cased, options.keep_accents)
    elif options.add_vocabulary is not None:
        tokenizer = add_words(tokenizer, text.sample, options.add_vocabulary)
    sampled = sum(len(document.encode("utf-8", "replace")) for document in text.sample)
    settings = encoding_settings(options, tokenizer)
    chunks = group_documents(filter_documents(text.sample, options.sources, ReadStats()))
    packers = [Packer(options.max_seq_length) for _ in settings.splits]
    rows: list[Row] = []
    start = time.monotonic()
    for found in tokenize_sample(settings, chunks, options.workers):
        for packer, examples in zip(packers, found, strict=True):
            if options.packing == "one":
                rows += one_per_row(examples.examples())
            else:
                rows += itertools.chain.from_iterable(map(packer.add, examples.examples()))
    rows += itertools.chain.from_iterable(packer.finish() for packer in packers)
    seconds = time.monotonic() - start
    scale = text.text_bytes / sampled
    tokens = sum(len(row.input_ids) for row in rows)
    # MDS adds 14 bytes of sizes, shapes and offset per sample; a segment length takes 2 bytes.
    size = tokens * np.dtype(settings.dtype).itemsize + sum(14 + 2 * len(row.segment_lengths) for row in rows)
    return DryRun(text.documents, text.text_bytes, tokens * scale, size * scale, seconds * scale)
