"""The numbers of a report: a table over the runs, their starts and ends, and the scores of finetuning."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from electra_composer.reports.runs import Results, Run

ABSENT = "—"


class Score(NamedTuple):
    """Scores of finetuning on a task over its seeds."""

    model: str
    task: str
    metric: str
    runs: list[tuple[int, float]]  # seed, score

    @property
    def mean(self) -> str:
        scores = [score for _, score in self.runs]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        return f"{statistics.fmean(scores):.2f}{spread}"


def summary(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of runs, name → text for each run, without those that no run has."""
    rows: dict[str, Callable[[Run], str | None]] = {
        "state": state,
        "steps": lambda run: f"{run.steps:,} of {run.value('trainer.max_duration')}",
        "tokens": lambda run: _last_of_axis(run, "tokens", short),
        "training time": lambda run: _last_of_axis(run, "hours", duration),
        "generator loss, last": lambda run: _recent(run, "metrics/train/mlm_loss", ".3f"),
        "generator loss, validation": lambda run: _last(run, "metrics/eval/mlm_loss", ".3f"),
        "discriminator loss, last": lambda run: _recent(run, "metrics/train/rtd_loss", ".4f"),
        "discriminator loss, validation": lambda run: _last(run, "metrics/eval/rtd_loss", ".4f"),
        "discriminator AUC, validation": lambda run: _last(run, "metrics/eval/rtd_auc", ".4f"),
        "total loss, last": lambda run: _recent(run, "loss/train/total", ".3f"),
        "tokens per second": lambda run: _over(run, "throughput/tokens_per_sec", np.median, short),
        "MFU": lambda run: _over(run, "throughput/device/mfu", np.median, "{:.1%}".format),
        "waiting for data": lambda run: _over(run, "data/wait_share", np.mean, "{:.1%}".format),
        "peak device memory": lambda run: _over(run, "memory/peak_allocated_mem", np.max, "{:.2f} GB".format),
        "peak host memory": lambda run: _over(run, "memory/peak_resident_mem", np.max, "{:.2f} GB".format),
        "restarts": lambda run: str(len(run.restarts)) if run.sessions else None,
        "skipped updates": lambda run: _last(run, "trouble/skipped_updates", ".0f"),
        "loss spikes": lambda run: _last(run, "trouble/loss_spikes", ".0f"),
        "checkpoints here": lambda run: str(len(run.checkpoints)),
        "rows per step": lambda run: _text(run.value("trainer.global_train_batch_size")),
        "precision": lambda run: _text(run.value("trainer.precision")),
        "seed": lambda run: _text(run.value("seed")),
    }
    table = {name: [value(run) for run in runs] for name, value in rows.items()}
    return [(name, [each or ABSENT for each in texts]) for name, texts in table.items() if any(texts)]


def state(run: Run) -> str:
    """Describe whether a run is running, has finished, or was interrupted."""
    if run.is_running:
        return "running"
    fraction = progress(run)
    if fraction is not None and fraction >= 1:
        return "finished"
    if not run.metrics.axes:
        return "no metrics"
    part = f" at {int(1000 * fraction) / 10:g}%" if fraction is not None else ""
    killed = run.sessions and run.sessions[-1].end is None
    return f"{'killed' if killed else 'stopped'}{part}"


def progress(run: Run) -> float | None:
    """Return the fraction of training that is done; None if the duration is not in batches, samples or tokens."""
    text = str(run.value("trainer.max_duration"))
    axes = run.metrics.axes
    units = {"ba": float(run.steps), "sp": float(run.steps) * (run.value("trainer.global_train_batch_size") or 0)}
    if "tokens" in axes:
        units["tok"] = float(axes["tokens"][-1])
    for unit, done in units.items():
        if text.endswith(unit):
            try:
                return min(1.0, done / float(text.removesuffix(unit)))
            except (ValueError, ZeroDivisionError):
                return None
    return None


def status_line(run: Run) -> str:
    """Describe the progress of a run in one line."""
    parts = [f"{run.name}: {state(run)}, {run.steps:,} of {run.value('trainer.max_duration')}"]
    for label, text in (
        ("", _last_of_axis(run, "tokens", lambda value: f"{short(value)} tokens")),
        ("generator loss ", _recent(run, "metrics/train/mlm_loss", ".3f")),
        ("discriminator loss ", _recent(run, "metrics/train/rtd_loss", ".4f")),
        ("", _last(run, "throughput/tokens_per_sec", ",.0f", " tokens/s")),
        ("about ", _left(run)),
    ):
        if text is not None:
            parts.append(f"{label}{text}")
    return ", ".join(parts)


def _left(run: Run) -> str | None:
    if not run.is_running:
        return None
    _, values = run.metrics.series("time/remaining_estimate")
    return f"{duration(float(values[-1]))} left" if len(values) else None


def history(run: Run) -> list[tuple[str, str, str, str]]:
    """Return the starts and ends of a run: start, from batch, end, what was trained."""
    rows = []
    for number, session in enumerate(run.sessions):
        start, end = session.start, session.end
        later = run.sessions[number + 1].start["batch"] if number + 1 < len(run.sessions) else None
        where = f"{start.get('ranks', 1)} × {start.get('device', 'device')}"
        if end is not None:
            done = f"until batch {end['batch']:,}"
            if later is not None and later < end["batch"]:
                done += f"; {end['batch'] - later:,} of them were repeated"
        else:
            done = "running" if run.is_running and later is None else "no end recorded: killed"
            if later is not None:
                done += f"; resumed from batch {later:,}"
        rows.append((start["time"], f"batch {start['batch']:,}, {where}", end["time"] if end else ABSENT, done))
    return rows


def checkpoint_rows(run: Run) -> list[tuple[str, str, str]]:
    """Return name, batch and size of each checkpoint."""
    rows = []
    for saved in run.checkpoints:
        size = f"{os.path.getsize(saved.path) / 1e6:,.1f} MB" if os.path.isfile(saved.path) else ABSENT
        rows.append((os.path.basename(saved.path), f"{saved.batch:,}", size))
    return rows


def scores(runs: list[Run]) -> list[Score]:
    """Return the scores of finetuning that started from the runs, in the order of models and tasks."""
    return [
        Score(_model(run, results, len(runs) > 1), task["task"], task["metric"], known)
        for run in runs
        for results in run.results
        for task in results.tasks.values()
        if (known := [(each["seed"], each["score"]) for each in task["runs"] if each["score"] is not None])
    ]


def _model(run: Run, results: Results, several: bool) -> str:
    name = os.path.basename(os.path.dirname(os.path.abspath(results.path)))
    start = f"{'random weights like ' if results.is_random else ''}{results.source}" if results.source else None
    start = start or ("random weights" if results.is_random else "pretrained")
    return f"{f'{run.name}, ' if several and results.source is None else ''}{start} ({name})"


def short(value: float) -> str:
    """Format a count: 950, 12.3k, 4.56M, 7.89B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def duration(hours: float) -> str:
    """Format a time: 35 s, 12.5 min, 3.2 h, 4.1 days."""
    for size, unit in ((24.0, "days"), (1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:.3g} {unit}"
    return f"{hours * 3600:.0f} s"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _last_of_axis(run: Run, axis: str, form: Callable[[float], str]) -> str | None:
    values = run.metrics.axes.get(axis)
    return None if values is None else form(float(values[-1]))


def _last(run: Run, name: str, form: str, unit: str = "") -> str | None:
    _, values = run.metrics.series(name)
    return f"{values[-1]:{form}}{unit}" if len(values) else None


def _recent(run: Run, name: str, form: str) -> str | None:
    """Format the mean of the last 2% of the values."""
    _, values = run.metrics.series(name)
    return f"{values[-max(1, len(values) // 50) :].mean():{form}}" if len(values) else None


def _over(run: Run, name: str, statistic: Callable[[Any], Any], form: Callable[[float], str]) -> str | None:
    _, values = run.metrics.series(name)
    return form(float(statistic(values))) if len(values) else None
