"""Draw panels with matplotlib, as PNG files for papers and pages."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from electra_composer.reports.charts import DASHES, PALETTE, color_of
from electra_composer.reports.panels import Line, Panel
from electra_composer.reports.runs import Run
from electra_composer.reports.summary import Score, short

COLUMNS = 3
PANEL = (4.0, 2.6)  # inches


def _figure(**options: Any) -> Any:
    # Not pyplot, which has global state; a bare Figure renders with Agg on a machine without a display.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def plot_curves(panels: list[tuple[Panel, list[Line]]], runs: list[Run]) -> bytes:
    """Draw the panels over steps; dotted vertical lines are restarts."""
    several = len(runs) > 1
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (panel, lines) in zip(grid.flat, panels, strict=False):
        for line in lines:
            color, main = color_of(line, several), line.smooth or line.raw
            if line.smooth is not None:
                axes.plot(line.raw["step"], line.raw["y"], color=color, alpha=0.25, linewidth=0.7)
            axes.plot(
                main["step"],
                main["y"],
                color=color,
                linewidth=1.4,
                label=line.label,
                linestyle=DASH_STYLES[DASHES[line.curve % len(DASHES)]] if several else "-",
                marker="o" if line.is_evaluation else None,
                markersize=2.5,
            )
        for session in (session for run in runs for session in run.restarts):
            axes.axvline(session.start["batch"], color="#888888", linestyle=":", linewidth=0.9)
        axes.set_title(panel.title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.grid(alpha=0.25)
        if len({line.label for line in lines}) > 1 and not several:
            axes.legend(fontsize=7, frameon=False)
    if several:
        handles = [figure.axes[0].plot([], [], color=PALETTE[i % len(PALETTE)])[0] for i in range(len(runs))]
        names = [run.name for run in runs]
        figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return _png(figure)


DASH_STYLES: dict[str, Any] = {"solid": "-", "dashed": "--", "dotted": ":", "dotdash": "-."}


def plot_results(scores: list[Score]) -> bytes:
    """Draw the scores of finetuning, a panel for each task: a point for each seed, a dash for their mean."""
    tasks = list(dict.fromkeys((score.task, score.metric) for score in scores))
    models = list(dict.fromkeys(score.model for score in scores))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(figsize=(max(2.6 * columns, 6.0), 2.6 * rows + 0.3 * len(models)))
    grid = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, (task, metric) in zip(grid.flat, tasks, strict=False):
        for score in scores:
            if (score.task, score.metric) == (task, metric):
                number = models.index(score.model)
                values = [value for _, value in score.runs]
                places = number + (np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1))
                color = PALETTE[number % len(PALETTE)]
                (handles[score.model],) = axes.plot(places, values, "o", color=color, alpha=0.75, markersize=5)
                axes.plot([number - 0.3, number + 0.3], [np.mean(values)] * 2, color=color, linewidth=2)
        axes.set_title(f"{task}\n{metric}", fontsize=9)
        axes.set_xlim(-0.6, len(models) - 0.4)
        axes.set_xticks([])
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.25)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=8, frameon=False)
    return _png(figure)
