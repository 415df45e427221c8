"""Sentences with tags, and the task that has learned from them, for the tests of tagging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import ElectraTokenizerFast

from electra_composer.finetune_config import TaskConfig, TaskModelConfig
from electra_composer.tasks.base import Split
from electra_composer.tasks.encoded import IGNORED, EncodedRows
from electra_composer.tasks.rows import LeftOut, Row
from electra_composer.tasks.tagging import Tagging

ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", *(f"##{letter}" for letter in "abcdef"), ".", "-"]
INVISIBLE = "\u200d"  # removed by the tokenizer
SENTENCES = [
    (["abc", "d", "e"], ["B-X", "I-X", "O"]),
    (["a-b", INVISIBLE, "c", ""], ["O", "O", "B-Y", "O"]),
    (["f"], ["O"]),
]


def make_task(**config: Any) -> Tagging:
    return Tagging(TaskConfig(kind="tagging", **config), TaskModelConfig(source="source"))


def make_split(rows: Sequence[tuple[Any, ...]], name: str = "train") -> Split:
    """Rows of tokens, tags and, perhaps, document."""
    columns = ("tokens", "tags", "document")[: max(map(len, rows))]
    table = [Row(dict(zip(columns, row, strict=False)), f"a.conll:{n + 1}") for n, row in enumerate(rows)]
    return Split(name, table, {column: column for column in columns}, LeftOut(name))


def learned(rows: Sequence[tuple[Any, ...]] = SENTENCES, **config: Any) -> Tagging:
    task = make_task(**config)
    task.learn(make_split(rows))
    return task


def encoded(task: Tagging, split: Split, tokenizer: ElectraTokenizerFast, length: int = 32) -> EncodedRows:
    return task.encode(task.tokenize(split, tokenizer), tokenizer, length)


def outputs_of(rows: EncodedRows, value: Callable[[int], int], count: int) -> list[np.ndarray]:
    """Logits whose best label is `value` of the true one."""
    parts = np.split(rows.per_token["labels"], rows.offsets[1:-1])
    return [
        9 * np.eye(count, dtype=np.float32)[[value(label) for label in part[part != IGNORED]]].reshape(-1, count)
        for part in parts
    ]
