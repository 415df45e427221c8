"""`ComposerModel` of a task, and the metrics that it evaluates."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.errors import UserError
from electra_composer.finetune_config import TaskModelConfig
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import ElectraWithHead
from electra_composer.model.weight_maps import State as Weights
from electra_composer.tasks.base import Output, Task
from electra_composer.tasks.encoded import EncodedRows

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
HEAD = "head."  # prefix of the weights that a pretrained discriminator does not have
BATCH_ROWS = "batch_rows"  # entry of a batch whose losses are summed: its examples, before it is split
COLLAPSED = "collapsed"  # name of the score that is 1 if all predictions are equal


class Evaluation:
    """Outputs of all rows of a data set, and their scores.

    All metrics of a model share one, which is not copied: Composer copies metrics.
    """

    def __init__(self, task: Task, rows: EncodedRows):
        self.task = task
        self.rows = rows
        self._outputs: dict[int, Output] = {}
        self._scores: dict[str, float] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Evaluation:
        return self

    def add(self, indices: Sequence[int], outputs: Sequence[Output]) -> None:
        """Add the outputs of rows by their position."""
        self._outputs.update(zip(indices, outputs, strict=True))
        self._scores = None

    def clear(self) -> None:
        """Forget all outputs, before another evaluation."""
        self._outputs = {}
        self._scores = None

    def outputs(self) -> list[Output]:
        """Return the outputs in the order of the rows."""
        assert len(self._outputs) == len(self.rows), "each row is expected exactly once"
        return [self._outputs[index] for index in range(len(self.rows))]

    def scores(self) -> dict[str, float]:
        """Return the scores of the task, and 1 or 0 for :data:`COLLAPSED`."""
        if self._scores is None:
            outputs = self.outputs()
            collapsed = float(self.task.collapsed(self.rows, outputs))
            self._scores = {**self.task.scores(self.rows, outputs), COLLAPSED: collapsed}
        return self._scores


class Score(Metric):
    """One score of an :class:`Evaluation`, in [0, 1] or [-1, 1]."""

    full_state_update = False

    def __init__(self, name: str, evaluation: Evaluation, collects: bool):
        super().__init__()
        self.name = name
        self.evaluation = evaluation
        self.collects = collects

    def update(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Add the outputs of a batch, if this is the metric that does so for all."""
        if self.collects:
            self.evaluation.add(batch["indices"].tolist(), self.evaluation.task.keep(outputs, batch))

    def compute(self) -> Tensor:
        return torch.tensor(self.evaluation.scores()[self.name], dtype=torch.float64)

    def reset(self) -> None:
        super().reset()
        if self.collects:
            self.evaluation.clear()


class FinetunedModel(ComposerModel):
    """`ComposerModel` of an encoder with a head.

    Args:
        model: the only child module, named `model`: parameter names are `model.embeddings.…` (see optim.py).
        task: the task.
        cpu_autocast: run the forward pass under bfloat16 autocast on the CPU (see devices.py).
    """

    def __init__(self, model: nn.Module, task: Any, cpu_autocast: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self.cpu_autocast = cpu_autocast

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the outputs of the head for a batch of loader.py."""
        autocast = torch.autocast("cpu", torch.bfloat16) if self.cpu_autocast else contextlib.nullcontext()
        with autocast:
            return self.run([batch[name] for name in MODEL_INPUTS], batch)

    def run(self, inputs: list[Tensor], batch: dict[str, Any]) -> Any:
        """Run the model on the inputs of its encoder."""
        return self.model(*inputs)


class TaskModel(FinetunedModel):
    """Model with the loss and scores of a task.

    Args:
        model, task, cpu_autocast: see :class:`FinetunedModel`.
        validation: rows that are evaluated; None: there is no evaluation.
    """

    task: Task

    def __init__(self, model: nn.Module, task: Task, validation: EncodedRows | None = None, cpu_autocast: bool = False):
        super().__init__(model, task, cpu_autocast)
        self.validation = validation

    def run(self, inputs: list[Tensor], batch: dict[str, Any]) -> Any:
        """Run the model as the task does."""
        return self.task.forward(self.model, inputs, batch)

    def loss(self, outputs: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the task, fp32; see :func:`reduced`."""
        return reduced(self.task.loss(outputs, batch), batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the scores of the validation rows; none for training, which logs only its loss."""
        if is_train or self.validation is None:
            return {}
        evaluation = Evaluation(self.task, self.validation)
        names = (*self.task.metrics, COLLAPSED)
        return {name: Score(name, evaluation, collects=name == names[0]) for name in names}

    def update_metric(self, batch: dict[str, Any], outputs: Any, metric: Metric) -> None:
        metric.update(outputs, batch)


def reduced(mean: Tensor, batch: dict[str, Any]) -> Tensor:
    """Return the mean loss of a microbatch, times the examples of its complete batch if their losses are to be summed.

    The trainer weights a microbatch by its share of the examples: so the losses of all add up to the sum of the batch.
    """
    return mean * batch[BATCH_ROWS] if BATCH_ROWS in batch else mean


def sum_losses(batch: dict[str, Any]) -> dict[str, Any]:
    """Let the losses of a batch be summed, not averaged. For use as Composer's `batch_transforms`."""
    return {**batch, BATCH_ROWS: len(batch["indices"])}


def build_task_model(
    source: Pretrained,
    task: Task,
    config: TaskModelConfig,
    validation: EncodedRows | None = None,
    cpu_autocast: bool = False,
) -> TaskModel:
    """Build a model for `task` with copies of the weights of `source` and a randomly initialized head.

    With `config.random_init` all weights are random. Random numbers are drawn from torch's global generator.

    Raises:
        UserError: the weights of the source do not fit.
    """
    sizes = encoder_config(source, config.dropout)
    head = task.build_head(sizes)
    if config.random_init:
        model = ElectraWithHead(sizes, head, config.classifier_dropout, task.per_token)
    else:
        with torch.device("meta"):  # draws no random numbers for weights that `source` replaces
            model = ElectraWithHead(sizes, nn.Identity(), config.classifier_dropout, task.per_token)
        load_body(model, source, {})
        model.head = head
    return TaskModel(model, task, validation, cpu_autocast)


def encoder_config(source: Pretrained, dropout: float | None) -> EncoderConfig:
    """Return the sizes of the source, with another dropout if it is not None."""
    if dropout is None:
        return source.encoder
    return dataclasses.replace(source.encoder, dropout=dropout, attention_dropout=dropout)


def load_body(model: nn.Module, source: Pretrained, head: Weights) -> None:
    """Load copies of the weights of `source`, and `head`, into a model on the meta device.

    Args:
        head: weights of the head by full name, not copied.

    Raises:
        UserError: missing or unexpected weights, or other shapes.
    """
    weights: Weights = {**{name: tensor.clone() for name, tensor in source.weights.items()}, **head}
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:  # wrong names or shapes
        raise UserError(
            f"model.source {source.name}: its weights do not fit an ELECTRA discriminator of its configuration: "
            f"{' '.join(str(error).split())[:500]}; use another source"
        ) from error
