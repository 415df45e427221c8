"""One run of a task of one's own: training, the best epoch, the saved model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility
from torch import Tensor

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.fit import collect_garbage, fitted, own_folder
from electra_composer.finetuning.model import EpochScores
from electra_composer.finetuning.runs import PlannedRun, now
from electra_composer.finetuning.task_data import Rows
from electra_composer.tasks.base import Output, Task
from electra_composer.tasks.classification import Classification
from electra_composer.tasks.model import Score, TaskModel, build_task_model


@dataclass
class Trained:
    """A trained model with the weights of its chosen epoch.

    Attributes:
        model: on the device of the run.
        task: with what was tuned on validation.
        outputs: on validation.
        record: as in :meth:`RunStore.add`, without group, settings and source.
    """

    model: TaskModel
    task: Task
    outputs: list[Output]
    record: dict[str, Any]


class KeepEpoch(Callback):
    """Keep outputs and step of the best evaluation, or of the last; of the best also the weights.

    Args:
        task: whose score decides.
        best: False: the last one.
    """

    def __init__(self, task: Task, best: bool):
        self.task = task
        self.best = best
        self.value = -math.inf
        self.step = 0
        self.outputs: list[Output] = []
        self.weights: dict[str, Tensor] = {}

    def eval_end(self, state: State, logger: Logger) -> None:
        assert state.dataloader_label is not None
        metric = state.eval_metrics[state.dataloader_label][self.task.score]
        assert isinstance(metric, Score)
        value = float(metric.compute())
        if self.task.score in self.task.lower_is_better:
            value = -value
        if self.best and self.outputs and not value > self.value:  # NaN is not better than anything
            return
        self.value = -math.inf if math.isnan(value) else value
        self.step = state.timestamp.batch.value
        self.outputs = metric.evaluation.outputs()
        if self.best:
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.model.state_dict().items()}


def train_task(
    config: FinetuneConfig,
    source: Pretrained,
    task: Task,
    rows: Rows,
    run: PlannedRun,
    group: str,
    cpu_autocast: bool,
    attention_path: str,
) -> Trained:
    """Finetune a copy of `source` and score it on validation.

    Args:
        config: configuration of all runs.
        source: pretrained weights; not modified.
        task: after :meth:`Task.learn`; not modified.

    Raises:
        UserError: disk full, `torch.compile` failed, or an operator has no deterministic kernel.
    """
    started = time.monotonic()
    mine, task = own_folder(config, run.name, run.seed, group), copy.copy(task)
    reproducibility.seed_all(run.seed)  # determines the head, and random weights
    model = build_task_model(source, task, config.model, rows.validation, cpu_autocast)
    scores, keep = EpochScores(task.unscaled), KeepEpoch(task, config.epoch == "best")
    pad_id = source.tokenizer.pad_token_id
    with (
        collect_garbage(),
        fitted(mine, model, rows.train, {"": rows.validation}, pad_id, attention_path, [scores, keep]) as (trainer, _),
    ):
        timestamp = trainer.state.timestamp
        if keep.weights:
            trainer.state.model.load_state_dict(keep.weights)
    task.tune(rows.validation, keep.outputs)
    if config.predict.calibrate:
        assert isinstance(task, Classification)
        task.calibrate(rows.validation, keep.outputs)
    metrics = scaled(task, task.scores(rows.validation, keep.outputs))
    epoch = next(each["epoch"] for each in scores.epochs if each["step"] == keep.step)
    return Trained(
        model,
        task,
        keep.outputs,
        {
            "task": run.task.name,
            "seed": run.seed,
            "score": metrics[task.score],
            "metrics": metrics,
            "epoch": epoch,
            "epochs": scores.epochs,
            "collapsed": task.collapsed(rows.validation, keep.outputs),
            "steps": timestamp.batch.value,
            "train_examples": len(rows.train),
            "dev_examples": len(rows.validation),
            "train_seconds": timestamp.total_wct.total_seconds(),
            "examples_per_second": timestamp.sample.value / max(timestamp.total_wct.total_seconds(), 1e-9),
            "seconds": time.monotonic() - started,
            "finished_at": now(),
        },
    )


def scaled(task: Task, scores: Mapping[str, float]) -> dict[str, float | None]:
    """Multiply scores by 100, except those that are reported as they are; None for undefined ones."""
    factors = {name: 1.0 if name in task.unscaled else 100.0 for name in scores}
    return {name: factors[name] * value if math.isfinite(value) else None for name, value in scores.items()}
