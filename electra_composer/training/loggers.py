"""Loggers: a metrics file, the console. The progress bar is in progress_bar.py, Weights & Biases … in tracking.py."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import logging
import math
import os
from collections.abc import Iterable
from typing import Any, TextIO

import numpy as np
import torch
from composer.core import State
from composer.loggers import ConsoleLogger, Logger, LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from electra_composer.atomic_files import write_file
from electra_composer.errors import UserError
from electra_composer.ranges import TimeRange
from electra_composer.training.times import parse_time

log = logging.getLogger(__name__)


class IntervalLogger(LoggerDestination):
    """Base class of loggers that keep what is logged, and write it when a step ends whose number is due.

    Args:
        interval: batches between two writings, such as `10ba`.

    Raises:
        UserError: not a number of batches above 0.
    """

    def __init__(self, interval: str) -> None:
        self.interval = int(parse_time(interval, "interval", TimeRange(units=("ba",))).value)
        self.step = 0

    @functools.cached_property
    def writes(self) -> bool:
        """Whether this is rank 0. Composer's answer takes microseconds, and a batch logs ten times."""
        return dist.get_global_rank() == 0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if not self.writes:
            return
        step = self.step if step is None else step
        if step > self.step:
            if self.step % self.interval == 0:
                self.write_kept()
            self.step = step
        self.keep(metrics)

    def keep(self, metrics: dict[str, Any]) -> None:
        """Keep metrics of the current step, over older values of the same names."""
        raise NotImplementedError

    def write_kept(self) -> None:
        """Write and forget what was kept."""
        raise NotImplementedError


class MetricsFile(IntervalLogger):
    """Writes every logged metric by step to a file of JSON lines or CSV, on rank 0.

    A row has `step` (batches trained before it, as Composer counts) and the latest value of each metric logged since
    the previous row. Rows are appended and flushed one by one, so a crash loses only the pending row. Checkpoints have
    the pending row and the number of rows before it; a resumed run drops the rows from its step on, warns if rows are
    missing, and appends to the file.

    NaN and infinity are `null` in JSON, which cannot represent them, and `nan` and `inf` in CSV. When new metrics add
    columns to a CSV (as the first evaluation does), the file is rewritten atomically with a longer header, and old rows
    are empty there.

    Args:
        path: the file; folders are created.
        format: `jsonl` or `csv`; None: by the extension of the file.
        interval: batches between rows, such as `10ba`. The last step always has a row.

    Raises:
        UserError: another format or interval.
    """

    def __init__(self, path: str, format: str | None = None, interval: str = "1ba") -> None:
        self.path = path
        self.format = format or os.path.splitext(path)[1][1:]
        if self.format not in ("jsonl", "csv"):
            raise UserError(f"{self.format!r} is not a format of the metrics file; expected jsonl or csv")
        super().__init__(interval)
        self.columns: list[str] = []  # CSV only
        self.row: dict[str, Any] = {}  # pending
        self.written = 0  # rows before it
        self.resumed = False
        self.file: TextIO | None = None

    def keep(self, metrics: dict[str, Any]) -> None:
        self.row.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 and self.file is None:
            # The checkpoint has the pending row of its step, which the interrupted run may have written.
            self._open(self.step if self.resumed else state.timestamp.batch.value)

    def close(self, state: State, logger: Logger) -> None:
        if self.file is None and self.row and not self.resumed:
            self._open(self.step + 1)  # an evaluation without training
        if self.file is not None:
            self.write_kept()
            self.file.close()
            self.file = None

    def state_dict(self) -> dict[str, Any]:
        # Workaround (torch 2.7): a sharded checkpoint is loaded by the names of its nested values, which differ from
        # row to row, so the row is one JSON string; goes when torch.distributed.checkpoint loads changed keys.
        row = json.dumps(plain_numbers(self.row))
        return {"step": self.step, "row": row, "file": os.path.basename(self.path), "written": self.written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_global_rank() != 0:
            return
        row = state["row"]
        self.step, self.row = state["step"], json.loads(row) if isinstance(row, str) else dict(row)
        if state.get("file") == os.path.basename(self.path):  # older checkpoints have no number
            self.written = state["written"]
        self.resumed = True

    def _open(self, first_step: int) -> None:
        """Keep the rows before `first_step` of an earlier part of this run, and open the file to append."""
        rows = [row for row in self._read() if row["step"] < first_step]
        if len(rows) < self.written:
            log.warning(
                f"{self.path} has {len(rows)} of the {self.written} rows that were written before batch {first_step}, "
                "where the run resumes; the others are lost"
            )
        self.written = len(rows)
        self.columns = list(dict.fromkeys(["step", *(column for row in rows for column in row)]))
        self._rewrite(rows)

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete rows of the file, without one that a crash has cut off or damaged."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", errors="replace", newline="") as file:
            text = file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        if self.format == "csv":
            return [
                {**row, "step": int(row["step"])} for row in csv.DictReader(lines) if (row.get("step") or "").isdigit()
            ]
        return [row for line in lines if (row := _parse_row(line)) is not None]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        if self.file is not None:
            self.file.close()
        text = io.StringIO(newline="")
        if self.format == "csv":
            csv.writer(text, lineterminator="\n").writerow(self.columns)
        self._write(text, rows)
        write_file(self.path, text.getvalue())
        self.file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (closed in `close`)

    def write_kept(self) -> None:
        row = {"step": self.step, **plain_numbers(self.row)}
        self.row = {}
        if self.file is None or len(row) == 1:
            return
        if self.format == "csv" and (new := [column for column in row if column not in self.columns]):
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        self._write(self.file, [row])
        self.file.flush()
        self.written += 1

    def _write(self, file: TextIO, rows: Iterable[dict[str, Any]]) -> None:
        if self.format == "csv":
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(rows)
            return
        for row in rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(finite) + "\n")


def _parse_row(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


class RunConsole(ConsoleLogger):
    """ConsoleLogger that prints above a progress bar, and not the configuration, which `callbacks.RunRecord` prints."""

    # Workaround (composer 0.32): ConsoleLogger has no public hook for where and what it prints, so two private methods
    # are overridden; goes when it has, or prints by `tqdm.write`.

    def _log_to_console(self, log_str: str) -> None:
        tqdm.write(log_str, file=self.stream)

    def _log_hparams_to_console(self) -> None:
        pass


def plain_numbers(metrics: dict[str, Any]) -> dict[str, int | float]:
    """Convert numbers and one-element tensors to plain numbers; drop everything else."""
    numbers: dict[str, int | float] = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor | np.ndarray | np.number):
            if math.prod(value.shape) == 1:
                numbers[name] = value.item()
        elif isinstance(value, int | float):
            numbers[name] = value
    return numbers
