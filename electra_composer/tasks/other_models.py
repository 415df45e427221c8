"""Restore the task of a model that others have finetuned, from the configuration of transformers."""

from __future__ import annotations

from typing import Any

from transformers import ElectraConfig

from electra_composer.finetune_config import TaskConfig
from electra_composer.tasks.spans import OUTSIDE
from electra_composer.tasks.tag_sets import NO_SPANS


def learned_by_others(kind: str, config: ElectraConfig) -> tuple[TaskConfig, dict[str, Any]]:
    """Return the task, and the state of :meth:`Task.load_state`.

    Args:
        kind: by the class of the model: `classification`, also for a regression, `tagging` or `qa`.
        config: labels, and the type of the problem. The tags of spans are read as BIOES if one begins with `S-` or
            `E-`, else as IOB2. Questions are taken to have an answer.
    """
    labels = [str(config.id2label[index]) for index in range(config.num_labels)]
    count = len(labels)
    if kind == "qa":
        return TaskConfig(kind="qa"), {"unanswerable": False, "null_threshold": None}
    if kind == "tagging":
        fallback = labels.index(OUTSIDE) if OUTSIDE in labels else 0
        return TaskConfig(kind="tagging"), {"scheme": _scheme(labels), "labels": labels, "fallback": fallback}
    if config.problem_type == "regression" or (config.problem_type is None and count == 1):
        return TaskConfig(kind="regression"), {"names": labels, "mean": [0.0] * count, "std": [1.0] * count}
    several = config.problem_type == "multi_label_classification"
    return TaskConfig(kind="classification"), {"labels": labels, "multi_label": several, "temperature": 1.0}


def _scheme(labels: list[str]) -> str:
    prefixes = {label[:2] for label in labels}
    if prefixes & {"S-", "E-"}:
        return "bioes"
    return "iob2" if prefixes & {"B-", "I-"} else NO_SPANS
