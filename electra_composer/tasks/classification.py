"""Classification of texts and of pairs of texts, with one or several labels per example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from electra_composer.errors import UserError
from electra_composer.tasks.base import Output, Split
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.rows import Row
from electra_composer.tasks.text_pairs import Texts, TextTask


class Classification(TextTask):
    """One of the labels found in the training examples.

    Attributes:
        labels: names, in the order of the class numbers.
    """

    kind = "classification"
    labels: list[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1")

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def learn(self, train: Split) -> None:
        counts = Counter(name for row in train if (name := _name(row, train)) is not None)
        if len(counts) < 2:
            raise UserError(
                f"data.train: {len(counts)} labels in column {train.columns['label']!r}; expected at least two"
            )
        self.labels = sorted(counts)

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def load_state(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]

    def label_of(self, row: Row, split: Split) -> int | None:
        name = _name(row, split)
        if name is None:
            return None
        if name not in self.labels:
            raise UserError(f"{row.where}: label {name!r} is not in data.train; expected one of {self.labels}")
        return self.labels.index(name)

    def loss(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"])

    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        logits, labels = torch.from_numpy(np.stack(outputs)), torch.from_numpy(rows.per_row["labels"])
        count = len(self.labels)
        return {
            "accuracy": float(multiclass_accuracy(logits, labels, count, average="micro")),
            "macro_f1": float(multiclass_f1_score(logits, labels, count, average="macro")),
        }

    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        assert isinstance(rows.source, Texts)
        for logits in outputs:
            probabilities = torch.from_numpy(logits).softmax(0).tolist()
            best = int(np.argmax(logits))
            yield {"label": self.labels[best], "probabilities": dict(zip(self.labels, probabilities, strict=True))}


def _name(row: Row, split: Split) -> str | None:
    column = split.columns.get("label")
    value = None if column is None else row.values[column]  # type: ignore[index]
    return None if value is None or value == "" else str(value)
