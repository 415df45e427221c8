"""Picture of a task over seeds: score of each run, score by epoch, and the errors of the best model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from electra_composer.finetuning.plot import MEAN, RUN
from electra_composer.tasks.analysis import Analysis

MOST_LABELS = 40  # of a confusion matrix; of more labels the most frequent confusions are shown
MOST_BARS = 30
PANEL = 4.2  # inches


def plot_task(row: Mapping[str, Any], title: str, analysis: Analysis | None) -> bytes:
    """Draw the runs of a task, and the errors of the best one, as PNG.

    Args:
        row: entry of `tasks` in the results, with at least one run.
        analysis: of the best run.
    """
    # Not pyplot, which has global state; a bare Figure renders with Agg on a machine without a display.
    from matplotlib.figure import Figure

    panels = [lambda axes: _seeds(axes, row), lambda axes: _epochs(axes, row)]
    if analysis is not None and analysis.scatter:
        panels.append(lambda axes: _scatter(axes, analysis))
    elif analysis is not None and analysis.confusion is not None:
        few = len(analysis.labels) <= MOST_LABELS
        panels.append(lambda axes: (_confusion if few else _pairs)(axes, analysis))
    if analysis is not None and analysis.per_label and "f1" in analysis.per_label[0]:
        panels.append(lambda axes: _per_label(axes, analysis))
    widths = [0.6, 1.0, *([1.4] * (len(panels) - 2))]
    figure = Figure(figsize=(PANEL * sum(widths), PANEL * 1.15), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0], panels, strict=True):
        draw(axes)
        axes.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _seeds(axes: Any, row: Mapping[str, Any]) -> None:
    scores = [run["score"] for run in row["runs"] if run["score"] is not None]
    axes.plot(np.linspace(-0.2, 0.2, len(scores)) if len(scores) > 1 else [0] * len(scores), scores, "o", color=RUN)
    if row["mean"] is not None:
        half = row["confidence"]
        axes.errorbar([0.35], [row["mean"]], yerr=None if half is None else [half], fmt="_", color=MEAN, capsize=4)
    axes.set_xlim(-0.6, 0.6)
    axes.set_xticks([0, 0.35], ["runs", "mean"] if row["confidence"] is None else ["runs", "mean,\n95%"], fontsize=8)
    axes.set_title(row["metric"], fontsize=9)
    axes.grid(axis="y", alpha=0.3)


def _epochs(axes: Any, row: Mapping[str, Any]) -> None:
    for run in row["runs"]:
        points = [(each["epoch"], each["metrics"][row["metric"]]) for each in run["epochs"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=f"seed {run['seed']}")
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_title(f"{row['metric']} by epoch", fontsize=9)
    axes.grid(alpha=0.3)
    if len(row["runs"]) <= 10:
        axes.legend(fontsize=7, frameon=False)


def _confusion(axes: Any, analysis: Analysis) -> None:
    counts = np.zeros((len(analysis.labels), len(analysis.labels)), dtype=int)
    for expected, predicted, number in analysis.confusion or ():
        counts[expected, predicted] = number
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    size = 8 if len(counts) <= 10 else 5
    places = range(len(counts))
    axes.set_xticks(places, [_short(name) for name in analysis.labels], rotation=90, fontsize=size)
    axes.set_yticks(places, [_short(name) for name in analysis.labels], fontsize=size)
    if len(counts) <= 12:
        for i in places:
            for j in places:
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("label", fontsize=8)
    axes.set_title("confusion", fontsize=9)


def _pairs(axes: Any, analysis: Analysis) -> None:
    wrong = [each for each in analysis.confusion or () if each[0] != each[1]]
    pairs = sorted(wrong, key=lambda each: -each[2])[:MOST_BARS]
    names = [f"{_short(analysis.labels[i])} → {_short(analysis.labels[j])}" for i, j, _ in pairs]
    axes.barh(range(len(pairs)), [number for _, _, number in pairs], color=RUN)
    axes.set_yticks(range(len(pairs)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_title("most frequent confusions (label → predicted)", fontsize=9)


def _scatter(axes: Any, analysis: Analysis) -> None:
    targets, predictions = np.array(analysis.scatter).T
    axes.plot(targets, predictions, ".", markersize=3, alpha=0.4, color=RUN)
    low, high = min(targets.min(), predictions.min()), max(targets.max(), predictions.max())
    axes.plot([low, high], [low, high], linewidth=0.8, color=MEAN)
    axes.set_xlabel("target", fontsize=8)
    axes.set_ylabel("prediction", fontsize=8)
    axes.set_title("predictions", fontsize=9)


def _per_label(axes: Any, analysis: Analysis) -> None:
    rows = sorted(analysis.per_label, key=lambda row: row["f1"])[:MOST_BARS]
    axes.barh(range(len(rows)), [100 * row["f1"] for row in rows], color=RUN)
    axes.set_yticks(range(len(rows)), [f"{_short(row['label'])} ({row['examples']:,})" for row in rows], fontsize=6)
    axes.set_xlim(0, 100)
    axes.set_title("F1 by label (examples)" if len(rows) < MOST_BARS else "F1 of the worst labels", fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}…"
