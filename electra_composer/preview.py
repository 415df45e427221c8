"""Look into a folder of shards: what is in it, how long its examples are, and some rows as text.

    python -m electra_composer.preview data/owt
    python -m electra_composer.preview data/owt --rows 5 --checkpoint runs/electra-small

With a checkpoint, its generator fills the masked positions, and its discriminator says of every token what it thinks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.row_dataset import COLUMNS, collate_rows
from electra_composer.batches.row_reader import RowReader, Rows, reader_of_split
from electra_composer.batches.shards import check_shards, check_split, read_meta
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import ObjectiveConfig, ShardsConfig
from electra_composer.errors import UserError, report_user_errors
from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.storage.shard_folder import Meta
from electra_composer.vocabulary import load_tokenizer

SAMPLE = 20_000  # rows that the histogram counts, evenly spaced
BINS, BAR = 12, 40

LEGEND = """  film            as it was, and not said to be replaced
  [film]          masked; the generator gave the same word back
  [film→movie]    masked; the generator put another word there
  !film           the discriminator says: replaced. Green: it is; red: it is not; yellow: it is, and was not noticed"""
GREEN, RED, YELLOW, DIM, RESET = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


class Token(NamedTuple):
    """One token of a row, and what the models made of it."""

    text: str
    segment: int  # 0: A, 1: B
    example: int  # 1, 2, …
    masked: bool = False
    sample: str | None = None  # what the generator put there; None without a checkpoint
    replaced: bool = False
    flagged: bool = False  # the discriminator says: replaced

    def render(self, color: bool) -> str:
        """See :data:`LEGEND`."""
        if self.masked:
            text = f"[{self.text}→{self.sample}]" if self.replaced else f"[{self.text}]"
        else:
            text = self.text
        text = f"!{text}" if self.flagged else text
        if not color:
            return text
        if self.flagged:
            return f"{GREEN if self.replaced else RED}{text}{RESET}"
        if self.replaced:
            return f"{YELLOW}{text}{RESET}"
        return f"{DIM}{text}{RESET}" if text in ("[CLS]", "[SEP]") else text


def describe_meta(meta: Meta) -> str:
    """What `meta.json` says, for people."""
    tokenizer = meta.tokenizer
    lines = [
        f"{meta.folder}: rows of at most {meta.max_seq_length} tokens, {meta.packing}, seed {meta.seed}",
        f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} entries, SHA-256 {tokenizer.vocabulary_sha256[:8]}…",
        "converted with " + ", ".join(f"{name}={value}" for name, value in sorted(meta.conversion.items())),
        f"{'':8}{'documents':>12}{'examples':>12}{'rows':>12}{'tokens':>16}{'fill':>9}{'dropped':>12}",
    ]
    for name, counts in meta.splits.items():
        lines.append(
            f"{name:8}{counts.documents:12,}{counts.examples:12,}{counts.rows:12,}{counts.tokens:16,}"
            f"{counts.fill(meta.max_seq_length):9.2%}{counts.dropped_tokens:12,}"
        )
    return "\n".join(lines)


def histogram(lengths: NDArray[np.int64], max_seq_length: int) -> str:
    """How many of the examples are how long, a line for each of up to twelve ranges of equal width."""
    width = -(-max_seq_length // BINS)
    counts = np.bincount((lengths - 1) // width)
    lines = [f"lengths of {len(lengths):,} examples: mean {lengths.mean():.1f}, median {np.median(lengths):.0f}"]
    for index, count in enumerate(counts.tolist()):
        first, last = index * width + 1, min((index + 1) * width, max_seq_length)
        bar = "█" * round(BAR * count / counts.max())
        lines.append(f"  {first:4} to {last:4}  {count / len(lengths):6.1%}  {bar}")
    return "\n".join(lines)


def example_lengths(reader: RowReader, rows: int) -> NDArray[np.int64]:
    """Tokens of the examples in evenly spaced rows."""
    return _lengths(sample_of(reader, rows))


def sample_of(reader: RowReader, rows: int) -> Rows:
    """Evenly spaced rows, at most :data:`SAMPLE`."""
    return reader.read(np.arange(0, rows, -(-rows // SAMPLE)))


def _lengths(rows: Rows) -> NDArray[np.int64]:
    return rows.segment_lengths.astype(np.int64).reshape(-1, 2).sum(1)


def describe_pieces(ids: NDArray[np.integer], tokenizer: PreTrainedTokenizerFast, meta: Meta) -> str:
    """How well the vocabulary fits: what it does not know, pieces a word, and how much of it occurs in these rows."""
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


def tokens_of(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, meta: Meta, model: ElectraForPretraining | None, seed: int
) -> list[list[Token]]:
    """The tokens of some rows, masked as in training and, with a model, filled and judged."""
    packed = torch.from_numpy(collate_rows(rows, meta.max_seq_length, meta.tokenizer.special_ids["pad"]))
    batch = dict(zip(COLUMNS, packed, strict=True))
    ids, sequence_ids = batch["input_ids"], batch["sequence_ids"]
    masked = torch.zeros_like(ids, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    if model is None:
        special = tuple(meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep"))
        candidates = masking.maskable(ids, sequence_ids, special)
        probability = ObjectiveConfig().mask_prob
        slots = masking.num_slots(probability, meta.max_seq_length)
        counts = masking.mask_counts(candidates, sequence_ids, probability, slots)
        noise = torch.rand(ids.shape, generator=generator)
        positions, weights = masking.choose_positions(candidates, counts, slots, noise)
        corrupted = flagged = None
    else:
        with torch.no_grad():
            outputs = model(**batch, noise=model.draw_noise(ids, generator))
        positions, weights = outputs["masked_positions"], outputs["masked_weights"]
        corrupted, flagged = outputs["corrupted_ids"], outputs["rtd_logits"] > 0
    masked.scatter_(1, positions, weights > 0)
    result = []
    for row in range(len(ids)):
        length = int((sequence_ids[row] > 0).sum())
        texts = tokenizer.convert_ids_to_tokens(ids[row, :length].tolist())
        samples = None if corrupted is None else tokenizer.convert_ids_to_tokens(corrupted[row, :length].tolist())
        result.append(
            [
                Token(
                    texts[place],
                    int(batch["token_type_ids"][row, place]),
                    int(sequence_ids[row, place]),
                    bool(masked[row, place]),
                    None if samples is None else samples[place],
                    corrupted is not None and bool(corrupted[row, place] != ids[row, place]),
                    flagged is not None and bool(flagged[row, place]),
                )
                for place in range(length)
            ]
        )
    return result


def render(tokens: list[Token], color: bool) -> Iterator[str]:
    """A line for each segment of each example."""
    for example in range(1, tokens[-1].example + 1):
        for segment, name in ((0, "A"), (1, "B")):
            chosen = [token for token in tokens if (token.example, token.segment) == (example, segment)]
            if chosen:
                text = " ".join(token.render(color) for token in chosen).replace(" ##", "")
                yield f"  {example if segment == 0 else '':>2} {name}  {text}"


@report_user_errors
def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m electra_composer.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="a folder of shards on this machine")
    parser.add_argument("--split", default="train")
    parser.add_argument("--rows", type=int, default=3, help="how many are shown as text (%(default)s)")
    parser.add_argument("--checkpoint", help="a .pt file or run folder of pretrain.py")
    parser.add_argument("--seed", type=int, default=0, help="which rows, masks and samples")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    options = parser.parse_args(arguments)
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
                f"{options.checkpoint} knows {checkpoint.model_config.max_positions} positions, but the rows of "
                f"{options.folder} have up to {meta.max_seq_length}; convert with a smaller --max-seq-length"
            )
    rows = meta.splits[options.split].rows
    reader = reader_of_split(options.folder, options.split)
    if reader is None:
        raise UserError(f"{options.folder}: some shards are compressed; a run that reads them unpacks them")
    print(describe_meta(meta))
    sample = sample_of(reader, rows)
    print(f"\n{histogram(_lengths(sample), meta.max_seq_length)}")
    print(f"\n{describe_pieces(sample.input_ids, tokenizer, meta)}")
    numbers = np.sort(np.random.default_rng(options.seed).choice(rows, min(options.rows, rows), replace=False))
    if not len(numbers):
        return
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for number, tokens in zip(
        numbers.tolist(), tokens_of(reader.read(numbers), tokenizer, meta, model, options.seed), strict=True
    ):
        print(f"\nrow {number:,} of {options.split}: {len(tokens)} tokens")
        print("\n".join(render(tokens, color)))
    print(f"\n{LEGEND if model is not None else LEGEND.splitlines()[0] + chr(10) + '  [film]          masked'}")


if __name__ == "__main__":
    main()
