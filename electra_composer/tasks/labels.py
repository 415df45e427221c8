"""Labels of classification: their names in the data, and their order."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from electra_composer.errors import UserError
from electra_composer.tasks.rows import Row

MAX_DISTINCT = 0.8  # fraction of the rows: with more different values the column is more likely text than labels
FEW_ROWS = 20  # below this number of rows that is not checked

BOOLEANS = {"0": False, "1": True, "false": False, "true": True, "": False}  # values of a column per label


def label_names(row: Row, column: str | list[str] | None, separator: str | None) -> list[str] | None:
    """Return the names of a row's labels, each once; None if it is not labelled.

    Args:
        column: that of the label, or of a list of labels; a list: columns of 0 and 1, one per label.
        separator: between the labels of a text.

    Raises:
        UserError: a value is no label, with file and line.
    """
    if column is None:
        return None
    if isinstance(column, list):
        flags = [_flag(row, name) for name in column]
        if all(row.values[name] in (None, "") for name in column):
            return None
        return [name for name, flag in zip(column, flags, strict=True) if flag]
    value = row.values[column]
    if isinstance(value, dict):
        raise UserError(f"{row.where}: {column} is an object; expected a label, or a list of labels")
    if isinstance(value, list):
        names = [label_name(each) for each in value]
    elif separator is not None and isinstance(value, str):
        names = [label_name(each) for each in value.split(separator)]
    else:
        name = label_name(value)
        return None if name is None else [name]
    return list(dict.fromkeys(name for name in names if name is not None))


def _flag(row: Row, column: str) -> bool:
    text = (label_name(row.values[column]) or "").lower()
    if text not in BOOLEANS:
        raise UserError(
            f"{row.where}: {column} is {text!r}; expected 0 or 1 in each of the columns of data.columns.label"
        )
    return BOOLEANS[text]


def label_name(value: Any) -> str | None:
    """Return the name of a label: text without spaces around it, 3 for 3.0, True for true; None if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def sort_labels(names: Sequence[str]) -> list[str]:
    """Sort the names of labels: by value if all are numbers, else by text."""
    return sorted(names, key=float) if all(map(_is_number, names)) else sorted(names)


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def check_counts(counts: Counter[str], where: str) -> str | None:
    """Check the labels of the training examples, and describe those with a single example.

    Args:
        counts: name → number of examples.
        where: column, for messages.

    Returns:
        A line, or None.

    Raises:
        UserError: fewer than two labels, or nearly as many as examples.
    """
    if len(counts) < 2:
        found = f"only the label {next(iter(counts))!r}" if counts else "no labels"
        raise UserError(f"data.train: {found} in {where}; expected at least two: set data.columns.label to another")
    rows = sum(counts.values())
    if rows >= FEW_ROWS and len(counts) > MAX_DISTINCT * rows:
        raise UserError(
            f"data.train: {where} has {len(counts):,} different values for {rows:,} examples, such as "
            f"{next(iter(counts))[:40]!r}: text or numbers, not labels; set data.columns.label to another column, or "
            "task.kind=regression for numbers"
        )
    once = [name for name, count in counts.items() if count == 1]
    if not once:
        return None
    has = "have" if len(once) > 1 else "has"
    return f"data.train: {len(once):,} of the {len(counts):,} labels {has} a single example, such as {once[0]!r}"


def unknown_label(name: str, labels: Sequence[str], where: str) -> UserError:
    """Return the error of a label that no training example has."""
    close = difflib.get_close_matches(name, labels, n=1, cutoff=0.5)
    if close:
        expected = f"did you mean {close[0]!r}?"
    elif len(labels) <= 20:
        expected = f"expected one of {', '.join(labels)}"
    else:
        expected = f"expected one of its {len(labels):,} labels, such as {', '.join(labels[:3])}"
    return UserError(f"{where}: no training example has the label {name!r}; {expected}")
