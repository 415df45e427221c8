"""The metrics of the tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryConfusionMatrix, BinaryF1Score, MulticlassAccuracy
from torchmetrics.utilities.data import dim_zero_cat

from electra_composer.finetuning.tasks import Task


# Workaround (torchmetrics 1.7): BinaryMatthewsCorrCoef gives 0.026 on CoLA's dev set for a model that predicts a single
# class, where scikit-learn, the basis of GLUE's published scores, gives 0; goes when torchmetrics also gives 0.
class MatthewsCorrCoef(BinaryConfusionMatrix):
    """Matthews correlation of two classes; 0 if a row or column of the confusion matrix is empty."""

    def compute(self) -> Tensor:
        (tn, fp), (fn, tp) = super().compute().double()
        margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        if margins == 0:
            return torch.zeros((), device=margins.device)
        return ((tp * tn - fp * fn) / margins.sqrt()).float()


# Workaround (torchmetrics 1.7): SpearmanCorrCoef gives 0 for constant predictions or labels, where the correlation is
# undefined and both PearsonCorrCoef and SciPy give NaN; goes when it gives NaN.
class SpearmanCorrelation(SpearmanCorrCoef):
    """Spearman's rank correlation; NaN if all predictions or all labels are equal."""

    def __init__(self) -> None:
        # It stores all predictions to rank them, and warns of the memory. A dev set needs little.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
            super().__init__()

    def compute(self) -> Tensor:
        values = [dim_zero_cat(part) for part in (self.preds, self.target)]
        if any(bool((value == value[0]).all()) for value in values):
            return torch.full((), torch.nan, device=values[0].device)
        return super().compute()


METRICS: dict[str, Callable[[Task], Metric]] = {
    "accuracy": lambda task: MulticlassAccuracy(len(task.labels), average="micro"),
    "f1": lambda task: BinaryF1Score(),
    "matthews": lambda task: MatthewsCorrCoef(),
    "spearman": lambda task: SpearmanCorrelation(),
    "pearson": lambda task: PearsonCorrCoef(),
}
"""Metric constructors by name.

Each metric takes `update(predictions, labels)`, class numbers or the values of a regression. Results are in [0, 1] or
[-1, 1].
"""


def build_metrics(task: Task) -> dict[str, Metric]:
    """Build new metrics for a task, by name; the first one is its score."""
    return {name: METRICS[name](task) for name in task.metrics}
