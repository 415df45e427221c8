"""The classifier that is finetuned, as a `ComposerModel`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from electra_composer.checkpoint import Pretrained
from electra_composer.config import GlueModelConfig
from electra_composer.electra import ElectraForClassification
from electra_composer.errors import UserError
from electra_composer.glue_tasks import Task, build_metrics

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
NEW_WEIGHTS = {"head.weight", "head.bias"}  # no pretrained discriminator has them


class ElectraClassifier(ComposerModel):
    """A task's loss and metrics over :class:`ElectraForClassification`.

    Args:
        model: the only child, called `model`, so that parameters are named `model.embeddings.…` (see optim.py).
        task: the row of the task.
        cpu_autocast: run the forward under bfloat16 autocast on the CPU (see devices.py).
    """

    def __init__(self, model: ElectraForClassification, task: Task, cpu_autocast: bool = False):
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
        """The task's metrics on its dev set; training logs its loss alone."""
        return {} if is_train else build_metrics(self.task)

    def update_metric(self, batch: dict[str, Any], outputs: Tensor, metric: Metric) -> None:
        predictions = outputs[:, 0] if self.task.is_regression else outputs.argmax(-1)
        metric.update(predictions, batch["labels"])


def build_classifier(
    source: Pretrained, task: Task, config: GlueModelConfig, cpu_autocast: bool = False
) -> ElectraClassifier:
    """A classifier for `task` with the weights of `source` and a new head, from torch's random state.

    With `config.random_init` all weights are new: the same sizes, nothing learnt.

    Raises:
        UserError: weights that do not fit; only those of the head may be missing.
    """
    sizes = source.encoder
    if config.dropout is not None:
        sizes = dataclasses.replace(sizes, dropout=config.dropout, attention_dropout=config.dropout)
    model = ElectraForClassification(sizes, task.num_outputs, config.classifier_dropout)
    if not config.random_init:
        try:
            keys = model.load_state_dict(source.weights, strict=False)
        except RuntimeError as error:  # shapes; names are what follows
            raise UserError(f"model.source {source.name}: {' '.join(str(error).split())}") from error
        wrong = sorted(set(keys.missing_keys) ^ NEW_WEIGHTS) + keys.unexpected_keys
        if wrong:
            raise UserError(
                f"model.source {source.name}: its weights are not those of an ELECTRA discriminator of its sizes; "
                f"{len(wrong)} are missing or too many, such as {wrong[0]}"
            )
    return ElectraClassifier(model, task, cpu_autocast)
