"""Sentences as lists of words: token ids, and rows of at most the window's length in which every word is once."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.tasks.base import Tokenized
from electra_composer.tasks.encoded import IGNORED, EncodedRows
from electra_composer.tasks.tokenization import TOKENIZER_CHUNK, indices, offsets_of

GATHER_CHUNK = 4096  # rows


class Sentence(NamedTuple):
    """One sentence to tokenize.

    Attributes:
        words: the words, or text that the tokenizer divides into words.
        labels: number of the tag of each word; None if they are unknown.
        document: equal for neighbouring sentences of one document.
        is_example: False: it only is context of others.
        where: its place, for messages.
    """

    words: list[str] | str
    labels: list[int] | None
    document: object
    is_example: bool
    where: str


class Words(NamedTuple):
    """The words of an example, for predictions.

    Attributes:
        words: the words.
        text: the text that they are from; None if words were given.
        places: begin and end of each word in the text, in characters.
        where: place of the example, for messages.
    """

    words: list[str]
    text: str | None
    places: list[tuple[int, int]]
    where: str


@dataclass
class Sentences(Tokenized):
    """Sentences as token ids, without special tokens.

    Attributes:
        tokens: of all sentences, those that only are context included, int32 `[all tokens]`.
        bounds: begin and end of each example in `tokens`, int64 `[examples, 2]`.
        documents: begin and end of its document in `tokens`, int64 `[examples, 2]`; with context only.
        word_offsets: int64 `[examples + 1]`: example i has the words `word_offsets[i]:word_offsets[i + 1]`.
        first_tokens: position in `tokens` of the first token of each word, -1 for a word without any, such as one of
            control characters, int64 `[words]`.
        labels: number of the tag of each word, int64 `[words]`; None if not all examples have tags.
        words: of each example; None for training examples.
    """

    tokens: NDArray[np.int32]
    bounds: NDArray[np.int64]
    documents: NDArray[np.int64] | None
    word_offsets: NDArray[np.int64]
    first_tokens: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    words: list[Words] | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example and its context with special tokens, int64 `[examples]`."""
        return np.diff(self.bounds if self.documents is None else self.documents, axis=1)[:, 0] + 2


def tokenize_sentences(
    sentences: Iterable[Sentence],
    tokenizer: PreTrainedTokenizerFast,
    split: str,
    context: bool,
    keep_words: bool,
    progress: bool = False,
) -> Sentences:
    """Tokenize words, each by itself, as google-research/electra does. Sentences are read as they are needed.

    Args:
        context: note the documents.
        keep_words: keep the words, for predictions.
        progress: show a progress bar if the output is a terminal.
    """
    tokens, first_tokens, labels = array("i"), array("q"), array("q")
    bounds, counts = array("q"), array("q")
    document_of, document_bounds = array("q"), array("q", [0])
    words: list[Words] = []
    is_labelled, document, rest = True, object(), iter(sentences)
    with tqdm(desc=f"tokenizing {split}", unit="ex", leave=False, disable=None if progress else True) as bar:
        while chunk := list(itertools.islice(rest, TOKENIZER_CHUNK)):
            for sentence, encoding in zip(chunk, _encode([each.words for each in chunk], tokenizer), strict=True):
                begin = len(tokens)
                if sentence.document != document:
                    document = sentence.document
                    if begin > document_bounds[-1]:
                        document_bounds.append(begin)
                tokens.extend(encoding.ids)
                if not sentence.is_example:
                    continue
                firsts = _first_of_words(sentence.words, encoding)
                first_tokens.extend(begin + first if first >= 0 else -1 for first in firsts)
                counts.append(len(firsts))
                bounds.extend((begin, len(tokens)))
                document_of.append(len(document_bounds) - 1)
                if sentence.labels is None:
                    is_labelled = False
                else:
                    labels.extend(sentence.labels)
                if keep_words:
                    words.append(_words_of(sentence, encoding, firsts))
            bar.update(len(chunk))
    document_bounds.append(len(tokens))
    pairs = np.stack([np.array(document_bounds[:-1]), np.array(document_bounds[1:])], axis=1)
    return Sentences(
        split,
        np.array(tokens, dtype=np.int32),
        np.array(bounds, dtype=np.int64).reshape(-1, 2),
        pairs[np.array(document_of, dtype=np.int64)] if context else None,
        offsets_of(np.array(counts, dtype=np.int64)),
        np.array(first_tokens, dtype=np.int64),
        np.array(labels, dtype=np.int64) if is_labelled else None,
        words if keep_words else None,
    )


def _encode(sentences: Sequence[list[str] | str], tokenizer: PreTrainedTokenizerFast) -> list[Encoding]:
    found: dict[int, Encoding] = {}
    for is_split in (True, False):
        chosen = [number for number, words in enumerate(sentences) if isinstance(words, list) is is_split]
        if chosen:
            # verbose=False: no warning of sentences longer than the position table, which are divided later.
            encoded = tokenizer(
                [sentences[number] for number in chosen],
                is_split_into_words=is_split,
                add_special_tokens=False,
                verbose=False,
            )
            found.update(zip(chosen, encoded.encodings, strict=True))
    return [found[number] for number in range(len(sentences))]


def _first_of_words(words: list[str] | str, encoding: Encoding) -> list[int]:
    """Return the position of the first token of each word, -1 for a word without tokens."""
    ids = encoding.word_ids
    firsts = [-1] * (len(words) if isinstance(words, list) else max(ids, default=-1) + 1)
    for position in range(len(ids) - 1, -1, -1):
        firsts[ids[position]] = position
    return firsts if isinstance(words, list) else [first for first in firsts if first >= 0]


def _words_of(sentence: Sentence, encoding: Encoding, firsts: Sequence[int]) -> Words:
    words = sentence.words
    if isinstance(words, list):
        return Words(words, None, [], sentence.where)
    places = [
        (encoding.offsets[first][0], encoding.offsets[end - 1][1])
        for first, end in zip(firsts, [*firsts, len(encoding.ids)][1:], strict=True)
    ]
    return Words([words[begin:end] for begin, end in places], words, places, sentence.where)


def divide(sentences: Sentences, max_seq_length: int, overlap: int, cls: int, sep: int) -> EncodedRows:
    """Make rows `[CLS] tokens [SEP]` of at most `max_seq_length` tokens in which every word is labelled once.

    A sentence that fits is one row, filled with the neighbouring text of its document if there is context: half of the
    room on each side, or more where the other side has less (as LUKE does, arXiv 2010.01057). A longer sentence is
    several rows. A word belongs to the row in the middle of which its first token is nearest, and so has the most
    context there (as in the reading comprehension of google-research/bert). Rows without words are left out; of an
    example without any token one row remains.

    Args:
        overlap: number of tokens that neighbouring rows of a sentence share, at most half of a row.

    Returns:
        Rows with `labels` or, of examples without tags, `words` per token: the label of a word, or 1, at its first
        token, :data:`IGNORED` elsewhere. The words of all rows that have tokens are in the order of the examples.
    """
    room = max_seq_length - 2
    step = room - min(overlap, room // 2)
    begins, ends = sentences.bounds.T
    lengths = ends - begins
    counts = 1 + np.maximum(0, -(-(lengths - room) // step))
    row_offsets = offsets_of(counts)
    example = np.repeat(np.arange(len(counts)), counts)
    # The last row ends with the sentence.
    last = np.maximum(0, lengths - room)
    shifts = np.minimum((np.arange(len(example)) - row_offsets[example]) * step, last[example])
    row_begins = begins[example] + shifts
    row_ends = np.minimum(row_begins + room, ends[example])
    if sentences.documents is not None:
        free = room - (row_ends - row_begins)
        before, after = begins - sentences.documents[:, 0], sentences.documents[:, 1] - ends
        left = np.minimum(before[example], np.maximum(free // 2, free - after[example]))
        right = np.minimum(after[example], free - left)
        row_begins, row_ends = row_begins - left, row_ends + right

    has_token = sentences.first_tokens >= 0
    firsts = sentences.first_tokens[has_token]
    word_example = np.repeat(np.arange(len(counts)), np.diff(sentences.word_offsets))[has_token]
    places = firsts - begins[word_example]
    # Twice the distance to the middle of a row; all rows of a longer sentence but the last are `step` tokens apart.
    nearest = np.clip((2 * places - room + 1 + step) // (2 * step), 0, np.maximum(0, counts[word_example] - 2))
    distance = abs(2 * (places - nearest * step) - room + 1)
    is_last = abs(2 * (places - last[word_example]) - room + 1) < distance
    row = row_offsets[word_example] + np.where(is_last, counts[word_example] - 1, nearest)

    kept = np.bincount(row, minlength=len(example)) > 0
    kept[row_offsets[:-1]] = True
    row_begins, row_ends = row_begins[kept], row_ends[kept]
    row = (np.cumsum(kept) - 1)[row]
    offsets = offsets_of(row_ends - row_begins + 2)
    tokens = np.full(offsets[-1], sep, dtype=np.int32)
    tokens[offsets[:-1]] = cls
    for start in range(0, len(row_begins), GATHER_CHUNK):
        part = slice(start, start + GATHER_CHUNK)
        widths = row_ends[part] - row_begins[part]
        tokens[indices(offsets[:-1][part] + 1, widths)] = sentences.tokens[indices(row_begins[part], widths)]
    name, values = ("words", 1) if sentences.labels is None else ("labels", sentences.labels[has_token])
    labels = np.full(len(tokens), IGNORED, dtype=np.int32)
    labels[offsets[row] + 1 + firsts - row_begins[row]] = values
    return EncodedRows(tokens, offsets, np.diff(offsets), per_token={name: labels}, source=sentences)
