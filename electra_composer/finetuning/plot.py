"""Plot finetuning runs: for each task every run, their mean, and published scores."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from electra_composer.finetuning.report import model_name

MAX_COLUMNS = 5
SMALLEST_SPAN = 2.0  # of a panel's y-axis, in points, so that rounding does not look like a difference
PANEL = (2.3, 2.7)  # inches
RUN, COLLAPSED, MEAN = "#4c72b0", "#c0392b", "#222222"
# Different dashes keep lines apart where they coincide and in greyscale.
PUBLISHED_STYLES = (("#dd8452", "--"), ("#55a868", ":"), ("#8172b3", "-."), ("#937860", (0, (5, 1, 1, 1, 1, 1))))


def plot(results: Mapping[str, Any]) -> bytes:
    """Draw a :func:`electra_composer.finetuning.results.summary` with at least one task as PNG.

    Each task has its own panel and y-axis, because the spread within a task is a tenth of the distance between tasks.
    Published test scores are left out, because the points are dev scores.
    """
    # Imported here because it takes a second. Not pyplot, which has global state; a bare Figure renders with Agg on a
    # machine without a display.
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    rows = -(-len(tasks) // MAX_COLUMNS)
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
    runs = sum(task["n"] for task in tasks.values())
    figure.suptitle(f"{model_name(results)}: {runs} finetuning runs", fontsize=10)
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
        Legend entries: label → artist.
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
    """Draw the runs that have a score and return legend entries."""
    handles = {}
    for collapsed in (False, True):
        # Spread horizontally in the order of seeds, so that equal scores stay visible and the plot is reproducible.
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
                color=COLLAPSED if collapsed else RUN,
                markersize=7 if collapsed else 6,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
            handles["run that collapsed (†)" if collapsed else "run"] = drawn
    return handles


def _limit(axes: Any, values: list[float]) -> None:
    """Set the y-axis around the values, with at least :data:`SMALLEST_SPAN`."""
    if not values:
        return
    low, high = min(values), max(values)
    middle, half = (low + high) / 2, max(high - low, SMALLEST_SPAN) / 2
    axes.set_ylim(middle - 1.12 * half, middle + 1.12 * half)
