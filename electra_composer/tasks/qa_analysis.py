"""Error analysis of extractive question answering: scores by the word that asks, and the worst answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from electra_composer.tasks.analysis import WORST, Analysis
from electra_composer.tasks.answers import score_answers
from electra_composer.tasks.qa_windows import QuestionTexts

ASKING = ("what", "who", "when", "where", "which", "why", "how")
OTHER = "other"


def analyse_answers(texts: QuestionTexts, predictions: Sequence[dict[str, Any]]) -> Analysis:
    """Describe the errors of predictions.

    Args:
        texts: with right answers for all questions.
        predictions: of :meth:`QuestionAnswering.predictions`.

    Returns:
        `per_label`: `label`, the first of :data:`ASKING` in the question, with `exact_match`, `f1` and `examples`;
        questions without an answer are a label of their own. `worst`: `loss` is 1 - F1, times the probability of the
        answer.
    """
    golds = [[] if answers is None else list(answers.texts) for answers in texts.answers]
    exact, f1 = score_answers([each["answer"] for each in predictions], golds)
    labels = np.array(
        [_asking(question) if gold else "no answer" for question, gold in zip(texts.questions, golds, strict=True)]
    )
    per_label = [
        {
            "label": label,
            "exact_match": float(exact[labels == label].mean()),
            "f1": float(f1[labels == label].mean()),
            "examples": int(np.count_nonzero(labels == label)),
        }
        for label in (*ASKING, OTHER, "no answer")
        if (labels == label).any()
    ]
    losses = (1 - f1) * np.array([each["score"] for each in predictions])
    worst = [
        {
            "where": texts.where[index],
            "text": texts.questions[index],
            "expected": golds[index][0] if golds[index] else "",
            "predicted": predictions[index]["answer"],
            "loss": float(losses[index]),
        }
        for index in np.argsort(-losses, kind="stable")[:WORST].tolist()
        if losses[index] > 0
    ]
    return Analysis(per_label=per_label, worst=worst)


def _asking(question: str) -> str:
    words = question.lower().split()
    return next((word for word in words if word in ASKING), OTHER)
