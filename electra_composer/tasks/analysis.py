"""Error analysis of a finetuned model on its validation examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORST = 50  # examples listed, those with the largest loss


@dataclass
class Analysis:
    """What people look at when a model is wrong. All values are JSON values.

    Attributes:
        labels: names of the rows and columns of `confusion`.
        confusion: `[true label, predicted label, number of examples]`, by class number, those above 0; None: not a
            choice between labels.
        per_label: one entry per label, or target: `label` and its scores as fractions or counts.
        scatter: `[target, prediction]` of each example, at most some thousand; None: not a regression.
        worst: examples in the order of their loss, the largest first: `where`, `text`, `expected`, `predicted`, `loss`.
    """

    labels: list[str] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    per_label: list[dict[str, Any]] = field(default_factory=list)
    scatter: list[list[float]] | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)


def confusions(expected: NDArray[Any], predicted: NDArray[Any]) -> list[list[int]]:
    """Count examples by true and predicted class number, as in :attr:`Analysis.confusion`."""
    pairs, counts = np.unique(np.stack([expected, predicted], axis=1), axis=0, return_counts=True)
    return np.column_stack([pairs, counts]).tolist()


def per_label_scores(
    right: NDArray[np.int64], expected: NDArray[np.int64], predicted: NDArray[np.int64], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return precision, recall and F1 of each label; 0 where one is undefined, as in scikit-learn.

    Args:
        right, expected, predicted: int64 `[labels]`: examples that have the label and are given it, that have it, that
            are given it.

    Returns:
        `label`, `precision`, `recall`, `f1`, and `examples`, the number of examples with this label.
    """
    precision = right / np.maximum(predicted, 1)
    recall = right / np.maximum(expected, 1)
    f1 = 2 * right / np.maximum(expected + predicted, 1)
    return [
        {"label": label, "precision": p, "recall": r, "f1": f, "examples": n}
        for label, p, r, f, n in zip(
            labels, precision.tolist(), recall.tolist(), f1.tolist(), expected.tolist(), strict=True
        )
    ]
