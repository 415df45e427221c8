"""Tokens of questions and their contexts, and the windows into which contexts are divided."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.tasks.base import Tokenized
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.questions import Answers, Question
from electra_composer.tasks.tokenization import Pieces, Spans, join_spans, offsets_of, tokenize

MAX_QUESTION_LENGTH = 64  # tokens; `max_query_length` of google-research/electra
CONTEXT_CHUNK = 512  # contexts per call of the tokenizer, which returns their offsets as Python objects
SPECIALS = 3  # tokens of a row beside question and context


@dataclass
class QuestionTexts:
    """What predictions and scores need of the examples, besides tokens.

    Attributes:
        ids: None for a table without ids.
        where: the place of each example, for messages.
        questions: of each example.
        answers: right answers of each example; None where they are not known.
        contexts: the distinct contexts.
        places: int32 `[all tokens of the contexts, 2]`, first character of each token and the one after its last.
    """

    ids: list[str | None]
    where: list[str]
    questions: list[str]
    answers: list[Answers | None]
    contexts: list[str]
    places: NDArray[np.int32]


@dataclass
class Questions(Tokenized):
    """Questions, and each distinct context once.

    Attributes:
        questions: tokens of all questions; rows have at most :data:`MAX_QUESTION_LENGTH` of them.
        contexts: tokens of the distinct contexts.
        context_of: int64 `[examples]`, the context of each question.
        answers: int64 `[examples, 2]`, first and last token of the first answer in the context; -1: no answer.
        texts: None for training examples.
    """

    questions: Pieces
    contexts: Pieces
    context_of: NDArray[np.int64]
    answers: NDArray[np.int64]
    texts: QuestionTexts | None

    @property
    def question_lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each question in its rows, int64 `[examples]`."""
        return np.minimum(self.questions.lengths, MAX_QUESTION_LENGTH)

    @property
    def context_lengths(self) -> NDArray[np.int64]:
        """Number of tokens of the context of each question, int64 `[examples]`."""
        return self.contexts.lengths[self.context_of]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.question_lengths + self.context_lengths + SPECIALS


@dataclass
class Windows:
    """The example and the part of its context in each row.

    Attributes:
        examples: all examples.
        example: int64 `[rows]`, index of the example; rows of one example follow each other.
        firsts: int64 `[rows]`, first token of the window in the context.
    """

    examples: Questions
    example: NDArray[np.int64]
    firsts: NDArray[np.int64]


class _Contexts:
    """Distinct contexts, tokenized in chunks. They are told apart by their hashes; `texts` has them if `keep`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, keep: bool):
        self.tokenizer = tokenizer
        self.keep = keep
        self.texts: list[str] = []
        self._known: dict[bytes, int] = {}
        self._chunk: list[str] = []
        self._tokens, self._places, self._lengths = array("i"), array("i"), array("q")

    def add(self, text: str) -> int:
        """Return the index of a context."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        index = self._known.setdefault(digest, len(self._known))
        if index == len(self._lengths) + len(self._chunk):
            self._chunk.append(text)
            if self.keep:
                self.texts.append(text)
            if len(self._chunk) == CONTEXT_CHUNK:
                self._tokenize()
        return index

    def _tokenize(self) -> None:
        encoded = self.tokenizer(
            self._chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            self._tokens.extend(ids)
            self._places.extend(itertools.chain.from_iterable(places))
            self._lengths.append(len(ids))
        self._chunk = []

    def finish(self) -> tuple[Pieces, NDArray[np.int32]]:
        """Return the tokens of all contexts, and the characters of each as in :class:`QuestionTexts`."""
        if self._chunk:
            self._tokenize()
        lengths = np.array(self._lengths, dtype=np.int64)
        places = np.array(self._places, dtype=np.int32).reshape(-1, 2)
        return Pieces(np.array(self._tokens, dtype=np.int32), offsets_of(lengths)), places


def tokenize_questions(
    examples: Iterable[Question], split: str, tokenizer: PreTrainedTokenizerFast, progress: bool = False
) -> Questions:
    """Tokenize questions and each distinct context once, and find the tokens of the first answers.

    Args:
        examples: read as they are needed; texts are not kept for the split `train`.
        split: name of the split.
    """
    keep = split != "train"
    contexts = _Contexts(tokenizer, keep)
    kept = QuestionTexts([], [], [], [], contexts.texts, np.zeros((0, 2), dtype=np.int32))
    context_of, spans = array("q"), array("q")

    def texts() -> Iterator[tuple[str]]:
        for example in examples:
            context_of.append(contexts.add(example.context))
            spans.extend(example.span or (-1, -1))
            if keep:
                kept.ids.append(example.id)
                kept.where.append(example.where)
                kept.questions.append(example.question)
                kept.answers.append(example.answers)
            yield (example.question,)

    questions = tokenize(texts(), 1, tokenizer, split, progress)[0]
    pieces, kept.places = contexts.finish()
    of = np.array(context_of, dtype=np.int64)
    answers = _tokens_of(np.array(spans, dtype=np.int64).reshape(-1, 2), of, pieces, kept.places)
    return Questions(split, questions, pieces, of, answers, kept if keep else None)


def _tokens_of(
    spans: NDArray[np.int64], context_of: NDArray[np.int64], contexts: Pieces, places: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Return the first and last token in the context that share a character with each span; -1 without a span."""
    # One sorted array for all contexts: the number of the context is in the high bits.
    base = np.repeat(np.arange(len(contexts.lengths)) << 32, contexts.lengths)
    offsets = contexts.offsets[:-1][context_of]
    first = np.searchsorted(base + places[:, 1], (context_of << 32) + spans[:, 0], side="right") - offsets
    last = np.searchsorted(base + places[:, 0], (context_of << 32) + spans[:, 1], side="left") - 1 - offsets
    # Characters that the tokenizer drops belong to the token before them.
    tokens = np.stack([np.minimum(first, last), last], axis=1)
    tokens[(spans[:, 0] < 0) | (tokens[:, 0] < 0)] = -1
    return tokens


def build_windows(
    examples: Questions, tokenizer: PreTrainedTokenizerFast, max_seq_length: int, stride: int
) -> EncodedRows:
    """Build rows `[CLS] question [SEP] window of the context [SEP]` of at most `max_seq_length` tokens.

    A window begins `stride` tokens after the one before it, or where that one ends if it is shorter than `stride`; the
    last one ends with the context. Source: `featurize` of google-research/electra `finetune/qa/qa_tasks.py`.

    Args:
        stride: tokens between the starts of windows.

    Returns:
        `source` is :class:`Windows`. Training rows have `start_positions` and `end_positions`, the first and last token
        of the answer in the row, 0 if it is not entirely inside, and `impossible`, 1 for questions without an answer.
        Other rows have `may_start` per token: 1 where this window is the one with most context for a token of the
        context (see :func:`most_context`), else 0.

    Raises:
        UserError: `max_seq_length` leaves no room for a context beside a question.
    """
    before, whole = examples.question_lengths, examples.context_lengths
    room = max_seq_length - before - SPECIALS
    if room.min() < 1:
        raise UserError(
            f"data.max_seq_length={max_seq_length} leaves no room for the context beside a question of {before.max()} "
            f"tokens in {examples.split}; expected at least {before.max() + SPECIALS + 1} (questions are cut to "
            f"{MAX_QUESTION_LENGTH} tokens)"
        )
    step = np.minimum(stride, room)
    counts = 1 + np.maximum(0, -(-(whole - room) // step))
    example = np.repeat(np.arange(len(before)), counts)
    firsts = (np.arange(len(example)) - (np.cumsum(counts) - counts)[example]) * step[example]
    lengths = np.minimum(room[example], whole[example] - firsts)
    context_starts = examples.contexts.offsets[:-1][examples.context_of][example]
    rows = join_spans(
        Spans(examples.questions.tokens, examples.questions.offsets[:-1][example], before[example]),
        Spans(examples.contexts.tokens, context_starts + firsts, lengths),
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    )
    rows.source = Windows(examples, example, firsts)
    if examples.split == "train":
        answers = examples.answers[example]
        inside = (answers[:, 0] >= firsts) & (answers[:, 1] < firsts + lengths) & (answers[:, 0] >= 0)
        positions = np.where(inside[:, None], answers - firsts[:, None] + rows.first_lengths[:, None], 0)
        rows.per_row["start_positions"], rows.per_row["end_positions"] = positions[:, 0], positions[:, 1]
        rows.per_row["impossible"] = (answers[:, 0] < 0).astype(np.int64)
    else:
        rows.per_token["may_start"] = most_context(rows, lengths)
    return rows


def most_context(rows: EncodedRows, lengths: NDArray[np.int64]) -> NDArray[np.int8]:
    """Return 1 for the tokens of the context that have most context in this window of all, int8 `[all tokens]`.

    The context of a token is the smaller one of the numbers of tokens before and after it in the window, plus 0.01
    times the length of the window; the first of equal windows counts. Source: `_check_is_max_context` of
    google-research/electra `finetune/qa/qa_tasks.py`.

    Args:
        lengths: number of tokens of the context in each window, int64 `[rows]`.
    """
    windows: Windows = rows.source
    row = np.repeat(np.arange(len(rows)), lengths)
    inner = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]  # position in the window
    scores = 100 * np.minimum(inner, lengths[row] - 1 - inner) + lengths[row]
    starts = offsets_of(windows.examples.context_lengths)[:-1]
    token = starts[windows.example[row]] + windows.firsts[row] + inner  # one number per token of an example's context
    best = np.zeros(windows.examples.context_lengths.sum(), dtype=np.int64)
    np.maximum.at(best, token, scores)
    is_best = scores == best[token]
    first = np.full(len(best), len(rows))
    np.minimum.at(first, token[is_best], row[is_best])
    result = np.zeros(len(rows.tokens), dtype=np.int8)
    result[rows.offsets[:-1][row] + rows.first_lengths[row] + inner] = is_best & (first[token] == row)
    return result
