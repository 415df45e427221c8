"""One finetuning run: settings, data, training, scores."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from composer.core import Timestamp
from composer.utils import reproducibility
from safetensors import SafetensorError

from electra_composer.atomic_files import write_file
from electra_composer.checkpoints.weights import Pretrained
from electra_composer.errors import UserError
from electra_composer.finetuning.fit import collect_garbage, fitted, own_folder
from electra_composer.finetuning.loader import Encoded
from electra_composer.finetuning.model import (
    ElectraClassifier,
    EpochScores,
    KeepLogits,
    body_weights,
    build_classifier,
)
from electra_composer.finetuning.predictions import logits_key, save_logits
from electra_composer.finetuning.ranker import build_ranker
from electra_composer.finetuning.runs import PlannedRun, now
from electra_composer.finetuning.tasks import Task
from electra_composer.glue_config import GlueConfig, TaskSettings
from electra_composer.training.times import parse_time


@dataclass
class TaskData:
    """Tokenized examples of a task.

    Attributes:
        dev: dev sets by split: `dev`, for MNLI also `dev_mm`.
        test: test sets by the key of their logits; empty unless predictions are wanted.
    """

    train: Encoded
    dev: dict[str, Encoded]
    test: dict[str, Encoded] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """Paths of the files of a group of runs, in a folder of its own."""

    folder: str

    def logits(self, run_name: str) -> str:
        return os.path.join(self.folder, "logits", f"{run_name}.npz")

    def weights(self, run_name: str) -> str:
        return os.path.join(self.folder, "weights", f"{run_name}.safetensors")

    @property
    def claims(self) -> str:
        return os.path.join(self.folder, "claims")


def config_of_task(config: GlueConfig, task: Task) -> GlueConfig:
    """Apply the `task_settings` of a task, and fill in `trainer.max_duration`."""
    own = config.task_settings.get(task.name, TaskSettings())

    def override(section: Any, **values: Any) -> Any:
        return dataclasses.replace(section, **{name: value for name, value in values.items() if value is not None})

    epochs = config.trainer.max_duration or f"{task.epochs}ep"
    return dataclasses.replace(
        config,
        optimizer=override(config.optimizer, lr=own.lr, layerwise_decay=own.layerwise_decay),
        schedule=override(config.schedule, warmup=own.warmup),
        trainer=override(
            config.trainer,
            max_duration=epochs if own.epochs is None else f"{own.epochs}ep",
            global_train_batch_size=own.batch_size,
        ),
    )


def build_model(source: Pretrained, task: Task, config: GlueConfig, cpu_autocast: bool = False) -> ElectraClassifier:
    """Build the model to finetune: a classifier or, for a ranked task, the discriminator."""
    build = build_ranker if task.ranked else build_classifier
    return build(source, task, config.model, cpu_autocast)


def examples_seen(config: GlueConfig, task: Task, train_examples: int) -> int:
    """Estimate the training examples of a run of the task over all epochs, from which its duration is estimated."""
    mine = config_of_task(config, task)
    assert mine.trainer.max_duration is not None
    time = parse_time(mine.trainer.max_duration, "trainer.max_duration")
    if time.unit.value == "ba":
        return int(time.value) * mine.trainer.global_train_batch_size
    if time.unit.value == "sp":
        return int(time.value)
    return math.ceil(train_examples * (time.value if time.unit.value == "ep" else 1))


def finetune(
    config: GlueConfig,
    source: Pretrained,
    run: PlannedRun,
    data: TaskData,
    files: RunFiles,
    cpu_autocast: bool = False,
    attention_path: str = "sdpa",
) -> dict[str, Any]:
    """Finetune a copy of `source`, score it on dev, and save logits and weights that are needed later.

    Args:
        config: configuration of all runs.
        source: pretrained weights; not modified.
        data: examples of the run's task.
        files: paths of logits (with `predict.enabled`) and of the weights of MNLI runs (with `intermediate`).

    Returns:
        The record of the run without group and settings: `task`, `seed`, `score` and `metrics` × 100 (None if
        undefined), `epochs` (scores of each evaluation), `collapsed`, `started_from` (name of another run, or None),
        `steps`, numbers of examples, seconds of training and of the run.

    Raises:
        UserError: disk full, `torch.compile` failed, or an operator has no deterministic kernel.
    """
    started = time.monotonic()
    task = run.task
    mine = config_of_run(config, run, files)
    if run.starts_from is not None:
        source = dataclasses.replace(source, weights=_load_weights(files.weights(run.starts_from.name)))
    reproducibility.seed_all(run.seed)  # determines the head, and random weights
    with collect_garbage():
        model = build_model(source, task, config, cpu_autocast)
        scores, timestamp = _train_and_predict(
            mine, model, run, data, files, source.tokenizer.pad_token_id, attention_path
        )
        del model
    metrics = scores.epochs[-1]["metrics"]
    train_seconds = timestamp.total_wct.total_seconds()
    return {
        "task": task.name,
        "seed": run.seed,
        "score": metrics[task.metrics[0]],
        "metrics": metrics,
        "epochs": scores.epochs,
        "collapsed": scores.collapsed,
        "started_from": None if run.starts_from is None else run.starts_from.name,
        "steps": timestamp.batch.value,
        "train_examples": len(data.train),
        "dev_examples": sum(map(len, data.dev.values())),
        "train_seconds": train_seconds,
        "examples_per_second": timestamp.sample.value / max(train_seconds, 1e-9),
        "seconds": time.monotonic() - started,
        "finished_at": now(),
    }


def config_of_run(config: GlueConfig, run: PlannedRun, files: RunFiles) -> GlueConfig:
    """Apply the settings of the run's task, and give the run its own name, seed and checkpoint folder."""
    return own_folder(config_of_task(config, run.task), run.name, run.seed, os.path.basename(files.folder))


def _train_and_predict(
    config: GlueConfig,
    model: ElectraClassifier,
    run: PlannedRun,
    data: TaskData,
    files: RunFiles,
    pad_id: int,
    attention_path: str,
) -> tuple[EpochScores, Timestamp]:
    """Train and evaluate; predict the test sets; save logits, and the weights of an intermediate task."""
    scores, keep = EpochScores(), KeepLogits()
    dev = {run.task.dev_splits[name]: part for name, part in data.dev.items()}
    with fitted(config, model, data.train, dev, pad_id, attention_path, [scores, keep]) as (trainer, load):
        timestamp = trainer.state.timestamp
        if data.test:
            logits = {}
            for name, part in data.test.items():
                trainer.predict(load(part), return_outputs=False)
                logits[name] = keep.logits()
            save_logits(files.logits(run.name), logits)
        if config.intermediate and run.task.name == "mnli":
            _save_weights(files.weights(run.name), body_weights(model))
    return scores, timestamp


def test_sets(task: Task, tasks: list[Task]) -> dict[str, tuple[Task, str]]:
    """Return the test sets that a run of `task` predicts, including those of tasks that are never trained (AX).

    Returns:
        Key of the logits → task and split of the test set.
    """
    asked = [each for each in tasks if each.name == task.name or each.trained_by == task.name]
    return {logits_key(each, split): (each, split) for each in asked for split in each.submission}


def _save_weights(path: str, weights: dict[str, Any]) -> None:
    try:
        write_file(path, safetensors.torch.save(weights))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}; free some space or set another results=…") from error


def _load_weights(path: str) -> dict[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot read the weights from which other runs start: {error}; "
            "set another results=… to repeat that run"
        ) from error
