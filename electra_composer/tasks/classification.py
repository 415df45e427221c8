"""Classification of texts and of pairs of texts, with one or several labels per example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from electra_composer.errors import UserError
from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.tasks.analysis import Analysis
from electra_composer.tasks.base import Output, Split
from electra_composer.tasks.calibration import fit_temperature
from electra_composer.tasks.classification_scores import multi_label_scores, single_label_scores
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.labels import check_counts, label_names, sort_labels, unknown_label
from electra_composer.tasks.rows import Row
from electra_composer.tasks.text_analysis import analyse_label_sets, analyse_labels
from electra_composer.tasks.text_pairs import TextTask

SINGLE_LABEL = ("accuracy", "macro_f1", "matthews", "auc")
MULTI_LABEL = ("micro_f1", "macro_f1", "accuracy", "auc")
CHUNK = 4096  # rows whose probabilities are computed together
MAX_PROBABILITIES = 20  # labels whose probability a prediction names
NONE = -1  # fills up the labels of an example, where others have more


class Classification(TextTask):
    """One or several of the labels found in the training examples.

    With several labels per example, their probabilities are independent, and those of at least 0.5 are predicted.

    Attributes:
        labels: names, in the order of the class numbers.
        multi_label: whether an example may have several labels, or none.
        temperature: what logits are divided by; see calibration.py.
    """

    kind = "classification"

    def __init__(self, config: TaskConfig, model: TaskModelConfig):
        super().__init__(config, model)
        self.labels: list[str] = []
        self.multi_label = config.multi_label is True
        self.temperature = 1.0
        self._numbers: dict[str, int] = {}  # of the labels
        self._weights: Tensor | None = None  # of class_weights, fp32 [labels]

    @property
    def metrics(self) -> tuple[str, ...]:
        if not self.labels and self.config.multi_label == "auto":  # either, until the labels are known
            return tuple(dict.fromkeys((*SINGLE_LABEL, *MULTI_LABEL)))
        return MULTI_LABEL if self.multi_label else SINGLE_LABEL

    @property
    def num_outputs(self) -> int:
        return len(self.labels)

    def learn(self, train: Split) -> None:
        column = train.columns["label"]
        counts: Counter[str] = Counter()
        rows, lists = 0, False
        for row in train:
            names = self._names(row, train)
            lists = lists or isinstance(row.values.get(column) if isinstance(column, str) else None, list)
            if names is not None:
                rows += 1
                counts.update(names)
        if self.config.multi_label == "auto":
            self.multi_label = lists or isinstance(column, list) or self.config.label_separator is not None
        if isinstance(column, list):
            if empty := [name for name in column if not counts[name]]:
                raise UserError(f"data.train: no row has 1 in column {empty[0]}; leave it out of data.columns.label")
            self._set_labels([str(name) for name in column])
        else:
            if note := check_counts(counts, f"column {column}"):
                self.notes.append(note)
            self._set_labels(sort_labels(list(counts)))
        if self.score not in self.metrics:
            found, valid = "several labels" if self.multi_label else "one label", ", ".join(self.metrics)
            raise UserError(f"task.metric is {self.score}, but examples have {found}; expected one of {valid}")
        if self.config.class_weights == "balanced":
            self._weights = balanced_weights([counts[name] for name in self.labels], rows, self.multi_label)

    def _set_labels(self, labels: list[str]) -> None:
        self.labels = labels
        self._numbers = {name: number for number, name in enumerate(labels)}

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "multi_label": self.multi_label, "temperature": self.temperature}

    def load_state(self, state: dict[str, Any]) -> None:
        self._set_labels(state["labels"])
        self.multi_label, self.temperature = state["multi_label"], state["temperature"]

    def output_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return np.full(self.num_outputs, 1 / self.temperature), np.zeros(self.num_outputs)

    def scaled_state(self) -> dict[str, Any]:
        return {**self.state(), "temperature": 1.0}

    def label_of(self, row: Row, split: Split) -> Any:
        names = self._names(row, split)
        if names is None:
            return None
        if unknown := [name for name in names if name not in self._numbers]:
            raise unknown_label(unknown[0], self.labels, row.where)
        numbers = [self._numbers[name] for name in names]
        if self.multi_label:
            return numbers
        if len(numbers) > 1:
            raise UserError(f"{row.where}: {len(names)} labels; expected one: set task.multi_label=true for several")
        return numbers[0] if numbers else None

    def stack(self, labels: list[Any]) -> NDArray[Any]:
        """Return class numbers, int64 `[rows]`, or with several labels `[rows, most of a row]`, filled with NONE."""
        if not self.multi_label:
            return np.array(labels, dtype=np.int64)
        stacked = np.full((len(labels), max(1, *map(len, labels), 0)), NONE, dtype=np.int64)
        for row, numbers in zip(stacked, labels, strict=True):
            row[: len(numbers)] = numbers
        return stacked

    def loss(self, outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        logits, labels = outputs.float(), batch["labels"]
        if self._weights is not None and self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits, self.targets(labels).float(), pos_weight=self._weights)
        if self._weights is None:
            return F.cross_entropy(logits, labels)
        # Divided by the number of examples, not by the sum of their weights, whose mean over all examples is 1: so
        # microbatches average to the batch.
        return F.cross_entropy(logits, labels, self._weights, reduction="sum") / len(labels)

    def targets(self, labels: Tensor) -> Tensor:
        """Class numbers of :meth:`stack`, `[rows, most of a row]` → bool `[rows, labels]`."""
        count = self.num_outputs
        targets = torch.zeros(len(labels), count + 1, dtype=torch.bool, device=labels.device)
        return targets.scatter_(1, torch.where(labels == NONE, count, labels), True)[:, :count]

    def scores(self, rows: EncodedRows, outputs: Sequence[Output]) -> dict[str, float]:
        return (multi_label_scores if self.multi_label else single_label_scores)(*self._labelled(rows, outputs))

    def analysis(self, rows: EncodedRows, outputs: Sequence[Output]) -> Analysis:
        analyse = analyse_label_sets if self.multi_label else analyse_labels
        return analyse(rows.source, self.labels, *self._labelled(rows, outputs))

    def calibrate(self, rows: EncodedRows, outputs: Sequence[Output]) -> None:
        """Set :attr:`temperature` to the best one for labelled examples, such as those of validation."""
        self.temperature = fit_temperature(*self._labelled(rows, outputs))

    def _labelled(self, rows: EncodedRows, outputs: Sequence[Output]) -> tuple[Tensor, Tensor]:
        """Return logits, fp32 `[rows, labels]`, and class numbers `[rows]`, or with several labels :meth:`targets`."""
        labels = torch.from_numpy(rows.per_row["labels"])
        return torch.from_numpy(np.stack(outputs)), self.targets(labels) if self.multi_label else labels

    def predictions(self, rows: EncodedRows, outputs: Sequence[Output]) -> Iterator[dict[str, Any]]:
        """Yield `label` or a list of `labels`, and `probabilities` of the most probable ones, in descending order."""
        for start in range(0, len(outputs), CHUNK):
            logits = torch.from_numpy(np.stack(outputs[start : start + CHUNK])).double() / self.temperature
            probabilities = logits.sigmoid() if self.multi_label else logits.softmax(1)
            values, numbers = probabilities.topk(min(MAX_PROBABILITIES, self.num_outputs))
            for row, chances, best in zip(logits.numpy(), values.tolist(), numbers.tolist(), strict=True):
                named = {self.labels[i]: float(f"{chance:.7g}") for i, chance in zip(best, chances, strict=True)}
                if self.multi_label:
                    yield {"labels": [self.labels[i] for i in np.flatnonzero(row >= 0)], "probabilities": named}
                else:
                    yield {"label": self.labels[best[0]], "probabilities": named}

    def collapsed(self, rows: EncodedRows, outputs: Sequence[Output]) -> bool:
        logits = np.stack(outputs)
        chosen = logits >= 0 if self.multi_label else logits.argmax(1)
        return bool((chosen == chosen[0]).all())

    def _names(self, row: Row, split: Split) -> list[str] | None:
        return label_names(row, split.columns.get("label"), self.config.label_separator)


def balanced_weights(counts: Sequence[int], rows: int, multi_label: bool) -> Tensor:
    """Return the weights of `class_weights: balanced`, fp32 `[labels]`.

    As scikit-learn's `balanced`; of several labels, positive and negative examples get equal weight.

    Args:
        counts: examples of each label.
        rows: examples.
    """
    each = torch.tensor(counts, dtype=torch.float64)
    return ((rows - each) / each if multi_label else rows / (len(each) * each)).float()
