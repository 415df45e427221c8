"""Where the metrics go: a file of rows, the console, Weights & Biases; the bar is in progress_bar.py."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from typing import Any, TextIO

import numpy as np
import torch
from composer.core import State, TimeUnit
from composer.loggers import ConsoleLogger, Logger, LoggerDestination, WandBLogger
from composer.utils import dist
from tqdm import tqdm

from electra_composer.errors import UserError
from electra_composer.training.optim import parse_time


class MetricsFile(LoggerDestination):
    """Every logged metric by step, as JSON lines or CSV, written on rank 0.

    A row is `step` (batches trained before it, Composer's count) and the newest value of each metric logged since the
    row before. Rows are appended and flushed one by one, so a crash costs the row in the making. A checkpoint carries
    the row in the making; a resumed run drops the rows from its step on and continues the file.

    NaN and infinity are written as `null` in JSON, which has no signs for them, and as `nan` and `inf` in CSV. A CSV
    whose columns grow (evaluation adds some) is written anew with the longer header, old rows left empty there: it
    happens a few times in a run and replaces the file in one move.

    Args:
        path: the file; folders are made.
        format: `jsonl` or `csv`; `None`: what the file's ending says.
        interval: a row every so many batches, such as `10ba`. The last step has a row in any case.

    Raises:
        UserError: another format or interval.
    """

    def __init__(self, path: str, format: str | None = None, interval: str = "1ba"):
        self.path = path
        self.format = format or os.path.splitext(path)[1][1:]
        if self.format not in ("jsonl", "csv"):
            raise UserError(f"{self.format!r} is not a format of the metrics file; expected jsonl or csv")
        self.interval = _batches(interval, "interval")
        self.columns: list[str] = []  # CSV only
        self.row: dict[str, Any] = {}  # in the making
        self.step = 0
        self.resumed = False
        self.file: TextIO | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() != 0:
            return
        step = self.step if step is None else step
        if step > self.step:
            if self.step % self.interval == 0:
                self._write_row()
            self.step = step
        self.row.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0 and self.file is None:
            # The row in the making goes on: a run that was interrupted has written what there was of it.
            self._open(self.step if self.resumed else state.timestamp.batch.value)

    def close(self, state: State, logger: Logger) -> None:
        if self.file is None and self.row and not self.resumed:
            self._open(self.step + 1)  # an evaluation without training
        if self.file is not None:
            self._write_row()
            self.file.close()
            self.file = None

    def state_dict(self) -> dict[str, Any]:
        # As text: torch finds the values of a sharded checkpoint by their names, which differ from row to row.
        return {"step": self.step, "row": json.dumps(plain_numbers(self.row))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_global_rank() != 0:
            return
        row = state["row"]
        self.step, self.row = state["step"], json.loads(row) if isinstance(row, str) else dict(row)
        self.resumed = True

    def _open(self, first_step: int) -> None:
        """Keep what an earlier part of this run wrote before `first_step`, and append from there."""
        rows = [row for row in self._read() if row["step"] < first_step]
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self.columns = list(dict.fromkeys(["step", *(column for row in rows for column in row)]))
        self._rewrite(rows)

    def _read(self) -> list[dict[str, Any]]:
        """The whole rows of the file; the last one may have been cut off by a crash and is left out then."""
        if not os.path.exists(self.path):
            return []
        with open(self.path, encoding="utf-8", newline="") as file:
            text = file.read()
        lines = text[: text.rfind("\n") + 1].splitlines()
        if self.format == "csv":
            return [
                {**row, "step": int(row["step"])} for row in csv.DictReader(lines) if (row.get("step") or "").isdigit()
            ]
        return [json.loads(line) for line in lines]

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        if self.file is not None:
            self.file.close()
        with open(f"{self.path}.tmp", "w", encoding="utf-8", newline="") as file:
            if self.format == "csv":
                file.write(_csv_line(self.columns))
            file.writelines(self._line(row) for row in rows)
        os.replace(f"{self.path}.tmp", self.path)
        self.file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 (closed in `close`)

    def _write_row(self) -> None:
        row = {"step": self.step, **plain_numbers(self.row)}
        self.row = {}
        if self.file is None or len(row) == 1:
            return
        if self.format == "csv" and (new := [column for column in row if column not in self.columns]):
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        self.file.write(self._line(row))
        self.file.flush()

    def _line(self, row: dict[str, Any]) -> str:
        if self.format == "csv":
            return _csv_line([row.get(column, "") for column in self.columns])
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        return json.dumps(finite) + "\n"


class RunConsole(ConsoleLogger):
    """Composer's console logger, beside a progress bar: the bar moves down for its lines.

    The configuration is not printed: `callbacks.RunRecord` does that.
    """

    def _log_to_console(self, log_str: str) -> None:
        tqdm.write(log_str, file=self.stream)

    def _log_hparams_to_console(self) -> None:
        pass


class RunWandB(WandBLogger):
    """Composer's Weights & Biases logger, with a package that has dropped `Run.get_url` (0.31 has) too.

    Composer 0.32.1 calls it and would stop there; the property `url` is the same and stays.
    """

    def init(self, state: State, logger: Logger) -> None:
        import wandb

        if not hasattr(wandb.Run, "get_url"):
            wandb.Run.get_url = lambda run: run.url
        super().init(state, logger)


def _batches(interval: str, key: str) -> int:
    """The number of batches of an interval such as `10ba`."""
    parsed = parse_time(interval, key)
    if parsed.unit != TimeUnit.BATCH or parsed.value < 1:
        raise UserError(f"{key}: {interval!r}: expected a number of batches of at least one, such as 10ba")
    return int(parsed.value)


def plain_numbers(metrics: dict[str, Any]) -> dict[str, int | float]:
    """Numbers and one-element tensors as plain numbers; anything else does not fit in a row."""
    numbers: dict[str, int | float] = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor | np.ndarray | np.number):
            if math.prod(value.shape) == 1:
                numbers[name] = value.item()
        elif isinstance(value, int | float):
            numbers[name] = value
    return numbers


def _csv_line(values: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()
