"""Configurations, settings and records of finetuning runs for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny import ROOT

from electra_composer.config_loading import load_config
from electra_composer.finetuning.results import group_of, summary
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue_config import GlueConfig

EIGHT = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
Scores = Mapping[str, list[float | None]]

SOURCE: dict[str, Any] = {
    "name": "a model",
    "random_init": False,
    "sizes": {"hidden_size": 256, "dropout": 0.1},
    "weights_sha256": "ab" * 32,
    "vocabulary_sha256": "cd" * 32,
}


def glue_config(*overrides: str) -> GlueConfig:
    """Load `yamls/glue.yaml` with overrides."""
    required = ["model.source=somewhere", "checkpoints.folder=runs"]
    return load_config(str(ROOT / "yamls" / "glue.yaml"), [*required, *overrides], GlueConfig)


def settings_of(*overrides: str, weights: str | None = SOURCE["weights_sha256"], hidden_size: int = 256) -> Any:
    """Return the settings of the group of a configuration."""
    sizes = {**SOURCE["sizes"], "hidden_size": hidden_size}
    return group_of(glue_config(*overrides), {**SOURCE, "sizes": sizes, "weights_sha256": weights})[1]


def make_run(task: str, seed: int, score: float | None, group: str = "g", **changes: Any) -> dict[str, Any]:
    """Build the record of a finished run."""
    metric = {"cola": "matthews", "stsb": "spearman"}.get(task, "accuracy")
    run = {
        "group": group,
        "task": task,
        "seed": seed,
        "score": score,
        "metrics": {metric: score, "f1": 50.0},
        "collapsed": False,
        "source": "a model",
        "settings": {"optimizer.lr": 1e-4},
    }
    return {**run, **changes}


def make_results(scores: Scores, settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Summarize runs with seeds 1, 2, …; a run without a score or with a score of 0 counts as collapsed."""
    settings = settings or settings_of()
    runs = []
    for name, values in scores.items():
        for seed, score in enumerate(values, 1):
            run = make_run(name, seed, score, settings=settings, metrics=dict.fromkeys(TASKS[name].metrics, score))
            runs.append(
                {**run, "collapsed": not score, "versions": {"torch": "2.7.0"}, "started_from": None, **changes}
            )
    return summary(runs, settings, "g")


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")]
