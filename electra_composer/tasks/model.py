"""`ComposerModel` of a task, and the metrics that it evaluates."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from electra_composer.tasks.base import Output, Task
from electra_composer.tasks.encoded import EncodedRows

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
COLLAPSED = "collapsed"


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


class TaskModel(ComposerModel):
    """`ComposerModel` with the loss and scores of a task.

    Args:
        model: the only child module, named `model`: parameter names are `model.embeddings.…` (see optim.py).
        task: the task.
        validation: rows that are evaluated; None: there is no evaluation.
        cpu_autocast: run the forward pass under bfloat16 autocast on the CPU (see devices.py).
    """

    def __init__(
        self, model: nn.Module, task: Task, validation: EncodedRows | None = None, cpu_autocast: bool = False
    ):
        super().__init__()
        self.model = model
        self.task = task
        self.validation = validation
        self.cpu_autocast = cpu_autocast

    def forward(self, batch: dict[str, Any]) -> Any:
        """Return the outputs of the head, fp32."""
        autocast = torch.autocast("cpu", torch.bfloat16) if self.cpu_autocast else contextlib.nullcontext()
        with autocast:
            return self.task.forward(self.model, [batch[name] for name in MODEL_INPUTS], batch)

    def loss(self, outputs: Any, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the task, fp32."""
        return self.task.loss(outputs, batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return the scores of the validation rows; none for training, which logs only its loss."""
        if is_train or self.validation is None:
            return {}
        evaluation = Evaluation(self.task, self.validation)
        names = (*self.task.metrics, COLLAPSED)
        return {name: Score(name, evaluation, collects=name == names[0]) for name in names}

    def update_metric(self, batch: dict[str, Any], outputs: Any, metric: Metric) -> None:
        metric.update(outputs, batch)
