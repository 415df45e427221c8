"""Saved models of the runs of a task: one folder per seed, of the best seed only or of all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from electra_composer.atomic_files import locked, remove, write_file
from electra_composer.checkpoints.weights import Pretrained
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.task_run import Trained
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.base import Task
from electra_composer.tasks.saved import is_saved_model, save_model


class Models:
    """Folders of the models of a group of runs: `checkpoints.folder/models/group/seed1`, ….

    Args:
        config: of the runs.
        group: of the runs.
        task: whose score decides which seed is the best.
    """

    def __init__(self, config: FinetuneConfig, group: str, task: Task):
        self.config = config
        self.task = task
        self.group = group
        self.folder = os.path.join(config.checkpoints.folder, "models", group)

    def path(self, seed: int) -> str:
        return os.path.join(self.folder, f"seed{seed}")

    def save(self, trained: Trained, source: Pretrained, max_seq_length: int) -> None:
        """Save the model of a run, complete or not at all.

        Raises:
            UserError: the disk is full.
        """
        if self.config.save != "none":
            folder = self.path(trained.record["seed"])
            save_model(trained.model.model, trained.task, source, max_seq_length, folder, overwrite=True)

    def save_analysis(self, seed: int, analysis: Analysis) -> None:
        """Save the error analysis of a run, beside its model."""
        write_file(f"{self.path(seed)}-errors.json", json.dumps(vars(analysis), ensure_ascii=False) + "\n")

    def analysis_of_best(self, store: RunStore) -> dict[str, Any] | None:
        """Return the error analysis of the best run; None if there is none."""
        for run in self.ranked(store)[:1]:
            path = f"{self.path(run['seed'])}-errors.json"
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                return json.load(file)
        return None

    def ranked(self, store: RunStore) -> list[dict[str, Any]]:
        """Return `seed` and `score` of the runs of the configured seeds, the best first; ties by seed."""
        lower = self.task.score in self.task.lower_is_better
        runs = [run for run in store.runs(self.group) if run["seed"] in self.config.seeds]

        def rank(run: dict[str, Any]) -> tuple[bool, float, int]:
            score = run["score"]
            return (score is None, 0.0 if score is None else score if lower else -score, run["seed"])

        return [{"seed": run["seed"], "score": run["score"]} for run in sorted(runs, key=rank)]

    def keep(self, store: RunStore) -> list[dict[str, Any]]:
        """Remove the models that are not to be kept, and return the others as in the results file, the best first."""
        ranked = self.ranked(store)
        os.makedirs(self.folder, exist_ok=True)
        with locked(self.folder):
            if self.config.save == "best":
                for run in ranked[1:]:
                    folder = self.path(run["seed"])
                    if is_saved_model(folder):
                        remove(folder)
        base = os.path.dirname(self.config.results) or "."
        return [
            {**run, "folder": os.path.relpath(self.path(run["seed"]), base)}
            for run in ranked
            if is_saved_model(self.path(run["seed"]))
        ]


def best_model(results: Mapping[str, Any], path: str) -> str | None:
    """Return the folder of the best saved model of a results file at `path`; None if there is none."""
    models = results["models"]
    return os.path.normpath(os.path.join(os.path.dirname(path), models[0]["folder"])) if models else None
