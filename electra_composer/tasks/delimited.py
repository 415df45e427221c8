"""Read CSV files (quotes as in RFC 4180) and TSV files (no quotes)."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator

from electra_composer.errors import UserError
from electra_composer.tasks.rows import Row
from electra_composer.tasks.texts import read_lines

DELIMITERS = ",\t;|"  # in order of preference
MAX_FIELD = 1 << 26  # characters of one field. The module's default, 128 KiB, is less than some documents have
_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "vertical bar"}

Record = tuple[int, list[str]]  # the line where it begins, fields


def read_csv(path: str, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a CSV file. The delimiter is the most frequent one of :data:`DELIMITERS` in the first line.

    Fields may be quoted, and then contain line breaks, delimiters and doubled quotes. Blank lines are skipped.

    Args:
        header: the first record has the names of the columns; otherwise they are `0`, `1`, ….

    Raises:
        UserError: not UTF-8, a record with another number of fields, an unclosed quote, or a duplicate column name.
    """
    lines = read_lines(path)
    begin: list[str] = []
    for line in lines:
        begin.append(line)
        if line.strip():
            break
    delimiter = guess_delimiter(begin[-1]) if begin else ","
    records = _csv_records(path, itertools.chain(begin, lines), delimiter)
    return _rows(path, records, header, delimiter, "put fields that contain the delimiter into double quotes")


def read_tsv(path: str, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a TSV file: tabs between fields, quotes have no meaning, as in GLUE's files.

    Raises:
        UserError: see :func:`read_csv`.
    """
    return _rows(path, _tsv_records(path), header, "\t", "if fields are quoted, set data.format=csv")


def guess_delimiter(line: str) -> str:
    """Return the delimiter that is most frequent in a line outside of quotes; a comma if there is none."""
    outside = "".join(line.split('"')[::2])
    return max(DELIMITERS, key=outside.count)


def _csv_records(path: str, lines: Iterator[str], delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))  # of the process; there is none of a reader
    # strict: an unclosed quote is an error, not one field of all the rest
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    end = 0
    try:
        for record in reader:
            begin, end = end + 1, reader.line_num
            if record:
                yield begin, record
    except csv.Error as error:
        raise UserError(f"{path}:{end + 1}: {_explain(str(error), reader.line_num)}") from error


def _explain(error: str, line: int) -> str:
    """Explain an error of the csv module in the record that was read up to `line`."""
    if "field larger" in error:
        return f'a field of more than {MAX_FIELD:,} characters; a quote (") in this record may not be closed'
    if "unexpected end of data" in error:
        return 'a field that begins with a quote (") in this record is not closed; close it, or double quotes in fields'
    if "expected after" in error:
        return (
            f"text after a closing quote in line {line}; expected a delimiter or the end of the line: a quote is not "
            'closed, or quotes within a field are not doubled ("")'
        )
    if "new-line character" in error:
        return "a carriage return in a field without quotes; expected line feeds: convert it, as tr '\\r' '\\n' does"
    return f"not CSV ({error})"


def _tsv_records(path: str) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), 1):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def _rows(path: str, records: Iterator[Record], header: bool, delimiter: str, hint: str) -> Iterator[Row]:
    first = next(records, None)
    if first is None:
        return
    if header:
        names = _column_names(path, *first)
    else:
        names = [str(number) for number in range(len(first[1]))]
        records = itertools.chain([first], records)
    width = len(names)
    for line, fields in records:
        if len(fields) != width:
            raise UserError(
                f"{path}:{line}: {len(fields)} column{'s'[: len(fields) != 1]}; expected {width} ({', '.join(names)}), "
                f"the delimiter being a {_NAMES[delimiter]}; {hint}"
            )
        yield Row(dict(zip(names, fields, strict=True)), f"{path}:{line}")


def _column_names(path: str, line: int, header: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{path}:{line}: the header has more than one column {name!r}; expected different names: rename one, "
                "or set data.header=false if the file has no header"
            )
    return names
