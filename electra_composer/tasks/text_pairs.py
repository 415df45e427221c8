"""Tasks whose examples are texts or pairs of texts with one label for all of it."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.finetuning import TransformersHead, linear_head
from electra_composer.tasks.base import Output, Split, Task, Tokenized
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.rows import Row
from electra_composer.tasks.tokenization import Pieces, full_lengths, join, tokenize

TRAINED = ("train", "validation")
"""Splits of which unusable rows are left out; of the others every row gets a prediction."""


@dataclass
class Texts(Tokenized):
    """Texts or pairs of texts.

    Attributes:
        first, second: A and B; B is None for single texts.
        labels: `[examples, …]`, as the model is trained on them; None if the split has none.
        texts: the texts themselves; None for training examples.
        where: the place of each example, for messages; None for training examples.
    """

    first: Pieces
    second: Pieces | None
    labels: NDArray[Any] | None
    texts: list[tuple[str, ...]] | None
    where: list[str] | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return full_lengths(self.first, self.second)


class TextTask(Task):
    """Base of classification and regression."""

    roles: ClassVar[Mapping[str, Sequence[str | None]]] = {
        "text": ("text", "sentence", "sentence1", "premise", "question", "review", "content", "body"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "text2", "answer", None),
        "label": ("label", "labels", "target", "targets", "score", "class", "category", "stars", "rating"),
    }
    label_roles = ("label",)

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """Width of the head."""

    @abc.abstractmethod
    def label_of(self, row: Row, split: Split) -> Any:
        """Return the label of a row, as :meth:`stack` takes it; None if it has none.

        Raises:
            UserError: the label is not valid, with file and line.
        """

    def stack(self, labels: list[Any]) -> NDArray[Any]:
        """Return the labels of all rows as an array `[rows, …]`."""
        return np.array(labels)

    def output_scale(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return factor and offset, `[outputs]`, that a saved model applies to the outputs of the head.

        A saved model then gives calibrated logits, or predictions in the units of the data, in transformers too.
        """
        return np.ones(self.num_outputs), np.zeros(self.num_outputs)

    def scaled_state(self) -> dict[str, Any]:
        """Return what :meth:`state` returns, for a model that applies :meth:`output_scale` itself."""
        return self.state()

    def tokenize(self, split: Split, tokenizer: PreTrainedTokenizerFast, progress: bool = False) -> Texts:
        keep = split.name != "train"
        labels: list[Any] = []
        texts: list[tuple[str, ...]] = []
        where: list[str] = []

        def examples() -> Iterator[tuple[str, ...]]:
            for row in split.left_out.count(split):
                example, label = texts_of(row, split), self.label_of(row, split)
                if split.name in TRAINED and not example[0].strip():
                    split.left_out.add("have an empty text", row.where)
                    continue
                if split.name in TRAINED and label is None:
                    split.left_out.add("have no label", row.where)
                    continue
                labels.append(label)
                if keep:
                    texts.append(example)
                    where.append(row.where)
                yield example

        columns = 1 if split.columns.get("text_pair") is None else 2
        pieces = tokenize(examples(), columns, tokenizer, split.name, progress)
        split.left_out.check()
        known = bool(labels) and all(label is not None for label in labels)
        return Texts(
            split.name,
            pieces[0],
            pieces[1] if columns == 2 else None,
            self.stack(labels) if known else None,
            texts if keep else None,
            where if keep else None,
        )

    def encode(self, examples: Tokenized, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> EncodedRows:
        assert isinstance(examples, Texts)
        rows = join(examples.first, examples.second, max_seq_length, tokenizer.cls_token_id, tokenizer.sep_token_id)
        if examples.labels is not None:
            rows.per_row["labels"] = examples.labels
        rows.source = examples
        return rows

    def build_head(self, config: EncoderConfig) -> nn.Module:
        if self.model_config.head == "transformers":
            return TransformersHead(config, self.num_outputs, self.model_config.classifier_dropout)
        return linear_head(config.hidden_size, self.num_outputs)

    def keep(self, outputs: Tensor, batch: Mapping[str, Any]) -> list[Output]:
        return list(outputs.float().cpu().numpy())


def texts_of(row: Row, split: Split) -> tuple[str, ...]:
    """Return the text or pair of texts of a row; what is null is empty.

    Raises:
        UserError: a value is a list or an object.
    """
    found = []
    for role in ("text", "text_pair"):
        column = split.columns.get(role)
        if column is None:
            continue
        value = row.values[column]  # type: ignore[index]
        if isinstance(value, list | dict):
            raise UserError(
                f"{row.where}: {column} is a {type(value).__name__}; expected text: set data.columns.{role}=…"
            )
        found.append("" if value is None else str(value))
    return tuple(found)
