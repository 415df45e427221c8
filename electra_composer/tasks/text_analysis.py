"""Error analysis of classification and regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from electra_composer.tasks.analysis import WORST, Analysis, confusions, per_label_scores
from electra_composer.tasks.text_pairs import Texts

MOST_POINTS = 3000  # of a scatter plot


def analyse_classes(examples: Texts, logits: Tensor, labels: Tensor, names: Sequence[str]) -> Analysis:
    """Analyse examples with one label each.

    Args:
        logits: fp32 `[examples, labels]`.
        labels: class numbers, int64 `[examples]`.
    """
    losses = F.cross_entropy(logits, labels, reduction="none").numpy()
    expected, predicted = labels.numpy(), logits.argmax(1).numpy()
    count = len(names)
    hits = np.bincount(expected[expected == predicted], minlength=count)
    totals = [np.bincount(numbers, minlength=count) for numbers in (expected, predicted)]
    return Analysis(
        labels=list(names),
        confusion=confusions(expected, predicted),
        per_label=per_label_scores(hits, *totals, names),
        worst=_worst(examples, losses, lambda i: {"expected": names[expected[i]], "predicted": names[predicted[i]]}),
    )


def analyse_label_sets(examples: Texts, logits: Tensor, targets: Tensor, names: Sequence[str]) -> Analysis:
    """Analyse examples with several labels each.

    Args:
        logits: fp32 `[examples, labels]`; 0 or more predicts a label.
        targets: bool `[examples, labels]`.
    """
    losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").sum(1).numpy()
    expected, predicted = targets.numpy(), (logits >= 0).numpy()
    return Analysis(
        labels=list(names),
        per_label=per_label_scores((expected & predicted).sum(0), expected.sum(0), predicted.sum(0), names),
        worst=_worst(
            examples,
            losses,
            lambda i: {
                "expected": ", ".join(names[j] for j in np.flatnonzero(expected[i])),
                "predicted": ", ".join(names[j] for j in np.flatnonzero(predicted[i])),
            },
        ),
    )


def analyse_numbers(
    examples: Texts, predicted: NDArray[np.float64], expected: NDArray[np.float64], names: Sequence[str]
) -> Analysis:
    """Analyse predictions of one or several numbers.

    Args:
        predicted, expected: in the units of the data, float64 `[examples, targets]`.
    """
    errors = predicted - expected
    per_label = [
        {"label": name, "mean_error": float(error.mean()), "mean_absolute_error": float(np.abs(error).mean())}
        for name, error in zip(names, errors.T, strict=True)
    ]
    pairs = np.stack([expected.ravel(), predicted.ravel()], axis=1)
    step = -(-len(pairs) // MOST_POINTS)

    def describe(index: int) -> dict[str, Any]:
        values = {"expected": expected[index], "predicted": predicted[index]}
        return {key: ", ".join(f"{value:.4g}" for value in row) for key, row in values.items()}

    return Analysis(
        labels=list(names),
        per_label=per_label,
        scatter=pairs[::step].tolist(),
        worst=_worst(examples, (errors**2).mean(1), describe),
    )


def _worst(examples: Texts, losses: NDArray[Any], describe: Any) -> list[dict[str, Any]]:
    """Describe the examples with the largest loss."""
    assert examples.texts is not None
    assert examples.where is not None
    order = np.argsort(-losses, kind="stable")[:WORST].tolist()
    return [
        {"where": examples.where[i], "text": " / ".join(examples.texts[i]), **describe(i), "loss": float(losses[i])}
        for i in order
    ]
