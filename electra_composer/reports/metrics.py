"""Read the metrics file of a run in columns, and reduce a column to what a screen shows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from numpy.typing import NDArray

FILES = ("metrics.jsonl", "metrics.csv")
HOURS = {"seconds": 1 / 3600, "minutes": 1 / 60, "hours": 1.0, "days": 24.0}  # of `speed_monitor.time_unit`
AXES = {"step": "step", "tokens": "tokens", "hours": "hours of training"}

Numbers = NDArray[np.float64]


@dataclass
class Metrics:
    """The rows of a metrics file. In `columns`, NaN stands for a value that a row lacks or that was not finite."""

    path: str | None = None
    columns: dict[str, Numbers] = field(default_factory=dict)  # metric → [rows]
    axes: dict[str, Numbers] = field(default_factory=dict)  # names of AXES → [rows], as far as known
    damaged: int = 0  # lines that are not rows, such as one that a crash has cut off
    not_finite: int = 0  # values

    def series(self, name: str) -> tuple[NDArray[np.int64], Numbers]:
        """Return the rows that have a value of a metric, and the values; empty if no row has."""
        column = self.columns.get(name)
        if column is None:
            return np.zeros(0, np.int64), np.zeros(0)
        rows = np.flatnonzero(np.isfinite(column))
        return rows, column[rows]


def find_metrics(folder: str, path: str | None = None) -> str | None:
    """Return the metrics file of a run: `path`, as its configuration may say, or one of :data:`FILES`."""
    candidates = [path] if path else []
    candidates += [os.path.join(folder, name) for name in FILES]
    return next((each for each in candidates if os.path.isfile(each)), None)


def read_metrics(path: str, time_unit: str = "hours") -> Metrics:
    """Read a file of `loggers.metrics_file`. Lines that are not rows are counted and left out.

    Args:
        path: of JSON lines, or of CSV if it ends so.
        time_unit: of `time/total`.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    end = data.rfind(b"\n") + 1
    lines, damaged = data[:end], int(end < len(data))
    is_csv = path.endswith(".csv")
    try:
        table = _read_csv(lines) if is_csv else _read_json(lines)
    except pa.ArrowInvalid:
        good = [line for line in lines.splitlines() if _is_row(line)] if not is_csv else []
        damaged += lines.count(b"\n") - len(good)
        table = _read_json(b"\n".join(good))
    columns = dict(_numbers(table))
    steps = columns.get("step")
    metrics = Metrics(path, columns, damaged=damaged, not_finite=lines.count(b": null"))
    if steps is not None and len(steps):
        metrics.axes = _axes(steps, columns, HOURS[time_unit])
    return metrics


def _read_json(lines: bytes) -> pa.Table:
    return pa.json.read_json(io.BytesIO(lines)) if lines.strip() else pa.table({})


def _read_csv(lines: bytes) -> pa.Table:
    parse = pa.csv.ParseOptions(invalid_row_handler=lambda row: "skip")
    return pa.csv.read_csv(io.BytesIO(lines), parse_options=parse) if lines.strip() else pa.table({})


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return all(value is None or isinstance(value, int | float) for value in row.values())


def _numbers(table: pa.Table) -> Iterator[tuple[str, Numbers]]:
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            yield name, column.cast(pa.float64(), safe=False).to_numpy()


def _axes(steps: Numbers, columns: dict[str, Numbers], hours: float) -> dict[str, Numbers]:
    """Return the x-axes. Tokens and hours are interpolated for rows that do not have them."""
    axes = {"step": steps}
    for axis, name, scale in (("tokens", "time/token", 1.0), ("hours", "time/total", hours)):
        known = np.flatnonzero(np.isfinite(columns.get(name, np.zeros(0))))
        if len(known):
            # From 0 at the start; beyond the last known value at the rate until there.
            x, y = np.r_[-1.0, steps[known]], np.r_[0.0, columns[name][known] * scale]
            rate = y[-1] / (x[-1] + 1)
            axes[axis] = np.interp(steps, x, y) + np.maximum(steps - x[-1], 0) * rate
    return axes


def extremes(values: Numbers, buckets: int) -> NDArray[np.int64]:
    """Return the places of the least and the greatest value of each of `buckets` equal parts, and both ends, sorted."""
    count = len(values)
    if count <= 2 * buckets:
        return np.arange(count)
    width = -(-count // buckets)
    padded = np.pad(values, (0, width * -(-count // width) - count), mode="edge").reshape(-1, width)
    starts = np.arange(len(padded)) * width
    found = np.concatenate([[0, count - 1], starts + padded.argmin(1), starts + padded.argmax(1)])
    return np.unique(np.minimum(found, count - 1))


def moving_average(values: Numbers, width: int) -> Numbers:
    """Return the mean over `width` values around each, which is odd; over fewer at both ends, as many on both sides."""
    half = np.minimum(width // 2, np.minimum(np.arange(len(values)), np.arange(len(values))[::-1]))
    sums = np.r_[0.0, np.cumsum(values)]
    places = np.arange(len(values))
    return (sums[places + half + 1] - sums[places - half]) / (2 * half + 1)
