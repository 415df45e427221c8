"""Data of a task of one's own: splits, columns, length of the rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetune_config import FinetuneConfig, TaskDataConfig
from electra_composer.tasks.base import Split, Task, Tokenized
from electra_composer.tasks.columns import find_columns
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.rows import LeftOut
from electra_composer.tasks.tables import open_table

PERCENTILE = 0.99
"""Fraction of the training examples that `data.max_seq_length: auto` does not cut."""

Say = Callable[[str], None]


@dataclass
class Rows:
    """Encoded splits to train on and to evaluate."""

    train: EncodedRows
    validation: EncodedRows
    max_seq_length: int


def open_splits(task: Task, data: TaskDataConfig, say: Say) -> dict[str, Split]:
    """Open the splits that the configuration names: `train`, and `validation` and `test` if they are given.

    The columns of the roles of the task are chosen in the training split, and are the same in the others; a test split
    may lack those of labels.

    Args:
        say: receives the columns that were guessed.

    Raises:
        UserError: the files cannot be read, or a column is missing.
    """
    columns = dict(data.columns)
    splits = {}
    for name, source in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if source is None:
            continue
        table = open_table(f"data.{name}", source, data.format, data.header, data.hub, data.hub_config)
        wanted, given = dict(task.roles), dict(columns)
        if name == "test":
            for role in task.label_roles:
                absent = [each for each in _listed(columns.get(role)) if each not in table.columns]
                wanted[role], given[role] = (None,), "" if absent else columns.get(role)
        found = find_columns(table, "data.columns", wanted, given)
        splits[name] = Split(name, table, found, LeftOut(name))
        if name == "train":
            guessed = [f"{role}={column}" for role, column in found.items() if column and role not in data.columns]
            if guessed:
                say(f"data.columns: {', '.join(guessed)}")
            same = {role: column for role, column in found.items() if role not in task.names_of_examples}
            columns |= {role: "" if column is None else column for role, column in same.items()}
    return splits


def _listed(column: Any) -> list[Any]:
    return column if isinstance(column, list) else [column]


def draw_rows(splits: dict[str, Split], config: FinetuneConfig, say: Say) -> tuple[Split, Split]:
    """Return training and validation split after `validation_fraction` and `max_train_examples`.

    Rows are drawn in one order by the seed: a smaller sample does not move rows between the splits.

    Raises:
        UserError: there are too few rows to divide.
    """
    train, data = splits["train"], config.data
    if "validation" in splits and config.max_train_examples is None:
        return train, splits["validation"]
    count = sum(1 for _ in train.table)
    order = np.random.default_rng(config.seed).permutation(count)
    validation = splits.get("validation")
    if validation is None:
        held_out = round(count * data.validation_fraction)
        if not 0 < held_out < count:
            raise UserError(
                f"data.train: {count} rows, too few for data.validation_fraction={data.validation_fraction}; set "
                "data.validation=…"
            )
        drawn, order = order[:held_out], order[held_out:]
        validation = replace(train, name="validation", left_out=LeftOut("validation"), chosen=_mask(drawn, count))
        say(f"data.validation: {held_out:,} of {count:,} rows of data.train, drawn by seed {config.seed}")
    return replace(train, chosen=_mask(order[: config.max_train_examples], count)), validation


def _mask(drawn: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=bool)
    mask[drawn] = True
    return mask


def read_rows(
    task: Task,
    config: FinetuneConfig,
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerFast,
    positions: int,
    progress: bool,
    say: Say,
) -> Rows:
    """Read, tokenize and encode the training and validation examples. The task learns from the former.

    Args:
        splits: of :func:`open_splits`.
        positions: of the model.
        progress: show progress bars.
        say: receives what was chosen and left out.

    Raises:
        UserError: a row is not as expected.
    """
    train, validation = draw_rows(splits, config, say)
    task.learn(train)
    task.columns = train.columns
    for note in task.notes:
        say(note)
    examples = task.tokenize(train, tokenizer, progress)
    length = choose_length(config.data.max_seq_length, examples, positions, task.per_token, say)
    rows = task.encode(examples, tokenizer, length)
    rows.source = None  # the texts of the training examples are not needed again
    held_out = task.encode(task.tokenize(validation, tokenizer, progress), tokenizer, length)
    for split in (train, validation):
        if (left_out := split.left_out.describe()) is not None:
            say(left_out)
    return Rows(rows, held_out, length)


def choose_length(wanted: int | str, examples: Tokenized, positions: int, divides: bool, say: Say) -> int:
    """Return the maximum number of tokens of a row, and say how many examples are longer.

    Args:
        wanted: `data.max_seq_length`.
        positions: of the model.
        divides: whether a longer example becomes several rows, instead of being cut.

    Raises:
        UserError: it is larger than the number of positions.
    """
    lengths = examples.lengths
    if isinstance(wanted, int) and wanted > positions:
        raise UserError(
            f"data.max_seq_length is {wanted}, but the model has {positions} positions; expected at most that"
        )
    quantile = int(np.quantile(lengths, PERCENTILE, method="higher"))
    if isinstance(wanted, int):
        length, reason = wanted, ""
    elif quantile <= positions:
        length, reason = quantile, f" (auto: {PERCENTILE:.0%} of the training examples are not longer)"
    else:
        length, reason = positions, " (auto: the positions of the model)"
    longer = int((lengths > length).sum())
    what = "are longer and divided into rows" if divides else "are longer and cut"
    say(f"data.max_seq_length: {length}{reason}; {longer:,} of {len(lengths):,} training examples {what}")
    return length
