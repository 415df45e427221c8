"""The picture of finetuning runs: per task every run as a point, their mean, and published scores."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

COLUMNS = 5  # most panels side by side
SMALLEST_SPAN = 2.0  # of a panel's axis, in points: less would blow rounding up to a difference
PANEL = (2.3, 2.7)  # inches
RUN, BROKEN, MEAN = "#4c72b0", "#c0392b", "#222222"
# Two lines that coincide stay apart by their dashes, and so does a print in grey.
PUBLISHED_STYLES = (("#dd8452", "--"), ("#55a868", ":"), ("#8172b3", "-."), ("#937860", (0, (5, 1, 1, 1, 1, 1))))


def picture(results: Mapping[str, Any]) -> bytes:
    """A PNG of what :func:`electra_composer.finetune.results.summary` gives; it must have at least one task.

    Each task has a panel and an axis of its own: the spread within a task is a tenth of the distance between tasks.
    Published test scores are left out: the points are dev scores.
    """
    # Here, because it takes a second that a command which draws nothing need not wait for. No pyplot: its state is
    # global, and a bare Figure renders with Agg on a machine without a display.
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    rows = -(-len(tasks) // COLUMNS)
    columns = -(-len(tasks) // rows)  # six tasks as 3 + 3, not as 5 + 1
    width = max(PANEL[0] * columns, 6.0)
    figure = Figure(figsize=(width, PANEL[1] * rows + 1.2), layout="constrained")
    on_dev = [row for row in results["published"] if row["split"] == "dev"]
    published = [row for row in on_dev if row["scores"].keys() & tasks.keys()]
    labels = {row["model"]: f"{row['model']}, {row['statistic']}" for row in published}
    styles = dict(zip(labels.values(), PUBLISHED_STYLES, strict=False))
    handles: dict[str, Any] = {}
    grid = figure.subplots(rows, columns, squeeze=False)
    for position, axes in enumerate(grid.flat):
        if position >= len(tasks):
            axes.set_axis_off()
            continue
        name = list(tasks)[position]
        marks = {labels[row["model"]]: row["scores"][name] for row in published if name in row["scores"]}
        handles |= _panel(axes, tasks[name], marks, styles)
        if position % columns == 0:
            axes.set_ylabel("dev score × 100")
    figure.suptitle(_title(results), fontsize=10)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 if width < 9 else 3,
        fontsize=8,
        frameon=False,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _panel(axes: Any, row: Mapping[str, Any], marks: Mapping[str, float], styles: Mapping[str, Any]) -> dict[str, Any]:
    """Draw one task.

    Args:
        marks: label → published score.
        styles: label → colour and dashes.

    Returns:
        What the legend needs: label → a drawn thing.
    """
    handles: dict[str, Any] = {}
    for label, score in marks.items():
        color, dashes = styles[label]
        handles[label] = axes.axhline(score, color=color, linestyle=dashes, linewidth=1.4, zorder=1)
    if row["mean"] is not None:
        (handles["mean of these"],) = axes.plot([-0.32, 0.32], [row["mean"]] * 2, color=MEAN, linewidth=2.2, zorder=2)
    handles |= _points(axes, row["runs"])
    undefined = sum(run["score"] is None for run in row["runs"])
    notes = [f"{row['collapsed']} collapsed"] * bool(row["collapsed"])
    notes += [f"{undefined} undefined"] * bool(undefined)
    axes.set_title(f"{row['task']}\n", fontsize=10, fontweight="bold")
    axes.text(0.5, 1.02, row["metric"], transform=axes.transAxes, ha="center", fontsize=8, color="#555555")
    axes.set_xlabel(f"n = {row['n']}\n{', '.join(notes)}", fontsize=8)
    axes.set_xlim(-0.5, 0.5)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=8)
    axes.locator_params(axis="y", nbins=6)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    _limit(axes, [run["score"] for run in row["runs"] if run["score"] is not None] + list(marks.values()))
    return handles


def _points(axes: Any, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw the runs that have a score, and return what the legend needs."""
    handles = {}
    for collapsed in (False, True):
        # Spread in the order of the seeds, so that equal scores are seen apart and each drawing is the same.
        step = 0.44 / max(1, len(runs) - 1)
        points = [
            (step * (index - (len(runs) - 1) / 2), run["score"])
            for index, run in enumerate(runs)
            if run["collapsed"] == collapsed and run["score"] is not None
        ]
        if points:
            (drawn,) = axes.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker="X" if collapsed else "o",
                color=BROKEN if collapsed else RUN,
                markersize=7 if collapsed else 6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
            handles["run that collapsed (†)" if collapsed else "run"] = drawn
    return handles


def _limit(axes: Any, values: list[float]) -> None:
    """An axis around the values, never narrower than :data:`SMALLEST_SPAN`."""
    if not values:
        return
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max(high - low, SMALLEST_SPAN) / 2
    axes.set_ylim(middle - 1.12 * half, middle + 1.12 * half)


def _title(results: Mapping[str, Any]) -> str:
    weights = "random weights, sizes of " if results["settings"].get("model.random_init") else ""
    return f"{weights}{results['source']}: {sum(row['n'] for row in results['tasks'].values())} finetuning runs"
