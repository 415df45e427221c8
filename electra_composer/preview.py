"""Show a folder of shards: its counts, the lengths of its examples, and some rows as text.

    python -m electra_composer.preview data/owt
    python -m electra_composer.preview data/owt --rows 5 --checkpoint runs/electra-small

With a checkpoint, the rows show the tokens that its generator samples and the verdicts of its discriminator: which
tokens are replaced, or what it predicts in their place, as the objective of the run says.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import sys

from electra_composer.arguments import ArgumentParser, number, parse_early
from electra_composer.errors import UserError, report_user_errors
from electra_composer.ranges import Range

MAX_ROWS = 1000  # shown as text; a model takes all of them at once


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m electra_composer.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="local folder of shards")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--rows", type=number(Range(ge=0, le=MAX_ROWS)), default=3, help="number of rows shown as text (%(default)s)"
    )
    parser.add_argument("--checkpoint", help="a .pt file or run folder of pretrain.py")
    parser.add_argument(
        "--seed",
        type=number(Range(ge=0, le=2**31 - 1)),
        default=0,
        help="seed of rows, masks and samples (%(default)s)",
    )
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(_parse)

import os
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.checks import check_shards, check_split
from electra_composer.batches.row_reader import Rows, reader_of_split
from electra_composer.batches.shards import read_meta
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import ShardsConfig
from electra_composer.corpus.sources import Source
from electra_composer.reports.tokens import Token, annotate_tokens, legend_of
from electra_composer.storage.shard_folder import Meta
from electra_composer.vocabulary import load_tokenizer
from electra_composer.word_limits import word_limit

SAMPLE = 20_000  # rows in the statistics, evenly spaced, at most
BINS, BAR = 12, 40


def describe_meta(meta: Meta) -> str:
    """Format `meta.json`."""
    limit = word_limit(meta.tokenizer_folder)
    words = "" if limit is None else f", words of at most {limit} characters"
    lines = [
        f"{meta.folder}: rows of at most {meta.max_seq_length} tokens, {meta.packing}, seed {meta.seed}",
        f"tokenizer {meta.tokenizer.label}{words}",
        *describe_conversion(meta),
        f"{'':8}{'documents':>12}{'examples':>12}{'rows':>12}{'tokens':>16}{'fill':>9}{'dropped':>12}",
    ]
    for name, counts in meta.splits.items():
        lines.append(
            f"{name:8}{counts.documents:12,}{counts.examples:12,}{counts.rows:12,}{counts.tokens:16,}"
            f"{counts.fill(meta.max_seq_length):9.2%}{counts.dropped_tokens:12,}"
        )
    return "\n".join(lines)


def describe_conversion(meta: Meta) -> list[str]:
    """Format the sources, one per line, and the other options of the conversion that differ from "nothing"."""
    known, default = {part.name for part in fields(Source)}, Source()
    lines = []
    for values in meta.conversion.get("sources", []):
        source = Source(**{name: value for name, value in values.items() if name in known})
        given = [
            f"{name} {getattr(source, name)}"
            for name in sorted(known - {"path", "name", "dataset"})
            if getattr(source, name) != getattr(default, name)
        ]
        counts = meta.sources.get(source.label)
        sizes = [f"{counts.documents:,} documents", f"{counts.text_bytes:,} bytes"] if counts is not None else []
        lines.append(f"source {source.label}: " + ", ".join([*sizes, *given]))
    options = {name: value for name, value in sorted(meta.conversion.items()) if name != "sources"}
    given = [f"{name} {value}" for name, value in options.items() if value not in (None, False, [])]
    return [*lines, "converted with " + ", ".join(given)]


def histogram(lengths: NDArray[np.int64], max_seq_length: int) -> str:
    """Format a histogram of example lengths, one line for each of up to twelve bins of equal width."""
    width = -(-max_seq_length // BINS)
    counts = np.bincount((lengths - 1) // width)
    lines = [f"lengths of {len(lengths):,} examples: mean {lengths.mean():.1f}, median {np.median(lengths):.0f}"]
    for index, count in enumerate(counts.tolist()):
        first, last = index * width + 1, min((index + 1) * width, max_seq_length)
        bar = "█" * round(BAR * count / counts.max())
        lines.append(f"  {first:4} to {last:4}  {count / len(lengths):6.1%}  {bar}")
    return "\n".join(lines)


def example_lengths(rows: Rows) -> NDArray[np.int64]:
    """Return the number of tokens of each example."""
    return rows.segment_lengths.astype(np.int64).reshape(-1, 2).sum(1)


def describe_vocabulary(ids: NDArray[np.integer], tokenizer: PreTrainedTokenizerFast, meta: Meta) -> str:
    """Format how well the vocabulary fits: unknown tokens, pieces per word, and entries that occur in these rows."""
    special = meta.tokenizer.special_ids
    counts = np.bincount(ids, minlength=len(tokenizer))
    unknown = int(counts[special["unk"]]) if "unk" in special else 0
    counts[list(special.values())] = 0
    total = int(counts.sum()) + unknown
    inside = [index for token, index in tokenizer.get_vocab().items() if token.startswith("##")]
    line = f"vocabulary: {unknown / total:.2%} of the tokens are unknown"
    if inside and total > int(counts[inside].sum()):
        line += f", {total / (total - int(counts[inside].sum())):.2f} pieces a word"
    return f"{line}; {np.count_nonzero(counts):,} of {len(tokenizer):,} entries occur in these rows"


def render(tokens: list[Token], color: bool) -> Iterator[str]:
    """Yield a line for each segment of each example."""
    for example in range(1, tokens[-1].example + 1):
        for segment, name in ((0, "A"), (1, "B")):
            chosen = [token for token in tokens if (token.example, token.segment) == (example, segment)]
            if chosen:
                text = " ".join(token.render(color) for token in chosen).replace(" ##", "")
                yield f"  {example if segment == 0 else '':>2} {name}  {text}"


@report_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    options = _parse(arguments)
    meta = read_meta(options.folder)
    check_split(ShardsConfig(options.folder, meta.max_seq_length), meta, options.split)
    tokenizer = load_tokenizer(meta.tokenizer_folder)
    model = None
    if options.checkpoint is not None:
        checkpoint = read_checkpoint(options.checkpoint)
        check_shards(meta, checkpoint.tokenizer, meta.max_seq_length)
        model = checkpoint.build_model()
        if meta.max_seq_length > checkpoint.model_config.max_positions:
            raise UserError(
                f"{options.checkpoint} has {checkpoint.model_config.max_positions} positions, but the rows of "
                f"{options.folder} have up to {meta.max_seq_length} tokens; convert with a smaller --max-seq-length"
            )
    rows = meta.splits[options.split].rows
    reader = reader_of_split(options.folder, options.split)
    if reader is None:
        raise UserError(f"{options.folder}: some shards are compressed; train on them once, which decompresses them")
    sample = reader.read(np.arange(0, rows, -(-rows // SAMPLE)))
    print(describe_meta(meta))
    print(f"\n{histogram(example_lengths(sample), meta.max_seq_length)}")
    print(f"\n{describe_vocabulary(sample.input_ids, tokenizer, meta)}")
    numbers = np.sort(np.random.default_rng(options.seed).choice(rows, min(options.rows, rows), replace=False))
    if not len(numbers):
        return
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for row, tokens in zip(
        numbers.tolist(), annotate_tokens(reader.read(numbers), tokenizer, meta, model, options.seed), strict=True
    ):
        print(f"\nrow {row:,} of {options.split}: {len(tokens)} tokens")
        print("\n".join(render(tokens, color)))
    print(f"\n{legend_of(model)}")


if __name__ == "__main__":
    main()
