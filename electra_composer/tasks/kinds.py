"""The kinds of tasks by name."""

from __future__ import annotations

from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.tasks.base import Task
from electra_composer.tasks.classification import Classification
from electra_composer.tasks.question_answering import QuestionAnswering
from electra_composer.tasks.tagging import Tagging

KINDS: dict[str, type[Task]] = {"classification": Classification, "tagging": Tagging, "qa": QuestionAnswering}


def build_task(config: TaskConfig, model: TaskModelConfig) -> Task:
    """Build a task."""
    return KINDS[config.kind](config, model)
