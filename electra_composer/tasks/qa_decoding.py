"""The best answers of questions from the outputs for their windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from electra_composer.tasks.base import Output
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.qa_windows import Windows
from electra_composer.tasks.tokenization import offsets_of

ROW_CHUNK = 1024  # windows that are decoded together


class Candidates(NamedTuple):
    """Possible answers of all questions, best first: those of question i are at `offsets[i]:offsets[i + 1]`.

    Attributes:
        starts, ends: int64 `[candidates]`, first character in the context and the one after the last.
        scores: float64 `[candidates]`, sum of the two logits or log-probabilities.
        offsets: int64 `[questions + 1]`.
        null_scores: float64 `[questions]`, compared with the threshold of no answer; larger: less likely to have one.
        null_logits: float64 `[questions]`, logits of the probability of no answer.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    scores: NDArray[np.float64]
    offsets: NDArray[np.int64]
    null_scores: NDArray[np.float64]
    null_logits: NDArray[np.float64]

    @property
    def has_any(self) -> NDArray[np.bool_]:
        """Whether a question has candidates, bool `[questions]`; none has one whose context is empty."""
        return np.diff(self.offsets) > 0

    def best(self) -> Candidates:
        """Return the best candidate of each question alone."""
        first = self.offsets[:-1][self.has_any]
        offsets = offsets_of(self.has_any.astype(np.int64))
        return Candidates(
            self.starts[first], self.ends[first], self.scores[first], offsets, self.null_scores, self.null_logits
        )


class Found(NamedTuple):
    """Answers in windows, `[answers]` each: the row, the first and last token in the row, and the score."""

    rows: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lasts: NDArray[np.int64]
    scores: NDArray[np.float32]


def keep_logits(logits: NDArray[np.float32], lengths: Sequence[int]) -> list[Output]:
    """Return the logits of the tokens of each row, fp32 `[tokens of the row, 2]`, from `[rows, length, 2]`."""
    return [row[:length].copy() for row, length in zip(logits, lengths, strict=True)]


def decode_logits(rows: EncodedRows, outputs: Sequence[Output], n_best: int, max_answer_length: int) -> Candidates:
    """Find the best answers by the sum of the logits of start and end.

    Of each window, the `n_best` starts are combined with all ends that make a valid answer: in the context, and at most
    `max_answer_length` tokens long. A start counts in the window where it has most context.

    Args:
        outputs: logits `[tokens of the row, 2]` of each row. The score of no answer is that of `[CLS]`.
    """
    found = [
        _best_of_rows(rows, outputs, slice(first, first + ROW_CHUNK), n_best, max_answer_length)
        for first in range(0, len(rows), ROW_CHUNK)
    ]
    null_scores = np.array([float(output[0, 0]) + float(output[0, 1]) for output in outputs])
    candidates = _select(rows, Found(*map(np.concatenate, zip(*found, strict=True))), null_scores, n_best)
    has_any, firsts = candidates.has_any, candidates.offsets[:-1]
    smallest = candidates.null_scores[has_any]
    odds, logits = np.full((2, len(has_any)), np.inf)
    odds[has_any] = smallest - candidates.scores[firsts[has_any]]
    if has_any.any():
        logits[has_any] = smallest - np.logaddexp.reduceat(candidates.scores, firsts[has_any])
    return candidates._replace(null_scores=odds, null_logits=logits)


def _best_of_rows(
    rows: EncodedRows, outputs: Sequence[Output], part: slice, n_best: int, max_answer_length: int
) -> Found:
    logits = np.concatenate(outputs[part])
    lengths = rows.lengths[part]
    offsets = rows.offsets[part.start : part.start + len(lengths) + 1]
    places = np.arange(lengths.max())[None, :]
    is_token = places < lengths[:, None]
    starts = np.full(is_token.shape, -np.inf, dtype=np.float32)
    may_start = rows.per_token["may_start"][offsets[0] : offsets[-1]] == 1
    starts[is_token] = np.where(may_start, logits[:, 0], -np.inf)
    longest = min(max_answer_length, is_token.shape[1])
    # Ends beyond the row, so that every start has `longest` of them.
    ends = np.full((len(lengths), is_token.shape[1] + longest), -np.inf, dtype=np.float32)
    in_context = (places >= rows.first_lengths[part][:, None]) & (places < lengths[:, None] - 1)
    ends[:, : is_token.shape[1]][in_context] = logits[:, 1][in_context[is_token]]

    firsts = _largest(starts, n_best)  # [rows, n_best]
    lasts = firsts[:, :, None] + np.arange(longest)  # [rows, n_best, longest]
    index = np.arange(len(lengths))[:, None]
    scores = starts[index, firsts][:, :, None] + ends[index[:, :, None], lasts]
    scores, lasts = scores.reshape(len(lengths), -1), lasts.reshape(len(lengths), -1)
    best = _largest(scores, n_best)
    kept = np.isfinite(scores[index, best])
    return Found(
        np.broadcast_to(index + part.start, best.shape)[kept],
        firsts[index, best // longest][kept],
        lasts[index, best][kept],
        scores[index, best][kept],
    )


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` largest values of each row, in no order."""
    if count >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(-values, count - 1, axis=1)[:, :count]


def decode_beams(rows: EncodedRows, outputs: Sequence[Output], n_best: int) -> Candidates:
    """Find the best answers of the beams that :func:`keep_beams` has kept."""
    counts = np.array([len(output) - 1 for output in outputs])
    spans = np.concatenate([output[1:] for output in outputs])
    found = Found(
        np.repeat(np.arange(len(outputs)), counts),
        spans[:, 0].astype(np.int64),
        spans[:, 1].astype(np.int64),
        spans[:, 2],
    )
    candidates = _select(rows, found, np.array([output[0, 2] for output in outputs], dtype=np.float64), n_best)
    logits = np.where(candidates.has_any, candidates.null_scores, np.inf)
    return candidates._replace(null_scores=logits, null_logits=logits)


def keep_beams(
    starts: NDArray[np.int64],
    start_log_probs: NDArray[np.float32],
    ends: NDArray[np.int64],
    end_log_probs: NDArray[np.float32],
    no_answer: NDArray[np.float32] | None = None,
) -> list[Output]:
    """Return the valid answers in the beams of each row.

    Args:
        starts, start_log_probs, ends, end_log_probs: of `JointHead`.
        no_answer: logits of having no answer, `[rows]`; None: 0.

    Returns:
        fp32 `[1 + answers, 3]` for each row: `0, 0, no_answer`; then first token, last token, log-probability.
    """
    kept = []
    for row, scores in enumerate(start_log_probs[:, :, None] + end_log_probs):
        start, end = np.nonzero(np.isfinite(scores))
        null = 0.0 if no_answer is None else no_answer[row]
        columns = [
            np.append(0, starts[row, start]),
            np.append(0, ends[row, start, end]),
            np.append(null, scores[start, end]),
        ]
        kept.append(np.stack(columns, axis=1).astype(np.float32))
    return kept


def _select(rows: EncodedRows, found: Found, null_scores: NDArray[np.float64], n_best: int) -> Candidates:
    """Choose the best answers of each question from those of its windows.

    Args:
        null_scores: of the rows. Of the windows of a question the smallest counts.
    """
    windows: Windows = rows.source
    examples = windows.examples
    assert examples.texts is not None
    example = windows.example[found.rows]
    order = np.lexsort((found.lasts, found.firsts, found.rows, -found.scores, example))
    counts = np.bincount(example, minlength=len(examples.context_of))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = order[rank < n_best]
    row = found.rows[chosen]
    # From the position in the row to that in the tokens of all contexts.
    shift = examples.contexts.offsets[:-1][examples.context_of][example[chosen]] + windows.firsts[row]
    shift -= rows.first_lengths[row]
    places = examples.texts.places
    smallest = np.full(len(counts), np.inf)
    np.minimum.at(smallest, windows.example, null_scores)
    return Candidates(
        places[found.firsts[chosen] + shift, 0].astype(np.int64),
        places[found.lasts[chosen] + shift, 1].astype(np.int64),
        found.scores[chosen].astype(np.float64),
        offsets_of(np.minimum(counts, n_best)),
        smallest,
        smallest,
    )


def probabilities(scores: NDArray[np.float64], null_logit: float) -> tuple[float, list[float]]:
    """Return the probability of no answer, and those of the candidates of one question: together 1."""
    null = float(np.exp(-np.logaddexp(0.0, -null_logit)))
    return null, ((1 - null) * np.exp(scores - np.logaddexp.reduce(scores))).tolist()


class Span(NamedTuple):
    """An answer: text, first character in the context and the one after the last."""

    answer: str
    start: int
    end: int


def span_of(context: str, start: int, end: int) -> Span:
    """Return the characters of tokens, without whitespace around them, which some tokenizers count to a token."""
    text = context[start:end]
    stripped = text.strip()
    start += len(text) - len(text.lstrip())
    return Span(stripped, start, start + len(stripped))


def spans_of(rows: EncodedRows, candidates: Candidates) -> Iterator[list[Span]]:
    """Yield the candidates of each question, best first."""
    examples = rows.source.examples
    bounds = list(zip(candidates.starts.tolist(), candidates.ends.tolist(), strict=True))
    for question, context in enumerate(examples.context_of.tolist()):
        text = examples.texts.contexts[context]
        part = bounds[candidates.offsets[question] : candidates.offsets[question + 1]]
        yield [span_of(text, start, end) for start, end in part]
