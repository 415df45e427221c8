"""Choose what is drawn: panels of curves from the names of the metrics that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from electra_composer.reports.metrics import Metrics, Numbers, extremes, moving_average
from electra_composer.reports.runs import Run

TRAIN, EVAL = "training", "validation"
FEWEST = 30  # values of a curve that is smoothed
SMOOTHED = 0.02  # fraction of a curve that is averaged for a point
POINTS = 1200  # of a panel's curves over all runs, at most, where each bucket has two
LEAST = 100  # buckets of a curve, at least


class Curve(NamedTuple):
    """A metric in a panel."""

    metric: str
    label: str
    scale: float = 1.0


class Panel(NamedTuple):
    """A chart."""

    title: str
    group: str  # heading that it is under
    curves: tuple[Curve, ...]
    is_smoothed: bool = True


@dataclass
class Line:
    """A curve of one run, reduced to what is drawn. `raw` and `smooth` map `y` and axes to equally long columns."""

    run: int
    curve: int  # decides its style: the number in its panel, of validation at least 1
    label: str
    is_evaluation: bool
    raw: dict[str, NDArray[np.generic]]
    smooth: dict[str, NDArray[np.generic]] | None


def _both(name: str) -> tuple[Curve, ...]:
    return (Curve(f"metrics/train/{name}", TRAIN), Curve(f"metrics/eval/{name}", EVAL))


KNOWN = (
    Panel("Generator: masked-LM loss", "Losses", _both("mlm_loss")),
    Panel("Discriminator: RTD loss", "Losses", _both("rtd_loss")),
    Panel("Total loss", "Losses", (Curve("loss/train/total", TRAIN), Curve("metrics/eval/total_loss", EVAL))),
    Panel("Discriminator: AUC", "Predictions", _both("rtd_auc")),
    Panel("Discriminator: precision", "Predictions", _both("rtd_precision")),
    Panel("Discriminator: recall", "Predictions", _both("rtd_recall")),
    Panel("Discriminator: accuracy", "Predictions", _both("rtd_accuracy")),
    Panel("Generator: accuracy on masked tokens", "Predictions", _both("mlm_accuracy")),
    Panel("Tokens replaced by the generator", "Predictions", _both("replaced_share")),
    Panel("Sampled tokens that are the original", "Predictions", _both("sampled_accuracy")),
    Panel("Gradient norm before clipping", "Optimization", (Curve("gradient/norm", TRAIN),)),
    Panel("Tokens per second", "Speed and memory", (Curve("throughput/tokens_per_sec", "all devices"),)),
    Panel("Model FLOPs utilization, %", "Speed and memory", (Curve("throughput/device/mfu", "MFU", 100),)),
    Panel("Waiting for data, % of the time", "Speed and memory", (Curve("data/wait_share", "share", 100),)),
    Panel("Positions that are not padding, %", "Speed and memory", (Curve("data/fill", "fill", 100),)),
    Panel(
        "Peak memory, GB",
        "Speed and memory",
        (Curve("memory/peak_allocated_mem", "device"), Curve("memory/peak_resident_mem", "host")),
        is_smoothed=False,
    ),
)
SAME = ("loss/train/mlm", "loss/train/rtd")  # as in the panels of losses, of one batch
GROUPS = ("Losses", "Predictions", "Optimization", "Speed and memory")


def choose_panels(runs: list[Run]) -> list[Panel]:
    """Return the panels that have a value in some run: the known ones, then one for each other metric of the model."""
    names = dict.fromkeys(name for run in runs for name in run.metrics.columns if len(run.metrics.series(name)[0]))
    found = []
    for panel in KNOWN:
        if curves := tuple(curve for curve in panel.curves if curve.metric in names):
            found.append(panel._replace(curves=curves))
    shown = {curve.metric for panel in KNOWN for curve in panel.curves}.union(SAME)
    others = list(_others([name for name in names if name not in shown]))
    if rates := _learning_rates(names, runs):
        others.append(Panel("Learning rate", "Optimization", rates, is_smoothed=False))
    found += others
    return sorted(found, key=lambda panel: GROUPS.index(panel.group))


def _others(names: list[str]) -> Iterator[Panel]:
    """Yield a panel for each metric of the model that this module does not know, and for each kind of trouble."""
    of_model = [name for name in names if name.startswith(("metrics/train/", "metrics/eval/"))]
    endings = dict.fromkeys(name.split("/", 2)[2] for name in of_model)
    for ending in endings:
        curves = tuple(curve for curve in _both(ending) if curve.metric in names)
        title = ending.replace("_", " ")
        yield Panel(title[0].upper() + title[1:], "Losses" if "loss" in ending else "Predictions", curves)
    for name in names:
        if name.startswith(("loss/", "metrics/")) and name.split("/", 2)[-1] not in endings:
            yield Panel(name, "Losses" if name.startswith("loss/") else "Predictions", (Curve(name, TRAIN),))
        elif name.startswith(("trouble/", "l2_norm/grad/global")):
            title = name.split("/")[1].replace("_", " ").capitalize()
            yield Panel(title, "Optimization", (Curve(name, TRAIN),), is_smoothed=False)


def _learning_rates(names: Iterable[str], runs: list[Run]) -> tuple[Curve, ...]:
    """Return the learning rates that differ between groups of parameters."""
    rates: list[Curve] = []
    seen: list[list[Numbers]] = []
    for name in names:
        if name.startswith("lr-"):
            columns = [run.metrics.series(name)[1] for run in runs]
            if not any(all(map(np.array_equal, columns, other)) for other in seen):
                seen.append(columns)
                rates.append(Curve(name, name.removeprefix("lr-")))
    return tuple(rates)


def lines_of(panel: Panel, runs: list[Run]) -> list[Line]:
    """Reduce the curves of a panel to points that a screen can show, extremes included."""
    buckets = max(LEAST, POINTS // 2 // (len(runs) * len(panel.curves)))
    lines = []
    for number, run in enumerate(runs):
        for place, curve in enumerate(panel.curves):
            rows, values = run.metrics.series(curve.metric)
            if not len(rows):
                continue
            is_evaluation = "/eval/" in curve.metric
            raw = _columns(run.metrics, rows, values * curve.scale, extremes(values, buckets))
            smooth = None
            if len(values) >= FEWEST and not is_evaluation and panel.is_smoothed:
                width = 2 * max(2, round(len(values) * SMOOTHED / 2)) + 1
                average = moving_average(values * curve.scale, width)
                smooth = _columns(run.metrics, rows, average, extremes(average, buckets))
            style = max(place, int(is_evaluation))  # validation looks the same where there is no other curve
            lines.append(Line(number, style, curve.label, is_evaluation, raw, smooth))
    return lines


def _columns(
    metrics: Metrics, rows: NDArray[np.int64], values: Numbers, places: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    # float32 halves the file; steps and tokens are exact enough for an axis.
    columns = {axis: column[rows[places]].astype(np.float32) for axis, column in metrics.axes.items()}
    return {**columns, "y": values[places].astype(np.float32)}
