"""Regression: one or several numbers per text or pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from electra_composer.errors import UserError
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.base import Output, Split
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.rows import Row
from electra_composer.tasks.text_analysis import analyse_targets
from electra_composer.tasks.text_pairs import TextTask


class Regression(TextTask):
    """Targets are standardized by mean and standard deviation of the training examples; predictions are not.

    Attributes:
        names: of the targets: their columns, or `column[0]`, `column[1]`, … of a column of lists.
        mean, std: fp64 `[targets]`; 0 and 1 without `task.standardize`.
    """

    kind = "regression"
    unscaled = lower_is_better = frozenset({"mse"})

    def __init__(self, config: TaskConfig, model: TaskModelConfig):
        super().__init__(config, model)
        self.names: list[str] = []
        self.mean = np.zeros(0)
        self.std = np.ones(0)

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("pearson", "spearman", "mse")

    @property
    def num_outputs(self) -> int:
        return len(self.names)

    def learn(self, train: Split) -> None:
        column, count = train.columns["label"], 0
        mean, squares = np.zeros(0), np.zeros(0)
        for row in train:
            targets = self._targets(row, train)
            if targets is None:
                continue
            if not self.names:
                self.names = _names(column, len(targets), row)
                mean, squares = np.zeros(len(targets)), np.zeros(len(targets))
            self._check_length(targets, row)
            # Welford's sums: no cancellation for targets far from 0
            count += 1
            before = targets - mean
            mean += before / count
            squares += before * (targets - mean)
        if not count:
            raise UserError(f"data.train: no numbers in column {column}; set data.columns.label to another")
        if constant := [name for name, square in zip(self.names, squares, strict=True) if square == 0]:
            raise UserError(f"data.train: {constant[0]} is the same number in all rows; expected numbers that differ")
        if not self.config.standardize:
            mean, squares = np.zeros_like(mean), np.full_like(squares, count)
        self.mean, self.std = mean, np.sqrt(squares / count)

    def state(self) -> dict[str, Any]:
        return {"names": self.names, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.names = state["names"]
        self.mean, self.std = (np.array(state[name], dtype=np.float64) for name in ("mean", "std"))

    def output_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.std, self.mean

    def scaled_state(self) -> dict[str, Any]:
        count = self.num_outputs
        return {"names": self.names, "mean": [0.0] * count, "std": [1.0] * count}

    def label_of(self, row: Row, split: Split) -> Any:
        """Return the standardized targets, fp32 `[targets]`."""
        targets = self._targets(row, split)
        if targets is None:
            return None
        self._check_length(targets, row)
        return ((targets - self.mean) / self.std).astype(np.float32)

    def loss(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return F.mse_loss(outputs.float(), batch["labels"])

    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        """Compute the mean over targets of each score; `mse` is in the units of the data."""
        each = self._scores(*self._in_units(rows, outputs))
        return {name: float(np.mean([scores[name] for scores in each])) for name in self.metrics}

    def analysis(self, rows: EncodedRows, outputs: Sequence[Output]) -> Analysis:
        predicted, targets = self._in_units(rows, outputs)
        return analyse_targets(rows.source, self.names, predicted, targets, self.std, self._scores(predicted, targets))

    def collapsed(self, rows: EncodedRows, outputs: Sequence[Output]) -> bool:
        values = np.stack(outputs)
        return bool((values == values[0]).all())

    def _in_units(self, rows: EncodedRows, outputs: Sequence[Output]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return predictions and targets in the units of the data, fp64 `[rows, targets]`."""
        predicted, targets = np.stack(outputs).astype(np.float64), rows.per_row["labels"].astype(np.float64)
        return predicted * self.std + self.mean, targets * self.std + self.mean

    def _scores(self, predicted: NDArray[Any], targets: NDArray[Any]) -> list[dict[str, float]]:
        """Return the scores of each target."""
        pairs = zip(torch.from_numpy(predicted.T), torch.from_numpy(targets.T), strict=True)
        return [
            {
                "pearson": _correlation(pearson_corrcoef, *pair),
                "spearman": _correlation(spearman_corrcoef, *pair),
                "mse": float(F.mse_loss(*pair)),
            }
            for pair in pairs
        ]

    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """Yield a number as `label`, or several as `labels` by their names, in the units of the data."""
        for output in outputs:
            values = [float(f"{value:.7g}") for value in (output * self.std + self.mean).tolist()]
            if len(values) == 1:
                yield {"label": values[0]}
            else:
                yield {"labels": dict(zip(self.names, values, strict=True))}

    def _targets(self, row: Row, split: Split) -> NDArray[np.float64] | None:
        """Return the numbers of a row, fp64 `[targets]`; None if one is missing."""
        column = split.columns.get("label")
        if column is None:
            return None
        names = column if isinstance(column, list) else [column]
        values = [row.values[name] for name in names]
        if len(values) == 1 and isinstance(values[0], list):
            names, values = names * len(values[0]), values[0]
        if not values or any(value is None or value == "" for value in values):
            return None
        return np.array([_number(value, name, row) for name, value in zip(names, values, strict=True)])

    def _check_length(self, targets: NDArray[np.float64], row: Row) -> None:
        if len(targets) != len(self.names):
            raise UserError(f"{row.where}: {len(targets)} numbers; expected {len(self.names)}, as in the first row")


def _names(column: str | list[str] | None, count: int, row: Row) -> list[str]:
    """Return the names of the targets."""
    if isinstance(column, list):
        return [str(name) for name in column]
    assert column is not None
    return [f"{column}[{index}]" for index in range(count)] if isinstance(row.values[column], list) else [column]


def _number(value: Any, column: str, row: Row) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{row.where}: {column} is {str(value)[:40]!r}; expected a finite number, or nothing for no label: "
            "set data.columns.label to another column, or task.kind=classification for labels"
        )
    return number


# Workaround (torchmetrics 1.7): it gives 0 for Spearman's correlation of constant numbers, and a warning for Pearson's,
# where both are undefined and NaN in SciPy; goes when it gives NaN.
def _correlation(compute: Any, predicted: Tensor, targets: Tensor) -> float:
    """Return a correlation; NaN if all predictions or all targets are equal."""
    if bool((predicted == predicted[0]).all()) or bool((targets == targets[0]).all()):
        return math.nan
    return float(compute(predicted, targets))
