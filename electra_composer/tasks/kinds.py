"""Kinds of tasks by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from electra_composer.errors import UserError
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.tasks.base import Task
from electra_composer.tasks.classification import Classification
from electra_composer.tasks.question_answering import QuestionAnswering
from electra_composer.tasks.regression import Regression
from electra_composer.tasks.tagging import Tagging

KINDS: dict[str, type[Task]] = {each.kind: each for each in (Classification, Regression, Tagging, QuestionAnswering)}

KEYS: Mapping[str, tuple[str, ...]] = {
    "classification": ("multi_label", "label_separator", "class_weights"),
    "regression": ("standardize",),
    "tagging": ("scheme", "context", "stride"),
    "qa": ("stride", "max_answer_length", "n_best", "unanswerable"),
}
"""Keys of `task` that only some kinds have, by kind."""


def build_task(config: TaskConfig, model: TaskModelConfig) -> Task:
    """Build a task that has not learned yet.

    Raises:
        UserError: a key of other kinds is not at its default, or a head that the kind does not have.
    """
    defaults = TaskConfig()
    for field in dataclasses.fields(TaskConfig):
        owners = [kind for kind, keys in KEYS.items() if field.name in keys]
        value = getattr(config, field.name)
        if owners and config.kind not in owners and value != getattr(defaults, field.name):
            raise UserError(
                f"task.{field.name} is {value!r}, and task.kind is {config.kind}; only {' and '.join(owners)} has this "
                "key: remove it"
            )
    if model.head == "joint" and config.kind != "qa":
        raise UserError(f"model.head is joint, which only qa has, and task.kind is {config.kind}; set another")
    return KINDS[config.kind](config, model)
