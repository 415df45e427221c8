"""The table and the picture of objectives.py."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from objectives_plan import CONFIGURATIONS, ELECTRA, FLOOR
from report import table

Line = dict[str, Any]
LATE = 0.15  # a run whose time differs from the budget by a larger fraction is marked


def in_order(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Group results by configuration, in the order of the table."""
    found = {name: [line for line in lines if line["configuration"] == name] for name in CONFIGURATIONS}
    return {name: mine for name, mine in found.items() if mine}


def scores(lines: Sequence[Line], task: str | None) -> list[list[float]]:
    """Return the scores of each pretraining run: one per finetuning seed.

    Args:
        lines: results of one configuration.
        task: None: the mean over the tasks.
    """
    names = list(lines[0]["tasks"]) if task is None else [task]
    return [
        [statistics.fmean(each) for each in zip(*(line["tasks"][name]["scores"] for name in names), strict=True)]
        for line in lines
    ]


def deviation(runs: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation over finetuning seeds, pooled over pretraining runs; None for one seed."""
    if len(runs[0]) < 2:
        return None
    return math.sqrt(statistics.fmean(statistics.variance(run) for run in runs))


def cell(runs: Sequence[Sequence[float]]) -> str:
    """Format scores as mean ± deviation over finetuning seeds ± deviation over pretraining seeds."""
    means = [statistics.fmean(run) for run in runs]
    spread = deviation(runs)
    text = f"{statistics.fmean(means):.1f}"
    text += "" if spread is None else f" ± {spread:.1f}"
    return text if len(means) < 2 else f"{text} ± {statistics.stdev(means):.1f}"


def mean(lines: Sequence[Line], key: str) -> float | None:
    """Return the mean of a value over pretraining seeds, None if it was not measured (the floor)."""
    values = [line[key] for line in lines]
    return None if None in values else statistics.fmean(values)


def ratios(mine: Sequence[Line], electra: Sequence[Line]) -> tuple[float, float] | None:
    """Return time per step and FLOPs per step relative to `electra`; None for the floor."""
    rate, flops = mean(mine, "steps_per_second"), mean(mine, "flops_per_step")
    rate_of_electra, flops_of_electra = mean(electra, "steps_per_second"), mean(electra, "flops_per_step")
    if not (rate and flops and rate_of_electra and flops_of_electra):
        return None
    return rate_of_electra / rate, flops / flops_of_electra


def report(lines: Sequence[Line]) -> str:
    """Render the table in Markdown, and what its columns are.

    Args:
        lines: results of :func:`objectives.measure`, of one set of settings.
    """
    groups = in_order(lines)
    tasks = list(lines[0]["tasks"])
    header = ["configuration", "steps", "s", "steps/s", "tokens/s", "GFLOPs a step", "time of a step ÷ electra's"]
    header += [
        "FLOPs ÷ electra's",
        "TFLOPs in all",
        *(f"{name} ({lines[0]['tasks'][name]['metric']})" for name in tasks),
    ]
    header += ["mean"]
    rows = []
    for name, mine in groups.items():
        compared = ratios(mine, groups[ELECTRA]) if ELECTRA in groups else None
        seconds = mean(mine, "train_seconds")
        late = seconds is not None and abs(seconds / mine[0]["budget_seconds"] - 1) > LATE
        row = [
            name,
            _number(mean(mine, "steps"), ",.0f"),
            None if seconds is None else f"{seconds:.0f}{'†' if late else ''}",
            _number(mean(mine, "steps_per_second"), ".1f"),
            _number(mean(mine, "tokens_per_second"), ",.0f"),
            _number(mean(mine, "flops_per_step"), ".2f", 1e-9),
            _number(compared and compared[0], ".2f"),
            _number(compared and compared[1], ".2f"),
            _number(mean(mine, "flops"), ".1f", 1e-12),
        ]
        rows.append([*row, *(cell(scores(mine, task)) for task in tasks), cell(scores(mine, None))])
    return f"{table(header, rows)}\n\n{notes(lines)}"


def notes(lines: Sequence[Line]) -> str:
    """Explain the noise in the table, and how large a difference has to be to say anything."""
    groups = in_order(lines)
    seeds, runs = len(scores(lines[:1], None)[0]), max(map(len, groups.values()))
    over = f"mean ± standard deviation over {seeds} finetuning seeds"
    over += "" if runs < 2 else f" ± standard deviation over {runs} pretraining seeds"
    parts = [f"Scores on dev × 100: {over}. † the time differs from the budget by more than {LATE:.0%}."]
    spreads = [found for found in (deviation(scores(mine, None)) for mine in groups.values()) if found is not None]
    if spreads:
        pooled = math.sqrt(statistics.fmean(each**2 for each in spreads))
        limit = 2 * pooled * math.sqrt(2 / seeds)
        parts.append(
            f"Finetuning seeds alone make two means differ by up to {limit:.1f} points (two standard errors of the "
            "difference); pretraining seeds and the choice of dev examples add to it."
        )
    if FLOOR in groups:
        parts.append(f"`{FLOOR}`: random weights of the same sizes, finetuned in the same way.")
    if any(len(CONFIGURATIONS[name].stages) > 1 for name in groups):
        parts.append("Of two stages, speed and FLOPs of a step are those of the last.")
    return " ".join(parts)


def _number(value: float | None, form: str, scale: float = 1.0) -> str | None:
    return None if value is None else f"{value * scale:{form}}"


def draw(lines: Sequence[Line]) -> bytes:
    """Draw a PNG: scores with their deviation over FLOPs (as the paper's figure 2), and time over FLOPs of a step."""
    # Imported here because it takes a second. A bare Figure has no global state and needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = in_order(lines)
    for name, mine in groups.items():
        runs = scores(mine, None)
        center, spread = statistics.fmean(map(statistics.fmean, runs)), deviation(runs) or 0.0
        flops = mean(mine, "flops")
        if flops is None:
            left.axhspan(center - spread, center + spread, color="#999999", alpha=0.25, linewidth=0)
            left.axhline(center, color="#777777", linewidth=1, linestyle="--", label=f"{name}: no pretraining")
            continue
        left.errorbar(flops * 1e-12, center, yerr=spread, marker="o", capsize=3)
        _label(left, name, (flops * 1e-12, center))
        compared = ratios(mine, groups[ELECTRA]) if ELECTRA in groups else None
        if compared is not None:
            right.plot(compared[1], compared[0], marker="o")
            _label(right, name, (compared[1], compared[0]))
    budget = lines[0]["budget_seconds"]
    left.set(xlabel=f"TFLOPs of pretraining in {budget:g} s", ylabel="mean dev score × 100")
    if FLOOR in groups:
        left.legend(loc="lower right", frameon=False, fontsize=8)
    right.axline((1.0, 1.0), slope=1.0, color="#777777", linewidth=1, linestyle="--")
    right.set(xlabel="FLOPs of a step ÷ electra's", ylabel="time of a step ÷ electra's")
    right.set_title("above the line: slower than the arithmetic explains", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _label(axes: Any, name: str, point: tuple[float, float]) -> None:
    axes.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
