"""The classifier that is finetuned, as a `ComposerModel`, and what is kept of a run besides its loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.config import GlueModelConfig
from electra_composer.errors import UserError
from electra_composer.finetune.tasks import Task, build_metrics
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import ElectraForClassification, ElectraForReplacedTokens
from electra_composer.model.weight_maps import State as Weights

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
HEAD = "head."  # names of the only weights that no pretrained discriminator has
EVAL_LABEL = "eval"  # of the dev set; a further one's has the suffix of its metrics
COLLAPSED = "collapsed"
CONSTANT_REGRESSION = 1e-3  # share of the range of targets within which all predictions count as one value


class Collapsed(Metric):
    """1 if all predictions are the same, else 0: one class, or a regression within `tolerance`.

    A small model that has started badly may end by giving one answer to everything; its score is then no spread around
    what the method reaches, but a failed run.
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
        """Classes as integers or values of a regression, `[rows]`; the labels do not matter."""
        self.lowest = torch.minimum(self.lowest, predictions.min().float())
        self.highest = torch.maximum(self.highest, predictions.max().float())

    def compute(self) -> Tensor:
        return (self.highest - self.lowest <= self.tolerance).float()


class ElectraClassifier(ComposerModel):
    """A task's loss and metrics over :class:`ElectraForClassification`.

    Args:
        model: the only child, called `model`, so that parameters are named `model.embeddings.…` (see optim.py).
        task: the row of the task.
        cpu_autocast: run the forward under bfloat16 autocast on the CPU (see devices.py).
    """

    def __init__(
        self, model: ElectraForClassification | ElectraForReplacedTokens, task: Task, cpu_autocast: bool = False
    ):
        super().__init__()
        self.model = model
        self.task = task
        self.cpu_autocast = cpu_autocast

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """A batch of glue_data.py → fp32 `[rows, num_outputs]`."""
        autocast = torch.autocast("cpu", torch.bfloat16) if self.cpu_autocast else contextlib.nullcontext()
        with autocast:
            return self.model(*(batch[name] for name in MODEL_INPUTS))

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Mean over the rows, fp32: cross-entropy, or the squared error of a regression."""
        if self.task.is_regression:
            return F.mse_loss(outputs[:, 0], batch["labels"])
        return F.cross_entropy(outputs, batch["labels"])

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """The task's metrics on its dev set, and whether the model has collapsed; training logs its loss alone."""
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
    """Keeps the dev scores of every evaluation.

    Attributes:
        epochs: of each evaluation `epoch` (whole ones done), `step` and `metrics`: name → score × 100, None where it
            is undefined. Metrics of a second dev set have its suffix (`accuracy_mm`).
        collapsed: whether the model gave one answer to the whole dev set at the last one.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.collapsed = False

    def eval_end(self, state: State, logger: Logger) -> None:
        label = state.dataloader_label
        assert label is not None
        step = state.timestamp.batch.value
        if not self.epochs or self.epochs[-1]["step"] != step:
            self.epochs.append({"epoch": state.timestamp.epoch.value, "step": step, "metrics": {}})
        for name, metric in state.eval_metrics[label].items():
            assert metric.update_count, f"{name} of {label} was never fed"
            value = float(metric.compute())
            if name == COLLAPSED:
                if label == EVAL_LABEL:
                    self.collapsed = bool(value)
                continue
            self.epochs[-1]["metrics"][name + label.removeprefix(EVAL_LABEL)] = (
                100.0 * value if math.isfinite(value) else None
            )


class KeepLogits(Callback):
    """Keeps what the model gives for the batches of `Trainer.predict`, in the order of the examples.

    Composer's own list of outputs is in the order of the batches, which are sorted by length.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, Tensor]] = []

    def predict_start(self, state: State, logger: Logger) -> None:
        self.rows = []

    def predict_batch_end(self, state: State, logger: Logger) -> None:
        self.rows.append((state.batch["indices"].cpu(), state.outputs.float().cpu()))

    def logits(self) -> Tensor:
        """fp32 `[examples, num_outputs]`."""
        indices, outputs = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        assert torch.equal(indices.sort().values, torch.arange(len(indices))), "not every example once"
        return outputs[indices.argsort()]


def build_classifier(
    source: Pretrained, task: Task, config: GlueModelConfig, cpu_autocast: bool = False
) -> ElectraClassifier:
    """A classifier for `task` with a copy of the weights of `source` and a new head, from torch's random state.

    With `config.random_init` all weights are new: the same sizes, nothing learnt.

    Raises:
        UserError: weights that do not fit; only those of the head may be missing.
    """
    sizes = sizes_of(source, config)
    if config.random_init:
        model = ElectraForClassification(sizes, task.num_outputs, config.classifier_dropout)
        return ElectraClassifier(model, task, cpu_autocast)
    with torch.device("meta"):  # nothing is drawn that the weights of `source` would replace
        model = ElectraForClassification(sizes, task.num_outputs, config.classifier_dropout)
    head = nn.Linear(sizes.hidden_size, task.num_outputs)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    load_body(model, source, {f"{HEAD}{name}": tensor for name, tensor in head.state_dict().items()})
    return ElectraClassifier(model, task, cpu_autocast)


def sizes_of(source: Pretrained, config: GlueModelConfig) -> EncoderConfig:
    """The sizes of the source, with the dropout of the configuration where it names one."""
    if config.dropout is None:
        return source.encoder
    return dataclasses.replace(source.encoder, dropout=config.dropout, attention_dropout=config.dropout)


def load_body(model: nn.Module, source: Pretrained, head: Weights) -> None:
    """Give a model on the meta device copies of the weights of `source`, and those of `head`, which names them in full.

    Raises:
        UserError: weights missing, too many, or of other shapes.
    """
    weights: Weights = {**{name: tensor.clone() for name, tensor in source.weights.items()}, **head}
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:  # names and shapes
        raise UserError(
            f"model.source {source.name}: its weights are not those of an ELECTRA discriminator of its sizes: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error


def body_weights(classifier: ElectraClassifier) -> Weights:
    """Copies on the CPU of all weights but the head's, named as in :class:`Pretrained`."""
    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in classifier.model.state_dict().items()
        if not name.startswith(HEAD)
    }
