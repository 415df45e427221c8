"""Classifier to finetune as a `ComposerModel`, and callbacks that keep its scores and logits."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor
from torchmetrics import Metric

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.finetuning.fit import EVAL_LABEL
from electra_composer.finetuning.metrics import build_metrics
from electra_composer.finetuning.tasks import Task
from electra_composer.glue_config import GlueModelConfig
from electra_composer.model.finetuning import ElectraForClassification, linear_head
from electra_composer.model.weight_maps import State as Weights
from electra_composer.tasks.model import COLLAPSED, HEAD, FinetunedModel, encoder_config, load_body, reduced

CONSTANT_REGRESSION = 1e-3  # fraction of the target range within which predictions count as equal


class Collapsed(Metric):
    """1 if all predictions are equal (a regression: within `tolerance`), else 0.

    A small model may collapse to one answer after a bad start. Its score then shows a failed run, not the variance of
    the method.
    """

    full_state_update = False
    lowest: Tensor
    highest: Tensor

    def __init__(self, tolerance: float = 0.0):
        super().__init__()
        self.tolerance = tolerance
        self.add_state("lowest", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Update with class numbers or values of a regression, `[rows]`; labels are ignored."""
        self.lowest = torch.minimum(self.lowest, predictions.min().float())
        self.highest = torch.maximum(self.highest, predictions.max().float())

    def compute(self) -> Tensor:
        return (self.highest - self.lowest <= self.tolerance).float()


class ElectraClassifier(FinetunedModel):
    """Model with the loss and metrics of a GLUE task. Its outputs are logits, fp32 `[rows, num_outputs]`."""

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the cross-entropy of the rows, or the squared error for regression, fp32; see :func:`reduced`."""
        if self.task.is_regression:
            return reduced(F.mse_loss(outputs[:, 0], batch["labels"]), batch)
        return reduced(F.cross_entropy(outputs, batch["labels"]), batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the dev metrics of the task and :class:`Collapsed`; none for training, which logs only its loss."""
        if is_train:
            return {}
        tolerance = 0.0
        if self.task.score_range is not None:
            low, high = self.task.score_range
            tolerance = CONSTANT_REGRESSION * (high - low) * self.task.target_scale
        return {**build_metrics(self.task), COLLAPSED: Collapsed(tolerance)}

    def update_metric(self, batch: dict[str, Any], outputs: Tensor, metric: Metric) -> None:
        predictions = outputs[:, 0] if self.task.is_regression else outputs.argmax(-1)
        metric.update(predictions, batch["labels"])


class EpochScores(Callback):
    """Keep the dev scores of every evaluation.

    Args:
        unscaled: names of scores that are not multiplied by 100.

    Attributes:
        epochs: one entry per evaluation: `epoch` (completed epochs), `step` and `metrics`, name → score × 100 or None
            if undefined. Metrics of a second dev set have its suffix (`accuracy_mm`).
        collapsed: whether all predictions on the first dev set were equal at the last evaluation.
    """

    def __init__(self, unscaled: Collection[str] = ()) -> None:
        self.unscaled = unscaled
        self.epochs: list[dict[str, Any]] = []
        self.collapsed = False

    def eval_end(self, state: State, logger: Logger) -> None:
        label = state.dataloader_label
        assert label is not None
        step = state.timestamp.batch.value
        if not self.epochs or self.epochs[-1]["step"] != step:
            self.epochs.append({"epoch": state.timestamp.epoch.value, "step": step, "metrics": {}})
        for name, metric in state.eval_metrics[label].items():
            assert metric.update_count, f"{name} of {label} was never updated"
            value = float(metric.compute())
            if name == COLLAPSED:
                if label == EVAL_LABEL:
                    self.collapsed = bool(value)
                continue
            value *= 1.0 if name in self.unscaled else 100.0
            self.epochs[-1]["metrics"][name + label.removeprefix(EVAL_LABEL)] = value if math.isfinite(value) else None


class KeepLogits(Callback):
    """Keep the outputs of `Trainer.predict`, in the order of the examples.

    The outputs that `Trainer.predict` returns are in the order of the batches, which are sorted by length.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []

    def predict_start(self, state: State, logger: Logger) -> None:
        self.rows = []

    def predict_batch_end(self, state: State, logger: Logger) -> None:
        self.rows.append((state.batch["indices"].cpu(), state.outputs.float().cpu()))

    def logits(self) -> Tensor:
        """Return the logits of the last `Trainer.predict`, fp32 `[examples, num_outputs]`."""
        indices, outputs = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        assert torch.equal(indices.sort().values, torch.arange(len(indices))), "each example is expected exactly once"
        return outputs[indices.argsort()]


def build_classifier(
    source: Pretrained, task: Task, config: GlueModelConfig, cpu_autocast: bool = False
) -> ElectraClassifier:
    """Build a classifier for `task` with copies of the weights of `source` and a randomly initialized head.

    With `config.random_init` all weights are random. Random numbers are drawn from torch's global generator.

    Raises:
        UserError: the weights of the source do not fit; only those of the head may be missing.
    """
    sizes = encoder_config(source, config.dropout)
    if config.random_init:
        model = ElectraForClassification(sizes, task.num_outputs, config.classifier_dropout)
        return ElectraClassifier(model, task, cpu_autocast)
    with torch.device("meta"):  # draws no random numbers for weights that `source` replaces
        model = ElectraForClassification(sizes, task.num_outputs, config.classifier_dropout)
    head = linear_head(sizes.hidden_size, task.num_outputs)
    load_body(model, source, {f"{HEAD}{name}": tensor for name, tensor in head.state_dict().items()})
    return ElectraClassifier(model, task, cpu_autocast)


def body_weights(classifier: ElectraClassifier) -> Weights:
    """Return CPU copies of all weights except the head's, named as in :class:`Pretrained`."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in classifier.model.state_dict().items()
        if not name.startswith(HEAD)
    }
