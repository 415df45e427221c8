"""Examples to predict: files of any format, or lines of stdin, as a stream of blocks of rows."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable, Iterator

from electra_composer.corpus.readers import parse_object
from electra_composer.errors import UserError
from electra_composer.tasks.formats import STDIN, TEXT
from electra_composer.tasks.rows import Row
from electra_composer.tasks.tables import Table, open_table
from electra_composer.tasks.texts import read_lines


def open_input(source: str, format: str = "auto", header: bool = True) -> Table:
    """Open the examples to predict.

    Args:
        source: as `data.train` of finetune.py, or `-` for stdin, which has one JSON object or one text per line.
        format: as `data.format`, or `text`: a text per line, whose column is `text`.
        header: the first line of csv and tsv has the names of the columns.

    Raises:
        UserError: the input cannot be read, or stdin has another format.
    """
    if source == STDIN:
        return _open_stdin(format)
    if format == TEXT:
        return Table("input", ("text",), TEXT, (source,), (functools.partial(_texts, read_lines(source), source),))
    return open_table("input", source, format, header)


def _open_stdin(format: str) -> Table:
    if format not in ("auto", "jsonl", TEXT):
        raise UserError(f"--format={format} of stdin; expected jsonl or text: give a file for other formats")
    lines = _stdin_lines()
    first = next(lines, None)
    if first is None:
        expected = "one text" if format == TEXT else "one JSON object or one text"
        raise UserError(f"stdin: no rows; expected {expected} per line")
    rest = itertools.chain([first], lines)
    if format == "auto":
        format = "jsonl" if first.lstrip().startswith("{") else TEXT
    columns = tuple(parse_object(first, "stdin:1")) if format == "jsonl" else ("text",)
    read = _objects if format == "jsonl" else _texts
    return Table("input", columns, format, ("stdin",), (functools.partial(read, rest, "stdin"),))


def _stdin_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"stdin:{number}: not UTF-8: {error.reason}; convert it, such as with iconv") from error


def _texts(lines: Iterable[str], name: str) -> Iterator[Row]:
    """Yield every line, also empty ones, so that predictions are those of the lines."""
    for number, line in enumerate(lines, 1):
        yield Row({"text": line.rstrip("\r\n")}, f"{name}:{number}")


def _objects(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.isspace():
            yield Row(parse_object(line, f"{name}:{number}"), f"{name}:{number}")


def blocks(rows: Iterable[Row], document: str | None, size: int) -> Iterator[list[Row]]:
    """Divide a stream into lists of `size` rows, or more where a document is longer.

    Args:
        document: column of documents that are not divided; None: there are none.
    """
    block: list[Row] = []
    for row in rows:
        if len(block) >= size and (document is None or row.values[document] != block[-1].values[document]):
            yield block
            block = []
        block.append(row)
    if block:
        yield block
