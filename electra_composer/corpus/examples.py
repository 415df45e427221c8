"""Build ELECTRA examples from tokenized lines, and pack them into rows; all randomness is from an explicit generator.

The rules and the order of the random draws are those of google-research/electra, `build_pretraining_dataset.py`
(`ExampleBuilder`), so that the same random numbers give the same examples.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from electra_composer.corpus.options import Overflow
from electra_composer.storage.row_lengths import MIN_SEQ_LENGTH

Ids = NDArray[np.int32]

WINDOW = 8192
OPEN_ROWS = 2048
_MIN_EXAMPLE = 3  # [CLS], one token, [SEP]
_ONE_SEGMENT_TARGET = 100_000  # longer than any example, so that every line goes to the first segment

# A sentence ends at .!? or their equivalents in other scripts (with closing quotes or brackets) before whitespace, or
# without it, as in "fine.Then"; in Chinese and Japanese, which have no spaces, it ends at every full stop.
_ENDS, _FULL_WIDTH_ENDS = ".!?…।॥؟۔։።", "。！？｡"
_CLOSING = "\"')\\]»”’」』）》〉】"
_SENTENCE_END = re.compile(
    rf"(?<=[{_ENDS}])[{_CLOSING}]*\s+|[{_FULL_WIDTH_ENDS}]+[{_CLOSING}]*\s*|(?<=[a-z][.!?])(?=[A-Z][a-z])"
)
_ASCII_SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"')\]]*\s+|(?<=[a-z][.!?])(?=[A-Z][a-z])"
)  # same for ASCII, a third faster


class Example(NamedTuple):
    """One ELECTRA example: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`."""

    ids: NDArray[np.integer]  # [length_a + length_b]
    length_a: int  # tokens of A with its [CLS] and [SEP]
    length_b: int  # tokens of B with its [SEP], or 0


class Row(NamedTuple):
    """Complete examples, concatenated; one sample of the shards."""

    input_ids: NDArray[np.integer]  # [at most max_seq_length]
    segment_lengths: NDArray[np.uint16]  # [2 × examples]: length_a and length_b of each


def split_sentences(text: str) -> list[str]:
    """Split a line at the ends of sentences, losing only the whitespace between them.

    Examples need lines much shorter than `max_seq_length`; an occasional split after "Mr." does no harm.
    """
    sentences, start = [], 0
    pattern = _ASCII_SENTENCE_END if text.isascii() else _SENTENCE_END
    for match in pattern.finditer(text):
        end = match.end()
        sentences.append(text[start:end].strip())
        start = end
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


class ExampleBuilder:
    """Builds examples from the tokenized lines of documents.

    Lines are added until their tokens reach the target length; then they become one example, and the next target is
    drawn: `max_seq_length`, or with probability 5% a length in [5, `max_seq_length`]. With probability 10% the example
    has one segment.

    Args:
        max_seq_length: maximum number of tokens of an example, special tokens included.
        cls_id, sep_id: ids of `[CLS]` and `[SEP]`.
        rng: for all draws, in this order: whether the example has one segment; the segment of each line that may go to
            either; whether the next target is short; its length.
        overflow: `cut` drops the tokens that do not fit the segments, as the original code does; `carry` starts the
            next example of the same document with them, so that no token is lost.

    Attributes:
        dropped_tokens: tokens dropped so far.
    """

    def __init__(self, max_seq_length: int, cls_id: int, sep_id: int, rng: Random, overflow: Overflow = "cut") -> None:
        if max_seq_length < MIN_SEQ_LENGTH:
            raise ValueError(f"max_seq_length is {max_seq_length}; expected at least {MIN_SEQ_LENGTH}")
        if overflow not in ("cut", "carry"):
            raise ValueError(f"overflow is {overflow!r}; expected 'cut' or 'carry'")
        self.max_seq_length = max_seq_length
        self.overflow = overflow
        self.dropped_tokens = 0
        self._cls = np.array([cls_id], np.int32)
        self._sep = np.array([sep_id], np.int32)
        self._rng = rng
        self._lines: list[Ids] = []
        self._length = 0
        self._target = max_seq_length

    def add_line(self, ids: Sequence[int] | Ids) -> Iterator[Example]:
        """Add the token ids of a line, and yield the examples that it completes (with `cut`, at most one)."""
        if len(ids) == 0:
            return
        self._add(np.asarray(ids, np.int32))
        while self._length >= self._target:
            yield self._create()

    def end_document(self) -> Iterator[Example]:
        """Yield the rest of a document as examples, however short; call after the last line of each document."""
        while self._length:
            yield self._create()

    def _add(self, line: Ids) -> None:
        self._lines.append(line)
        self._length += len(line)

    def _create(self) -> Example:
        one_segment = self._rng.random() < 0.1
        first, second = self._assign(_ONE_SEGMENT_TARGET if one_segment else (self._target - 3) // 2)
        first, first_rest = _cut(first, self.max_seq_length - 2)
        length_first = sum(map(len, first))
        second, second_rest = _cut(second, max(0, self.max_seq_length - length_first - 3))

        self._lines, self._length = [], 0
        for rest in (*first_rest, *second_rest):
            if self.overflow == "carry":
                self._add(rest)
            else:
                self.dropped_tokens += len(rest)
        short = self._rng.random() < 0.05
        self._target = self._rng.randint(MIN_SEQ_LENGTH, self.max_seq_length) if short else self.max_seq_length

        parts = [self._cls, *first, self._sep, *second, *([self._sep] if second else [])]
        ids = np.concatenate(parts)
        return Example(ids, length_first + 2, len(ids) - length_first - 2)

    def _assign(self, first_target: int) -> tuple[list[Ids], list[Ids]]:
        """Assign the lines to the two segments."""
        first: list[Ids] = []
        second: list[Ids] = []
        length_first = 0
        for line in self._lines:
            if (
                length_first == 0
                or length_first + len(line) < first_target
                or (not second and length_first < first_target and self._rng.random() < 0.5)
            ):
                first.append(line)
                length_first += len(line)
            else:
                second.append(line)
        return first, second


def _cut(lines: list[Ids], length: int) -> tuple[list[Ids], list[Ids]]:
    """Split lines after `length` tokens; slices are views, so that long lines are cheap."""
    kept: list[Ids] = []
    rest: list[Ids] = []
    for line in lines:
        if length > 0:
            kept.append(line[:length])
            if len(line) > length:
                rest.append(line[length:])
            length -= len(kept[-1])
        else:
            rest.append(line)
    return kept, rest


def one_per_row(examples: Iterable[Example]) -> Iterator[Row]:
    """Yield each example as a row of its own."""
    return (_row([example]) for example in examples)


class Packer:
    """Packs examples into rows by best fit: each goes, uncut, into the open row where it leaves the least space.

    Examples are sorted by length (longest first) within a window, because the corpus does not fit in memory; at length
    512 this saves 2% of the rows.

    Args:
        max_seq_length: maximum number of tokens of a row.
        window: number of examples sorted at a time.
        open_rows: maximum number of rows that wait for more examples; beyond it, the fullest row is closed.
    """

    def __init__(self, max_seq_length: int, window: int = WINDOW, open_rows: int = OPEN_ROWS) -> None:
        self._max_seq_length = max_seq_length
        self._window = window
        self._open_rows = open_rows
        self._examples: list[Example] = []
        self._by_space: list[deque[list[Example]]] = [deque() for _ in range(max_seq_length + 1)]
        self._spaces = 0  # bit s is set if an open row has s tokens of space, so that the best fit is one bit operation
        self._count = 0

    def add(self, example: Example) -> Iterator[Row]:
        """Add an example, and yield the rows that this closes, in the order of closing."""
        if len(example.ids) > self._max_seq_length:
            raise ValueError(
                f"an example of {len(example.ids)} tokens does not fit rows of {self._max_seq_length} tokens"
            )
        self._examples.append(example)
        if len(self._examples) >= self._window:
            yield from self._place_window()

    def _place_window(self) -> Iterator[Row]:
        self._examples.sort(key=lambda example: len(example.ids), reverse=True)
        for example in self._examples:
            yield from self._place(example)
        self._examples.clear()

    def _place(self, example: Example) -> Iterator[Row]:
        length = len(example.ids)
        fitting = self._spaces >> length
        if fitting:
            space = length + _lowest_bit(fitting)
            row = self._take(space)
        else:
            space, row = self._max_seq_length, []
        row.append(example)
        space -= length
        if space < _MIN_EXAMPLE:
            yield _row(row)
            return
        self._by_space[space].append(row)
        self._spaces |= 1 << space
        self._count += 1
        if self._count > self._open_rows:
            yield _row(self._take(_lowest_bit(self._spaces)))

    def finish(self) -> Iterator[Row]:
        """Yield the rows of the last examples, then the rows that are still open, fullest first."""
        yield from self._place_window()
        while self._spaces:
            yield _row(self._take(_lowest_bit(self._spaces)))

    def _take(self, space: int) -> list[Example]:
        row = self._by_space[space].popleft()
        self._count -= 1
        if not self._by_space[space]:
            self._spaces ^= 1 << space
        return row


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _row(examples: list[Example]) -> Row:
    ids = examples[0].ids if len(examples) == 1 else np.concatenate([example.ids for example in examples])
    lengths = [length for example in examples for length in (example.length_a, example.length_b)]
    return Row(ids, np.array(lengths, np.uint16))
