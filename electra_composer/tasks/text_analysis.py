"""Error analysis of classification and regression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from electra_composer.tasks.analysis import WORST, Analysis, confusions, per_label_scores
from electra_composer.tasks.text_pairs import Texts

MOST_POINTS = 2000  # of a scatter plot


def analyse_labels(texts: Texts, labels: Sequence[str], logits: Tensor, targets: Tensor) -> Analysis:
    """Describe the errors of a classification with one label per example.

    Args:
        labels: names by class number.
        logits: `[examples, labels]`.
        targets: int64 `[examples]`.

    Returns:
        `loss` of the worst examples is the cross-entropy.
    """
    chosen, count = logits.argmax(1), len(labels)
    right, expected, predicted = (
        torch.bincount(each, minlength=count).numpy() for each in (targets[chosen == targets], targets, chosen)
    )
    losses = F.cross_entropy(logits.float(), targets, reduction="none").numpy()
    return Analysis(
        labels=list(labels),
        confusion=confusions(targets.numpy(), chosen.numpy()),
        per_label=per_label_scores(right, expected, predicted, labels),
        worst=_worst(texts, losses, lambda i: labels[int(targets[i])], lambda i: labels[int(chosen[i])]),
    )


def analyse_label_sets(texts: Texts, labels: Sequence[str], logits: Tensor, targets: Tensor) -> Analysis:
    """Describe the errors of a classification with several labels per example.

    Args:
        logits: `[examples, labels]`; a label is predicted if its logit is at least 0.
        targets: bool `[examples, labels]`.

    Returns:
        `loss` of the worst examples is the sum of the binary cross-entropies of the labels.
    """
    chosen = logits >= 0
    right, expected, predicted = (each.sum(0).numpy() for each in (chosen & targets, targets, chosen))
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").sum(1).numpy()

    def names(flags: Tensor) -> list[str]:
        return [labels[index] for index in flags.nonzero().flatten().tolist()]

    return Analysis(
        labels=list(labels),
        per_label=per_label_scores(right, expected, predicted, labels),
        worst=_worst(texts, losses, lambda i: names(targets[i]), lambda i: names(chosen[i])),
    )


def analyse_targets(
    texts: Texts,
    names: Sequence[str],
    predicted: NDArray[np.float64],
    targets: NDArray[np.float64],
    std: NDArray[np.float64],
    scores: Sequence[dict[str, float]],
) -> Analysis:
    """Describe the errors of a regression.

    Args:
        names: of the targets.
        predicted, targets: fp64 `[examples, targets]`, in the units of the data.
        std: `[targets]`, the units of `loss`: the mean of the squared errors.
        scores: of each target.

    Returns:
        `scatter` for a single target only.
    """
    losses = (((predicted - targets) / std) ** 2).mean(1)
    step = -(-len(targets) // MOST_POINTS)
    points = np.concatenate([targets, predicted], axis=1)[::step].tolist() if len(names) == 1 else None
    per_target = [{"label": name, **each, "examples": len(targets)} for name, each in zip(names, scores, strict=True)]

    def shown(values: NDArray[np.float64]) -> Any:
        rounded = [float(f"{value:.7g}") for value in values]
        return rounded[0] if len(rounded) == 1 else rounded

    worst = _worst(texts, losses, lambda i: shown(targets[i]), lambda i: shown(predicted[i]))
    return Analysis(per_label=per_target, scatter=points, worst=worst)


def _worst(
    texts: Texts, losses: NDArray[Any], expected: Callable[[int], Any], predicted: Callable[[int], Any]
) -> list[dict[str, Any]]:
    """Describe the examples with the largest losses."""
    assert texts.texts is not None
    assert texts.where is not None
    return [
        {
            "where": texts.where[index],
            "text": " | ".join(texts.texts[index]),
            "expected": expected(index),
            "predicted": predicted(index),
            "loss": float(losses[index]),
        }
        for index in np.argsort(-losses, kind="stable")[:WORST].tolist()
    ]
