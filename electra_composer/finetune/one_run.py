"""One finetuning run: its settings, its data, its training, its scores."""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from composer import Evaluator, Trainer
from composer.core import DataSpec
from composer.utils import reproducibility
from safetensors import SafetensorError

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.config import GlueConfig, TaskSettings
from electra_composer.errors import UserError
from electra_composer.finetune.data import EncodedExamples, build_loader
from electra_composer.finetune.model import (
    EVAL_LABEL,
    ElectraClassifier,
    EpochScores,
    KeepLogits,
    body_weights,
    build_classifier,
)
from electra_composer.finetune.predictions import logits_key, save_logits
from electra_composer.finetune.ranking import RankedExamples, build_ranker, build_ranking_loader
from electra_composer.finetune.runs import PlannedRun, now
from electra_composer.finetune.tasks import Task
from electra_composer.training.builders import build_callbacks, build_optimizer, build_scheduler
from electra_composer.training.compilation import compile_errors_named
from electra_composer.training.startup import device_batch_size
from electra_composer.training.times import parse_time
from electra_composer.training.trainer import build_trainer

Encoded = EncodedExamples | RankedExamples


@dataclass
class TaskData:
    """What the runs of a task need, tokenized.

    Attributes:
        dev: by split: `dev`, for MNLI `dev_mm` as well.
        test: by the name under which its logits are kept; empty unless they are wanted.
    """

    train: Encoded
    dev: dict[str, Encoded]
    test: dict[str, Encoded] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """Where the runs of a group leave what is not in the record: one folder per group, so that none is mixed up."""

    folder: str

    def logits(self, run_name: str) -> str:
        return os.path.join(self.folder, "logits", f"{run_name}.npz")

    def weights(self, run_name: str) -> str:
        return os.path.join(self.folder, "weights", f"{run_name}.safetensors")

    @property
    def claims(self) -> str:
        return os.path.join(self.folder, "claims")


def config_of_task(config: GlueConfig, task: Task) -> GlueConfig:
    """The configuration with `task_settings` of this task in their places, and `trainer.max_duration` filled in."""
    own = config.task_settings.get(task.name, TaskSettings())

    def chosen(mine: Any, common: Any) -> Any:
        return common if mine is None else mine

    epochs = config.trainer.max_duration or f"{task.epochs}ep"
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            config.optimizer,
            lr=chosen(own.lr, config.optimizer.lr),
            layerwise_decay=chosen(own.layerwise_decay, config.optimizer.layerwise_decay),
        ),
        schedule=dataclasses.replace(config.schedule, warmup=chosen(own.warmup, config.schedule.warmup)),
        trainer=dataclasses.replace(
            config.trainer,
            max_duration=epochs if own.epochs is None else f"{own.epochs}ep",
            global_train_batch_size=chosen(own.batch_size, config.trainer.global_train_batch_size),
        ),
    )


def rehearse(config: GlueConfig, source: Pretrained, task: Task) -> None:
    """Build what a run of the task builds, and drop it: what is wrong shows before the first run, and leaves nothing.

    Raises:
        UserError: what the builders find wrong, named with the task if it is its own settings.
    """
    mine = config_of_task(config, task)
    own = task.name in config.task_settings
    assert mine.trainer.max_duration is not None
    try:
        device_batch_size(mine.trainer)
        if parse_time(mine.trainer.max_duration, "trainer.max_duration").value <= 0:
            raise UserError(f"trainer.max_duration is {mine.trainer.max_duration}; expected more than nothing")
        build_optimizer(mine.optimizer, build_model(source, task, config))
        build_scheduler(mine.schedule, mine.trainer.max_duration)
        build_callbacks(mine.callbacks)
    except UserError as error:
        raise UserError(f"task_settings.{task.name}: {error}" if own else str(error)) from error


def build_model(source: Pretrained, task: Task, config: GlueConfig, cpu_autocast: bool = False) -> ElectraClassifier:
    """What is finetuned: a classifier, or, for a task that is ranked, the discriminator itself."""
    build = build_ranker if task.ranked else build_classifier
    return build(source, task, config.model, cpu_autocast)


def examples_seen(config: GlueConfig, task: Task, train_examples: int) -> int:
    """About how many training examples a run of the task goes through: what its time is told from."""
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
    """Train a fresh model from `source` and score it on dev; keep its logits and weights where they are wanted.

    Args:
        config: of all runs.
        source: whose weights are copied; what is in memory stays as it is.
        data: of the run's task.
        files: where logits (`predict.enabled`) and MNLI's weights (`intermediate`) go, and these are taken from.

    Returns:
        What the record keeps of the run, but for its group and settings: `task`, `seed`, `score` and `metrics` × 100
        (None where undefined), `epochs` (the scores at each evaluation), `collapsed`, `started_from` (the name of
        another run, or None), `steps`, sizes, seconds of training and of the whole run.

    Raises:
        UserError: disk full, or `torch.compile` failed.
    """
    started = time.monotonic()
    task, seed = run.task, run.seed
    mine = config_of_task(config, task)
    mine = dataclasses.replace(
        mine,
        run_name=f"{config.run_name}-{run.name}",
        seed=seed,
        checkpoints=dataclasses.replace(
            config.checkpoints,
            folder=os.path.join(config.checkpoints.folder, os.path.basename(files.folder), run.name),
            # A run is minutes: one that was cut off starts anew, and never from what another left there.
            resume=False,
            overwrite=True,
        ),
    )
    if run.needs is not None:
        source = dataclasses.replace(source, weights=_load_weights(files.weights(run.needs.name)))
    reproducibility.seed_all(seed)  # the head, and random weights, follow from it
    model = build_model(source, task, config, cpu_autocast)
    model.model.attention_path = attention_path
    pad_id, workers = source.tokenizer.pad_token_id, config.data.num_workers

    def load(examples: Encoded, batch_size: int, shuffle_seed: int | None) -> DataSpec:
        if isinstance(examples, RankedExamples):
            return build_ranking_loader(examples, pad_id, batch_size, workers, shuffle_seed)
        return build_loader(examples, pad_id, batch_size, workers, shuffle_seed)

    def evaluation(examples: Encoded) -> DataSpec:
        return load(examples, config.trainer.device_eval_batch_size, shuffle_seed=None)

    scores, keep = EpochScores(), KeepLogits()
    assert mine.trainer.max_duration is not None
    trainer = build_trainer(
        mine,
        model,
        load(data.train, device_batch_size(mine.trainer), shuffle_seed=seed),
        evaluation(data.dev["dev"]),
        mine.trainer.max_duration,
        callbacks=[scores, keep],
        static_shapes=False,  # a batch is as long as its longest example
    )
    try:
        with compile_errors_named():
            _fit(
                trainer, mine, {EVAL_LABEL + task.dev_splits[name]: evaluation(part) for name, part in data.dev.items()}
            )
        timestamp = trainer.state.timestamp
        train_seconds = timestamp.total_wct.total_seconds()
        if data.test:
            logits = {}
            for name, part in data.test.items():
                trainer.predict(evaluation(part), return_outputs=False)
                logits[name] = keep.logits()
            save_logits(files.logits(run.name), logits)
        if config.intermediate and task.name == "mnli":
            _save_weights(files.weights(run.name), body_weights(model))
    finally:
        trainer.close()
        del trainer, model
        gc.collect()  # trainers refer to themselves; without this their models pile up on the device
    metrics = scores.epochs[-1]["metrics"]
    return {
        "task": task.name,
        "seed": seed,
        "score": metrics[task.metrics[0]],
        "metrics": metrics,
        "epochs": scores.epochs,
        "collapsed": scores.collapsed,
        "started_from": None if run.needs is None else run.needs.name,
        "steps": timestamp.batch.value,
        "train_examples": len(data.train),
        "dev_examples": sum(map(len, data.dev.values())),
        "train_seconds": train_seconds,
        "examples_per_second": timestamp.sample.value / max(train_seconds, 1e-9),
        "seconds": time.monotonic() - started,
        "finished_at": now(),
    }


def test_sets(task: Task, tasks: list[Task]) -> dict[str, tuple[Task, str]]:
    """The test sets that a run of `task` answers, among them those of tasks that are never trained (AX).

    Returns:
        By the name under which their logits are kept: the task whose files it is of, and its split.
    """
    asked = [each for each in tasks if each.name == task.name or each.trained_by == task.name]
    return {logits_key(each, split): (each, split) for each in asked for split in each.submission}


def _fit(trainer: Trainer, config: GlueConfig, dev: dict[str, DataSpec]) -> None:
    """Train; with several dev sets, all are scored at each evaluation."""
    if len(dev) == 1:
        trainer.fit()
        return
    evaluators = [Evaluator(label=label, dataloader=data) for label, data in dev.items()]
    trainer.fit(eval_dataloader=evaluators, eval_interval=config.trainer.eval_interval)


def _save_weights(path: str, weights: dict[str, Any]) -> None:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        safetensors.torch.save_file(weights, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        raise UserError(f"{path}: cannot be written: {error}; free some space or set another results=…") from error


def _load_weights(path: str) -> dict[str, Any]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the weights of a run that others start from cannot be read: {error}; "
            "set another results=… to do that run again"
        ) from error
