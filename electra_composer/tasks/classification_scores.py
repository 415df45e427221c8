"""Scores of classification, with the values of scikit-learn; NaN where a score is undefined."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def single_label_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute accuracy, F1 (mean over labels), Matthews correlation, and area under the ROC curve.

    Labels that neither occur nor are predicted do not count in `macro_f1`. `auc` is that of the second label if there
    are two, else the mean over the labels that occur, each against all others.

    Args:
        logits: `[rows, labels]`.
        labels: int64 `[rows]`.
    """
    chosen, count = logits.argmax(1), logits.shape[1]
    right = labels[chosen == labels]
    predicted, actual, both = (torch.bincount(each, minlength=count).double() for each in (chosen, labels, right))
    probabilities = logits.double().softmax(1)
    numbers = [1] if count == 2 else labels.unique().tolist()
    return {
        "accuracy": len(right) / len(labels),
        "macro_f1": _macro_f1(predicted, actual, both),
        "matthews": _matthews(predicted, actual, both),
        "auc": _mean([_auc(probabilities[:, number], labels == number) for number in numbers]),
    }


def multi_label_scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute F1 of all decisions and its mean over labels, the fraction of rows with exactly their labels, and AUC.

    Args:
        logits: `[rows, labels]`; a label is predicted if its logit is at least 0.
        targets: bool `[rows, labels]`.
    """
    chosen = logits >= 0
    predicted, actual, both = (each.sum(0).double() for each in (chosen, targets, chosen & targets))
    probabilities = logits.double().sigmoid()
    occurring = actual.nonzero().flatten().tolist()
    return {
        "micro_f1": _macro_f1(predicted.sum()[None], actual.sum()[None], both.sum()[None]),
        "macro_f1": _macro_f1(predicted, actual, both),
        "accuracy": float((chosen == targets).all(1).double().mean()),
        "auc": _mean([_auc(probabilities[:, number], targets[:, number]) for number in occurring]),
    }


def _macro_f1(predicted: Tensor, actual: Tensor, both: Tensor) -> float:
    """Counts of predictions, of labels and of hits, fp64 `[labels]` → the mean F1 of labels with any of them."""
    known = predicted + actual > 0
    return float((2 * both / (predicted + actual))[known].mean())


def _matthews(predicted: Tensor, actual: Tensor, both: Tensor) -> float:
    """Matthews correlation of several classes (Gorodkin 2004); 0, as in scikit-learn, if only one is predicted.

    torchmetrics would need a confusion matrix of labels × labels, and gives other values in that case (metrics.py).
    """
    total = actual.sum()
    spread = (total**2 - (predicted**2).sum()) * (total**2 - (actual**2).sum())
    return float((total * both.sum() - (predicted * actual).sum()) / spread.sqrt()) if spread > 0 else 0.0


def _auc(probabilities: Tensor, is_label: Tensor) -> float:
    """Area under the ROC curve, of fp64 probabilities: torchmetrics would take the sigmoid of others, with ties."""
    if is_label.all() or not is_label.any():
        return math.nan
    return float(binary_auroc(probabilities, is_label.long()))


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
