"""Scores of extractive question answering, with the values of the official SQuAD scripts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class AnswerScores(NamedTuple):
    """Scores of the predicted answers of all questions, float64 `[questions]` in [0, 1]."""

    exact: NDArray[np.float64]
    f1: NDArray[np.float64]


def normalize_answer(text: str) -> str:
    """Lower-case, remove ASCII punctuation and English articles, and join words by single spaces.

    Source: `normalize_answer` of SQuAD's `evaluate-v2.0.py`.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """Return the F1 of two bags of words; if one is empty, 1 if both are and else 0.

    Source: `compute_f1` of SQuAD's `evaluate-v2.0.py`. `evaluate-v1.1.py` gives 0 to two empty bags.
    """
    if not prediction or not gold:
        return float(len(prediction) == len(gold))
    common = sum((Counter(prediction) & Counter(gold)).values())
    return 2 * common / (len(prediction) + len(gold))


def score_answers(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> AnswerScores:
    """Score one predicted answer per question by the best of its right answers.

    Args:
        predictions: empty text: no answer.
        golds: right answers of each question. Those that are empty when normalized do not count; a question without
            any has the empty text as its right answer.
    """
    exact, f1 = np.zeros(len(predictions)), np.zeros(len(predictions))
    for index, (prediction, texts) in enumerate(zip(predictions, golds, strict=True)):
        normalized = normalize_answer(prediction)
        words = normalized.split()
        candidates = {gold for text in texts if (gold := normalize_answer(text))} or {""}
        exact[index] = normalized in candidates
        f1[index] = exact[index] or max(word_f1(words, gold.split()) for gold in candidates)
    return AnswerScores(exact, f1)


def best_threshold(
    scores: NDArray[np.float64], null_scores: NDArray[np.float64], answerable: NDArray[np.bool_]
) -> tuple[float, float]:
    """Find the null score above which no answer is the better prediction.

    Args:
        scores: of the best answer of each question, `[questions]`; not read where the question has no answer.
        null_scores: larger: less likely to have an answer, `[questions]`.
        answerable: whether the question has an answer, `[questions]`.

    Returns:
        The mean score with the best threshold, and that threshold: questions with a greater null score get no answer.

    Source: `find_best_thresh` of SQuAD's `evaluate-v2.0.py`. Its threshold is 0 if no answer is best for all questions:
    it expects null scores of at least 0. Ours is less than all of them then.
    """
    order = np.argsort(null_scores, kind="stable")
    gains = np.where(answerable, scores, -1.0)[order]  # of answering this question and those before it
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + np.count_nonzero(~answerable)
    best = int(np.argmax(totals))
    threshold = null_scores[order[best - 1]] if best else np.nextafter(null_scores.min(), -np.inf)
    return float(totals[best] / len(scores)), float(threshold)


def scores_with_null(
    exact: NDArray[np.float64],
    f1: NDArray[np.float64],
    null_scores: NDArray[np.float64],
    answerable: NDArray[np.bool_],
    threshold: float | None,
) -> dict[str, float]:
    """Compute the scores of SQuAD 2.0, where questions may have no answer.

    Args:
        exact, f1: of the best answers, `[questions]`.
        null_scores, answerable: see :func:`best_threshold`.
        threshold: questions with a greater null score get no answer; None: the threshold with the best F1.

    Returns:
        `f1`, `exact_match`; `has_answer_f1` and `no_answer_f1`, the F1 of the questions with and without an answer, NaN
        if there are none; `best_f1` and `best_exact_match`, at the best threshold for each.
    """
    best_f1, best = best_threshold(f1, null_scores, answerable)
    no_answer = null_scores > (best if threshold is None else threshold)
    f1_here, exact_here = np.where(no_answer, ~answerable, f1), np.where(no_answer, ~answerable, exact)
    return {
        "f1": _mean(f1_here),
        "exact_match": _mean(exact_here),
        "has_answer_f1": _mean(f1_here[answerable]),
        "no_answer_f1": _mean(f1_here[~answerable]),
        "best_f1": best_f1,
        "best_exact_match": best_threshold(exact, null_scores, answerable)[0],
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")
