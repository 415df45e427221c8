"""Read the results files of `glue.py` and `finetune.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from electra_composer.errors import UserError


def tasks_of(results: Mapping[str, Any]) -> list[str]:
    """Return the tasks that are averaged: those of the eight of GLUE that have runs; all tasks of other results."""
    return results["average"]["tasks"] if "average" in results else list(results["tasks"])


def read_results(path: str) -> dict[str, Any]:
    """Read a results file of `glue.py` or `finetune.py`.

    Raises:
        UserError: the file does not exist or is not a results file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        ours = {"tasks", "settings", "group"} <= results.keys() and isinstance(tasks_of(results), list)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a results.json that glue.py or finetune.py wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path}: not a results file; expected a results.json that glue.py or finetune.py wrote")
    return results
