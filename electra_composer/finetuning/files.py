"""Read GLUE examples from TSV files or from the hub.

The TSV reader is strict: no quoting, an optional byte-order mark, a header if the task says so. Malformed rows are
errors with file and line; only QQP's broken rows are skipped, as in other readers, and counted.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

from electra_composer.errors import UserError
from electra_composer.finetuning.tasks import Split, Task

log = logging.getLogger(__name__)

HUB = "hub"  # value of data.path
HUB_DATASET = "nyu-mll/glue"
MAX_BROKEN_FRACTION = 0.01  # maximum fraction of rows that lack columns


class Example(NamedTuple):
    """One or two sentences and their label.

    The `repr` of examples is part of the cache key of hub data (data.py).

    Attributes:
        texts: A, or A and B.
        label: class number, or unscaled score of a regression; None in a test set.
        server_index: the example's number on the server; None except in a test set.
    """

    texts: tuple[str, ...]
    label: int | float | None
    server_index: int | None = None


def read_examples(task: Task, split: str, path: str) -> list[Example]:
    """Read all examples of a split, in the order of the file.

    Args:
        split: key of `task.splits`.
        path: folder with one folder per task, or `hub`.

    Raises:
        UserError: missing folder, file or column, unreachable hub, wrong number of columns in a row, unknown label.
    """
    if path == HUB:
        examples = read_hub(task, _row(task, split))
    else:
        examples = read_tsv(task, *find_file(task, split, path))
    if not examples:
        raise UserError(f"{task.folder} {split}: no examples in {path}; expected at least one; check data.path")
    return examples


def find_file(task: Task, split: str, path: str) -> tuple[str, Split]:
    """Find the file of a split and its layout.

    Folder names may differ in case, or be those of google-research/electra or the hub.

    Raises:
        UserError: no such folder or file.
    """
    row = _row(task, split)
    wanted = f"{task.folder}/{row.file}"
    if not os.path.isdir(path):
        raise UserError(f"data.path {path}: no such folder; expected one with {wanted}, or 'hub'")
    present = sorted(os.listdir(path))
    for name in (task.folder, *task.other_folders):
        for folder in (entry for entry in present if entry.casefold() == name.casefold()):
            for layout in (row, *row.alternatives):
                file = os.path.join(path, folder, layout.file)
                if os.path.isfile(file):
                    return file, layout
    also = [f"{folder}/{row.file}" for folder in task.other_folders]
    also += [f"{task.folder}/{layout.file}" for layout in row.alternatives]
    raise UserError(
        f"{os.path.join(path, wanted)}: no such file; data.path must hold {wanted} for task {task.name}"
        + (f" (or {', '.join(also)})" if also else "")
    )


def _row(task: Task, split: str) -> Split:
    if split not in task.splits:
        raise UserError(f"{task.folder} has no split {split!r}; it has {', '.join(task.splits)}")
    return task.splits[split]


def read_tsv(task: Task, file: str, split: Split) -> list[Example]:
    """Read a file of the official download; see :func:`read_examples`."""
    rows = _rows(file)
    names = next(rows, (0, []))[1] if split.width is None else []
    width = split.width or len(names)
    if not width:
        raise UserError(f"{file}: the file is empty; download it again")
    texts = [_position(column, names, file) for column in split.texts]
    label = None if split.label is None else _position(split.label, names, file)
    index = None if split.index is None else _position(split.index, names, file)
    examples: list[Example] = []
    broken = 0
    for line, row in rows:
        if len(row) < width and split.skip_short_rows:
            broken += 1
            continue
        if len(row) != width:
            raise UserError(
                f"{file}:{line}: {len(row)} columns; expected {width}"
                + (f" ({', '.join(names)})" if names else f", without a header, for {task.folder}")
            )
        sentences = tuple(row[position] for position in texts)
        if label is not None:
            examples.append(Example(sentences, _parse_label(task, row[label], f"{file}:{line}")))
        else:
            number = len(examples) if index is None else _parse_index(row[index], f"{file}:{line}")
            examples.append(Example(sentences, None, number))
    _report_broken(broken, broken + len(examples), width, file)
    return examples


def _rows(file: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and columns of each row that is not blank."""
    line = 0
    try:
        # utf-8-sig: MRPC's files start with a byte-order mark. No quoting: sentences contain unpaired quotation marks.
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            for row in reader:
                line = reader.line_num
                if row:
                    yield line, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: after line {line}: {error}; expected UTF-8 text with tabs between columns") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}; check the file and its permissions") from error


def _report_broken(broken: int, total: int, width: int, file: str) -> None:
    """Log the number of skipped rows.

    Raises:
        UserError: more than one row and more than :data:`MAX_BROKEN_FRACTION` of all rows were skipped.
    """
    if broken > max(1, MAX_BROKEN_FRACTION * total):
        raise UserError(
            f"{file}: {broken} of {total} rows have fewer than {width} columns; "
            f"expected at most {MAX_BROKEN_FRACTION:.0%}; download the file again"
        )
    if broken:
        log.warning("%s: skipped %d of %d rows: they have fewer than %d columns", file, broken, total, width)


def read_hub(task: Task, split: Split) -> list[Example]:
    """Read a split of `nyu-mll/glue` from the Hugging Face hub or its local cache; see :func:`read_examples`."""
    if not task.on_hub:
        raise UserError(
            f"data.path is hub, but {task.name} is not on the hub; set it to the folder that synthetic.py wrote"
        )
    import datasets  # takes a second, which reading files does not need

    try:
        rows = datasets.load_dataset(HUB_DATASET, task.name, split=split.hub)
    except Exception as error:  # the hub's client raises a dozen kinds of errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path is hub, but {HUB_DATASET} ({task.name}, {split.hub}) cannot be read: {reason}; "
            "check the connection, or set data.path to a folder of TSV files"
        ) from error
    where = f"{HUB_DATASET} {task.name} {split.hub}"
    is_test = split.label is None
    wanted = [*task.hub_texts, "idx" if is_test else "label"]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise UserError(f"{where}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
    texts = zip(*(rows[column] for column in task.hub_texts), strict=True)
    if is_test:
        return [Example(tuple(pair), None, int(index)) for pair, index in zip(texts, rows["idx"], strict=True)]
    _check_class_names(task, getattr(rows.features["label"], "names", None), where)
    labels = (_hub_label(task, label, f"{where} row {i}") for i, label in enumerate(rows["label"]))
    return [Example(tuple(pair), label) for pair, label in zip(texts, labels, strict=True)]


def _check_class_names(task: Task, names: list[str] | None, where: str) -> None:
    """Refuse a data set with other class numbers. For labels 0 and 1 the hub's names differ and are not compared."""
    if names is not None and not all(label.isdigit() for label in task.labels) and tuple(names) != task.labels:
        raise UserError(
            f"{where}: its classes are {', '.join(names)}; expected {', '.join(task.labels)}, in this order"
        )


def _hub_label(task: Task, label: int | float, where: str) -> int | float:
    if task.is_regression:
        return _check_score(task, float(label), where)
    if label not in range(len(task.labels)):
        raise UserError(f"{where}: label {label}; expected 0 to {len(task.labels) - 1}")
    return int(label)


def _position(column: str | int, names: list[str], file: str) -> int:
    if isinstance(column, int):
        return column
    if column not in names:
        raise UserError(f"{file}:1: no column {column!r} in the header; found {', '.join(map(repr, names))}")
    return names.index(column)


def _parse_index(text: str, where: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{where}: index {text!r}; expected an integer, the example's number on the server")
    return int(text)


def _parse_label(task: Task, text: str, where: str) -> int | float:
    if not task.is_regression:
        if text not in task.labels:
            raise UserError(f"{where}: label {text!r}; expected one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError as error:
        raise UserError(f"{where}: label {text!r}; expected a number") from error
    return _check_score(task, score, where)


def _check_score(task: Task, score: float, where: str) -> float:
    assert task.score_range is not None
    low, high = task.score_range
    if not low <= score <= high:
        raise UserError(f"{where}: score {score} is out of range; expected {low:g} to {high:g}")
    return score
