"""Texts to token ids, and pairs of texts to rows `[CLS] A [SEP] B [SEP]`."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.tasks.encoded import EncodedRows

TOKENIZER_CHUNK = 4096  # texts per call of the tokenizer, and per step of the progress bar
JOIN_CHUNK = 16384  # rows: index arrays of 64 MiB for rows of 512 tokens

Length = TypeVar("Length", int, NDArray[np.int64])


class Pieces(NamedTuple):
    """Token ids of texts, without special tokens: text i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: int32 `[all tokens]`.
        offsets: int64 `[texts + 1]`.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each text, int64 `[texts]`."""
        return np.diff(self.offsets)


class Spans(NamedTuple):
    """Parts of token ids: span i is `tokens[starts[i]:starts[i] + lengths[i]]`. They may overlap.

    Attributes:
        tokens: int32 `[all tokens]`.
        starts, lengths: int64 `[spans]`.
    """

    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def tokenize(
    texts: Iterable[Sequence[str]], columns: int, tokenizer: PreTrainedTokenizerFast, title: str, progress: bool = False
) -> list[Pieces]:
    """Tokenize texts without truncation. They are read as they are needed, and not kept.

    Args:
        texts: the texts of each example.
        columns: number of texts per example.
        title: of the progress bar.
        progress: show a progress bar if the output is a terminal.

    Returns:
        The first texts of all examples, then the second ones.
    """
    flat, lengths = [array("i") for _ in range(columns)], [array("q") for _ in range(columns)]
    rest = iter(texts)
    with tqdm(desc=f"tokenizing {title}", unit="ex", leave=False, disable=None if progress else True) as bar:
        while chunk := list(itertools.islice(rest, TOKENIZER_CHUNK)):
            for column in range(columns):
                # verbose=False: no warning of texts longer than the position table, which are truncated later.
                encoded = tokenizer(
                    [each[column] for each in chunk],
                    add_special_tokens=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )["input_ids"]
                for ids in encoded:
                    flat[column].extend(ids)
                lengths[column].extend(map(len, encoded))
            bar.update(len(chunk))
    return [
        Pieces(np.array(tokens, dtype=np.int32), offsets_of(np.array(counts, dtype=np.int64)))
        for tokens, counts in zip(flat, lengths, strict=True)
    ]


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 and the cumulative sum of lengths, int64 `[rows + 1]`."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])


def truncated_lengths(first: Length, second: Length, budget: int) -> tuple[Length, Length]:
    """Return the lengths of A and B truncated to `budget` tokens: pop from the longer, from B if equal.

    Source: `_truncate_seq_pair` of google-research/electra `finetune/classification/classification_tasks.py`, here in
    closed form.
    """
    kept = (
        np.minimum(first, np.maximum(budget - second, budget - budget // 2)),
        np.minimum(second, np.maximum(budget - first, budget // 2)),
    )
    return kept if isinstance(first, np.ndarray) else (int(kept[0]), int(kept[1]))


def full_lengths(first: Pieces, second: Pieces | None) -> NDArray[np.int64]:
    """Return the number of tokens of each row of :func:`join` without truncation, int64 `[rows]`."""
    if second is None:
        return first.lengths + 2
    return first.lengths + 2 + second.lengths + (second.lengths > 0)


def join(first: Pieces, second: Pieces | None, max_seq_length: int, cls: int, sep: int) -> EncodedRows:
    """Truncate texts to `max_seq_length` tokens in all, and add the special tokens.

    An empty B gives a row with two special tokens, as in google-research/electra.
    """
    before = first.lengths
    after = np.zeros_like(before) if second is None else second.lengths
    singles = np.minimum(before, max_seq_length - 2)
    pairs = truncated_lengths(before, after, max_seq_length - 3)
    before, after = np.where(after > 0, pairs[0], singles), np.where(after > 0, pairs[1], 0)
    spans = None if second is None else Spans(second.tokens, second.offsets[:-1], after)
    return join_spans(Spans(first.tokens, first.offsets[:-1], before), spans, cls, sep)


def join_spans(first: Spans, second: Spans | None, cls: int, sep: int) -> EncodedRows:
    """Build the rows `[CLS] A [SEP] B [SEP]` of spans of A and B; without B, or where it is empty, `[CLS] A [SEP]`."""
    before = first.lengths
    after = np.zeros_like(before) if second is None else second.lengths
    offsets = offsets_of(before + after + 2 + (after > 0))
    tokens = np.full(offsets[-1], sep, dtype=np.int32)
    tokens[offsets[:-1]] = cls
    for start in range(0, len(before), JOIN_CHUNK):
        rows = slice(start, start + JOIN_CHUNK)
        places = offsets[:-1][rows] + 1
        tokens[indices(places, before[rows])] = first.tokens[indices(first.starts[rows], before[rows])]
        if second is not None:
            places = places + before[rows] + 1
            tokens[indices(places, after[rows])] = second.tokens[indices(second.starts[rows], after[rows])]
    return EncodedRows(tokens, offsets, before + 2)


def indices(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate `starts[i], starts[i] + 1, …`, of `lengths[i]` each."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
