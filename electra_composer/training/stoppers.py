"""Callbacks that end training by a metric of an evaluation."""

from __future__ import annotations

from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.core import Callback, State
from composer.loggers import Logger

from electra_composer.errors import UserError, nearest


class EvaluationStopper(Callback):
    """Checks when training starts that the metric of a stopper exists.

    Only metrics of evaluations are accepted: the models have none for training, and comparing one would wait for the
    device in every batch.
    """

    key: str
    monitor: str
    dataloader_label: str

    def fit_start(self, state: State, logger: Logger) -> None:
        """Raise a UserError if there is no such evaluation, or if it has no such metric."""
        labels = list(state.eval_metrics)
        if self.dataloader_label not in labels:
            label = self.dataloader_label
            raise UserError(f"{self.key}.dataloader_label: no evaluation is named {label!r}; {nearest(label, labels)}")
        metrics = list(state.eval_metrics[self.dataloader_label])
        if self.monitor not in metrics:
            raise UserError(
                f"{self.key}.monitor: evaluation {self.dataloader_label} has no metric {self.monitor!r}; "
                f"{nearest(self.monitor, metrics)}"
            )


class RunEarlyStopper(EvaluationStopper, EarlyStopper):
    """EarlyStopper on a metric of an evaluation."""

    key = "callbacks.early_stopper"


class RunThresholdStopper(EvaluationStopper, ThresholdStopper):
    """ThresholdStopper on a metric of an evaluation."""

    key = "callbacks.threshold_stopper"
