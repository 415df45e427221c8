"""Scores of question answering against torchmetrics and the rules of the official scripts."""

from __future__ import annotations

import collections
import math
import random
import re
import string
from collections.abc import Sequence

import numpy as np
import pytest
from torchmetrics.functional.text import squad

from electra_composer.tasks.answers import best_threshold, normalize_answer, score_answers, scores_with_null

WORDS = ["the", "a", "An", "Normans", "normans", "France,", "(1066)", "10th", "century", "'s", "x-ray", "!", "à la"]


def draw(rng: random.Random, least: int = 0) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, 5)))


def official(prediction: str, golds: Sequence[str]) -> tuple[float, float]:
    """Score one answer by the rule of evaluate-v2.0.py."""

    def normalized(text: str) -> str:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    def f1(gold: str) -> float:
        left, right = normalized(gold).split(), normalized(prediction).split()
        if not left or not right:
            return float(left == right)
        same = sum((collections.Counter(left) & collections.Counter(right)).values())
        if same == 0:
            return 0.0
        precision, recall = same / len(right), same / len(left)
        return 2 * precision * recall / (precision + recall)

    golds = [gold for gold in golds if normalized(gold)] or [""]
    return float(max(normalized(gold) == normalized(prediction) for gold in golds)), max(map(f1, golds))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Normans!", "normans"),
        ("an apple, a day", "apple day"),
        ("the", ""),
        ("Theatre", "theatre"),
        ("O'Neil-Smith", "oneilsmith"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_by_the_official_script(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


def test_scores_are_those_of_the_official_rule() -> None:
    rng = random.Random(0)
    golds = [[draw(rng) for _ in range(rng.randint(0, 4))] for _ in range(500)]
    predictions = [rng.choice([draw(rng), "", *texts]) for texts in golds]
    scores = score_answers(predictions, golds)
    expected = np.array([official(*pair) for pair in zip(predictions, golds, strict=True)])
    np.testing.assert_array_equal(scores.exact, expected[:, 0])
    np.testing.assert_allclose(scores.f1, expected[:, 1])
    assert 0.1 < scores.exact.mean() < 0.9


def test_scores_are_those_of_torchmetrics() -> None:
    rng = random.Random(1)
    golds = [[f"x {draw(rng, 1)}" for _ in range(rng.randint(1, 3))] for _ in range(100)]
    predictions = [rng.choice([draw(rng), *texts]) for texts in golds]
    reference = squad(
        [{"id": str(index), "prediction_text": text} for index, text in enumerate(predictions)],
        [
            {"id": str(index), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for index, texts in enumerate(golds)
        ],
    )
    scores = score_answers(predictions, golds)
    assert 100 * scores.f1.mean() == pytest.approx(float(reference["f1"]), abs=1e-4)
    assert 100 * scores.exact.mean() == pytest.approx(float(reference["exact_match"]), abs=1e-4)


def official_threshold(
    scores: Sequence[float], null_scores: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """Follow find_best_thresh of evaluate-v2.0.py for predictions that are never empty."""
    current = best = float(sum(not has for has in answerable))
    threshold = 0.0
    for index in sorted(range(len(scores)), key=lambda index: null_scores[index]):
        current += scores[index] if answerable[index] else -1.0
        if current > best:
            best, threshold = current, null_scores[index]
    return best / len(scores), threshold


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_that_of_the_official_script(seed: int) -> None:
    rng = np.random.default_rng(seed)
    answerable = rng.random(60) < 0.6
    scores = rng.random(60)
    null_scores = np.where(answerable, 0.0, 0.5) + rng.random(60)
    best, threshold = best_threshold(scores, null_scores, answerable)
    expected = official_threshold(scores.tolist(), null_scores.tolist(), answerable.tolist())
    assert (best, threshold) == pytest.approx(expected)
    # No other threshold is better.
    for other in [*null_scores, null_scores.min() - 1]:
        assert np.where(null_scores > other, ~answerable, np.where(answerable, scores, 0.0)).mean() <= best + 1e-12


def test_no_answer_to_any_question_can_be_the_best_choice() -> None:
    answerable = np.array([False, False, True])
    best, threshold = best_threshold(np.array([0.0, 0.0, 1.0]), np.array([-5.0, -4.0, -3.0]), answerable)
    assert best == pytest.approx(2 / 3)
    assert threshold < -5.0


def test_scores_with_null_count_the_questions_with_and_without_an_answer() -> None:
    exact, f1 = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1.0, 0.5, 0.0, 0.0])
    null_scores, answerable = np.array([-2.0, 1.0, -1.0, 3.0]), np.array([True, True, False, False])
    scores = scores_with_null(exact, f1, null_scores, answerable, 0.0)
    assert scores == {
        "f1": 0.5,
        "exact_match": 0.5,
        "has_answer_f1": 0.5,
        "no_answer_f1": 0.5,
        "best_f1": 0.75,  # at -2: the first one is answered
        "best_exact_match": 0.75,
    }
    assert scores_with_null(exact, f1, null_scores, answerable, None)["f1"] == 0.75
    assert math.isnan(scores_with_null(exact[:2], f1[:2], null_scores[:2], answerable[:2], 0.0)["no_answer_f1"])
