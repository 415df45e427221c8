"""Checks of the settings of finetuning that need no file and no device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from electra_composer.errors import UserError, nearest
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.one_run import config_of_task
from electra_composer.finetuning.predictions import check_select
from electra_composer.finetuning.tasks import TASKS, Task, find_task
from electra_composer.glue_config import GlueConfig
from electra_composer.training.startup import check_run_settings


def check_config(config: GlueConfig) -> tuple[list[Task], GlueConfig]:
    """Check the configuration; return its tasks without duplicates, and itself with `task_settings` keyed by task name.

    Raises:
        UserError: a task is unknown, there is none, or a setting is not supported in finetuning.
    """
    names = list(dict.fromkeys(find_task(name).name for name in config.tasks))
    if not names:
        raise UserError("tasks is empty; expected names such as [cola, sst2]")
    check_shared(config)
    for name in names:
        if (other := TASKS[name].trained_by) is not None and other not in names:
            raise UserError(f"tasks: {name} is predicted by the runs of {other}; add {other}, or remove {name}")
    if all(TASKS[name].trained_by for name in names):
        raise UserError(f"tasks is {config.tasks}: nothing to finetune; expected names such as [cola, sst2]")
    if config.intermediate and "mnli" not in names:
        raise UserError("intermediate is true: runs start from MNLI runs; add mnli to tasks")
    if config.loss_reduction == "sum" and config.wnli == "coreference" and "wnli" in names:
        raise UserError("loss_reduction is sum, but the ranking loss of wnli=coreference is a mean; set one of the two")
    if config.predict.enabled:
        check_select(config.predict.select, config.seeds)
    settings = {name_of_task(name): own for name, own in config.task_settings.items()}
    found = [dataclasses.replace(task, **_protocol(config, task)) for task in map(TASKS.__getitem__, names)]
    return found, dataclasses.replace(config, task_settings=settings)


def check_shared(config: GlueConfig | FinetuneConfig) -> None:
    """Refuse equal seeds and the settings that apply to pretraining only.

    Raises:
        UserError: naming the key.
    """
    if len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds is {config.seeds}; expected different integers, one per run")
    if config.checkpoints.load_path is not None:
        raise UserError("checkpoints.load_path applies to pretraining only; set model.source instead")
    if config.checkpoints.remote is not None:
        raise UserError("checkpoints.remote applies to pretraining only; copy checkpoints.folder after the runs")
    if config.trainer.eval_batches is not None:
        raise UserError("trainer.eval_batches applies to pretraining only; all examples are scored: set it to null")
    if config.trainer.fsdp is not None:
        raise UserError("trainer.fsdp applies to pretraining only; a finetuning run has one device: set it to null")


def name_of_task(name: str) -> str:
    """Return the name of the task that a key of `task_settings` means.

    Raises:
        UserError: there is no such task.
    """
    for task in TASKS.values():
        if name.casefold() in (task.name, task.folder.casefold()) and task.trained_by is None:
            break
    else:
        raise UserError(f"task_settings.{name}: no such task; {nearest(name.casefold(), list(TASKS))}")
    return task.name


def _protocol(config: GlueConfig, task: Task) -> dict[str, Any]:
    """Return the attributes of a task that the configuration changes."""
    changes: dict[str, Any] = {}
    if config.regression_targets == "raw":
        changes["target_scale"] = 1.0
    if config.wnli == "coreference" and task.name == "wnli":
        changes["ranked"] = True
    if not config.double_unordered:
        changes["swap_augmentation"] = False
    return changes


def check_settings_of_task(config: GlueConfig, task: Task) -> None:
    """Check the settings of the runs of a task; see :func:`check_run_settings`."""
    mine = config_of_task(config, task)
    assert mine.trainer.max_duration is not None
    with errors_named_for(config, task):
        check_run_settings(mine, mine.trainer.max_duration)


@contextlib.contextmanager
def errors_named_for(config: GlueConfig, task: Task) -> Iterator[None]:
    """Name `task_settings.<task>` in errors, if the task has settings of its own."""
    try:
        yield
    except UserError as error:
        own = task.name in config.task_settings
        raise UserError(f"task_settings.{task.name}: {error}" if own else str(error)) from error
