"""Read the folder of a pretraining run: configuration, metrics, checkpoints, history and finetuning results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from electra_composer.checkpoints.resuming import is_locked
from electra_composer.checkpoints.saving import SavedCheckpoint, checkpoints_in
from electra_composer.errors import UserError
from electra_composer.finetuning.results_file import read_results
from electra_composer.reports.metrics import HOURS, Metrics, find_metrics, read_metrics
from electra_composer.training.history import HISTORY


@dataclass
class Session:
    """A start of a run and its end."""

    start: dict[str, Any]  # a line of history.jsonl
    end: dict[str, Any] | None = None  # None: it was killed, or is running


@dataclass
class Results:
    """Scores of finetuning that started from a run."""

    path: str
    is_random: bool  # from random weights of its sizes
    source: str | None  # what it started from, if not from the run
    tasks: dict[str, Any]  # as in a results file


@dataclass
class Run:
    """What the folder of a run holds."""

    folder: str
    name: str
    config: dict[str, Any]
    config_text: str
    metrics: Metrics
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)  # names of records of batches
    results: list[Results] = field(default_factory=list)
    is_running: bool = False
    notes: list[str] = field(default_factory=list)  # what is missing or damaged

    @property
    def restarts(self) -> list[Session]:
        return self.sessions[1:]

    @property
    def steps(self) -> int:
        """Batches done, by the last row of the metrics."""
        steps = self.metrics.axes.get("step")
        return 0 if steps is None else int(steps[-1])

    def value(self, path: str, default: Any = None) -> Any:
        """Return a value of the configuration by its dotted key."""
        found: Any = self.config
        for name in path.split("."):
            if not isinstance(found, dict) or name not in found:
                return default
            found = found[name]
        return found


def read_runs(folders: Sequence[str], results: Sequence[str] = ()) -> list[Run]:
    """Read the folders of runs, and results files beside those that are found.

    Args:
        results: each is added to the run that it started from, or to the first one.

    Raises:
        UserError: as :func:`read_run`; or one of `results` is not a results file.
    """
    runs = [read_run(folder) for folder in folders]
    for path in dict.fromkeys(map(os.path.abspath, results)):
        content = read_results(path)
        run = next((run for run in runs if _is_source(content.get("source"), run.folder)), None)
        if not any(os.path.samefile(each.path, path) for each in (run.results if run else ())):
            source = None if run else str(content.get("source"))
            is_random = bool(content["settings"].get("model.random_init"))
            (run or runs[0]).results.append(Results(path, is_random, source, content["tasks"]))
    return runs


def read_run(folder: str) -> Run:
    """Read the folder of a run of `pretrain.py`.

    Args:
        folder: it must have a `config.yaml`; everything else may be missing.

    Raises:
        UserError: no such folder, not a run of pretrain.py, or a file in it cannot be read.
    """
    expected = "expected the folder of a run of pretrain.py (checkpoints.folder), with its config.yaml"
    path = Path(folder, "config.yaml")
    if not path.is_file():
        found = "no config.yaml in it" if os.path.isdir(folder) else "no such folder"
        raise UserError(f"{folder}: {found}; {expected}")
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        is_run = isinstance(config, dict) and isinstance(config.get("trainer"), dict) and "objective" in config
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}; {expected}") from error
    if not is_run:
        raise UserError(f"{path}: not the configuration of pretrain.py; {expected}")
    run = Run(folder, str(config.get("run_name", os.path.basename(os.path.abspath(folder)))), config, text, Metrics())
    run.checkpoints = checkpoints_in(folder)
    run.sessions = _read_history(os.path.join(folder, HISTORY))
    run.is_running = is_locked(folder)
    trouble = Path(folder, "trouble")
    run.trouble = sorted(each.name for each in trouble.glob("*.json")) if trouble.is_dir() else []
    run.results = find_results(folder)
    _add_metrics(run)
    return run


def _add_metrics(run: Run) -> None:
    path = find_metrics(run.folder, run.value("loggers.metrics_file.path"))
    if path is None:
        run.notes.append(f"{run.folder}: no metrics file, so there are no curves; add loggers.metrics_file to the YAML")
        return
    unit = run.value("callbacks.speed_monitor.time_unit", "hours")
    try:
        run.metrics = read_metrics(path, unit if unit in HOURS else "hours")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not run.metrics.axes:
        run.notes.append(f"{path} has no rows yet, so there are no curves")
    if run.metrics.damaged:
        run.notes.append(f"{path}: {run.metrics.damaged} incomplete or damaged lines are left out")
    if run.metrics.not_finite:
        run.notes.append(f"{path}: {run.metrics.not_finite} values are not finite, and not drawn")


def _read_history(path: str) -> list[Session]:
    """Read the starts and ends; lines that a crash has damaged are left out."""
    sessions: list[Session] = []
    if not os.path.isfile(path):
        return sessions
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
            is_start = event["event"] == "start"
            event["batch"], event["time"]
        except (ValueError, KeyError, TypeError):
            continue
        if is_start:
            sessions.append(Session(event))
        elif sessions:
            sessions[-1].end = event
    return sessions


def find_results(folder: str) -> list[Results]:
    """Find the results of finetuning that started from a run, in the folders beside it and below them."""
    parent = Path(os.path.abspath(folder)).parent
    results = []
    for path in (path for pattern in ("*/results.json", "*/*/results.json") for path in sorted(parent.glob(pattern))):
        with contextlib.suppress(UserError):  # a file of something else
            content = read_results(str(path))
            if content["tasks"] and _is_source(content.get("source"), folder):
                is_random = bool(content["settings"].get("model.random_init"))
                results.append(Results(str(path), is_random, None, content["tasks"]))
    return results


def _is_source(source: Any, folder: str) -> bool:
    """Whether finetuning from `source` started from the run in `folder`; relative to any working directory."""
    if not isinstance(source, str):
        return False
    run, path = os.path.realpath(folder), os.path.realpath(source)
    if os.path.isabs(source) or os.path.exists(path):
        return path == run or path.startswith(run + os.sep)
    return f"{run}{os.sep}".endswith(f"{os.sep}{os.path.normpath(source)}{os.sep}")
