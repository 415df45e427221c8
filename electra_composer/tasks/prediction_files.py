"""Write predictions as JSON Lines, csv or tsv; a file is complete or absent."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from electra_composer.atomic_files import replaced_file
from electra_composer.errors import UserError
from electra_composer.tasks.formats import STDOUT

DELIMITERS = {".csv": ",", ".tsv": "\t"}

Write = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def prediction_file(path: str) -> Iterator[Write]:
    """Yield a function that writes one prediction.

    Args:
        path: `….csv` and `….tsv` have a header and lists and objects as JSON; any other file, and `-`, which is stdout,
            has one JSON object per line.

    Raises:
        UserError: the file cannot be written; it is absent, or what it was before.
    """
    if path == STDOUT:
        yield _json_lines(sys.stdout)
        return
    try:
        with replaced_file(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            delimiter = DELIMITERS.get(os.path.splitext(path)[1].lower())
            try:
                yield _json_lines(text) if delimiter is None else _table(text, delimiter)
                text.flush()
            finally:
                with contextlib.suppress(OSError):
                    text.detach()  # otherwise it closes the file once more when it is collected
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; free some space or set another --output"
        ) from error


def _json_lines(file: TextIO) -> Write:
    def write(record: Mapping[str, Any]) -> None:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

    return write


def _table(file: TextIO, delimiter: str) -> Write:
    writer: csv.DictWriter | None = None

    def write(record: Mapping[str, Any]) -> None:
        nonlocal writer
        if writer is None:
            writer = csv.DictWriter(file, list(record), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _cell(value) for name, value in record.items()})

    return write


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
