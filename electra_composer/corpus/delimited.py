"""Parse CSV (quotes as in RFC 4180) and TSV (no quotes), and read the texts of such a file of a source."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from electra_composer.corpus.columns import TEXT, text_column
from electra_composer.corpus.files import UnreadableFile

DELIMITERS = ",\t;|"  # in order of preference
MAX_FIELD = 1 << 26  # characters of one field. The module's default, 128 KiB, is less than some documents have
SAMPLE = 100  # records that decide which column is the text
_NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "vertical bar"}
_QUOTE_FIELDS = "put fields that contain the delimiter into double quotes"

Record = tuple[int, list[str]]  # the line where it begins, fields


class Table(NamedTuple):
    """Names of the columns, and the records below them."""

    names: list[str]
    records: Iterator[Record]


def read_delimited(path: str, lines: Iterable[bytes], quoted: bool, column: str, every: slice) -> Iterator[bytes]:
    """Yield the texts of a file with a header, in UTF-8 if the file is.

    Args:
        quoted: CSV rather than TSV.
        column: see :func:`text_column`; or for a file without a header the number of the column, from 0.
        every: of the records, those to return: a quoted line break looks like the end of a record, so that no reader
            can begin in the middle of a file.

    Raises:
        UnreadableFile: see :func:`read_table`.
        UserError: see :func:`text_column`.
    """
    _, index, records = _open_text_column(path, lines, quoted, column)
    for _, fields in itertools.islice(records, every.start, every.stop, every.step):
        yield fields[index].encode("utf-8", "surrogateescape")


def chosen_column(path: str, lines: Iterable[bytes], quoted: bool) -> str | None:
    """Return the name of the column that :func:`read_delimited` takes by itself; None if there are no records.

    Raises:
        UnreadableFile, UserError: see :func:`read_delimited`.
    """
    names, index, _ = _open_text_column(path, lines, quoted, TEXT)
    return names[index] if names else None


def _open_text_column(
    path: str, lines: Iterable[bytes], quoted: bool, column: str
) -> tuple[list[str], int, Iterator[Record]]:
    """Return names of the columns, index of the text, and records."""
    # Bytes that are not UTF-8 go through the parser as surrogates, and come out as they were.
    decoded = (line.decode("utf-8", "surrogateescape") for line in lines)
    table = read_table(
        path, decoded, quoted, hint=_QUOTE_FIELDS if quoted else "if fields are quoted, rename it to .csv"
    )
    if table is None:
        return [], 0, iter(())
    names, records = table
    if column.isdecimal() and column not in names:
        records = itertools.chain([(1, names)], records)
        names = [str(number) for number in range(len(names))]
    sample = list(itertools.islice(records, SAMPLE))
    index = text_column(path, column, names, [fields for _, fields in sample])
    return names, index, itertools.chain(sample, records)


def read_table(
    path: str, lines: Iterable[str], quoted: bool, header: bool = True, hint: str = _QUOTE_FIELDS, header_hint: str = ""
) -> Table | None:
    """Parse the lines of a CSV file (:data:`DELIMITERS`, the most frequent one in the first line) or of a TSV file.

    Args:
        quoted: CSV: fields may be quoted, and then contain line breaks, delimiters and doubled quotes. Otherwise tabs
            are between fields, and quotes have no meaning, as in GLUE's files.
        header: the first record has the names of the columns; otherwise they are `0`, `1`, ….
        hint, header_hint: what to do about another number of fields, and about a double name, for messages.

    Returns:
        None if there is no line that is not blank.

    Raises:
        UnreadableFile: also while the records are read: a record with another number of fields, an unclosed quote, or
            a duplicate name.
    """
    delimiter, lines = "\t", iter(lines)
    if quoted:
        begin: list[str] = []
        for line in lines:
            begin.append(line)
            if line.strip():
                break
        delimiter = guess_delimiter(begin[-1]) if begin else ","
        lines = itertools.chain(begin, lines)
    records = _csv_records(path, lines, delimiter) if quoted else _tsv_records(lines)
    first = next(records, None)
    if first is None:
        return None
    if header:
        names = _column_names(path, *first, header_hint)
    else:
        names = [str(number) for number in range(len(first[1]))]
        records = itertools.chain([first], records)
    return Table(names, _check_width(path, records, names, delimiter, hint))


def guess_delimiter(line: str) -> str:
    """Return the delimiter that is most frequent in a line outside of quotes; a comma if there is none."""
    outside = "".join(line.split('"')[::2])
    return max(DELIMITERS, key=outside.count)


def _csv_records(path: str, lines: Iterable[str], delimiter: str) -> Iterator[Record]:
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
        raise UnreadableFile(f"{path}:{end + 1}: {_explain(str(error), reader.line_num)}") from error


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


def _tsv_records(lines: Iterable[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def _check_width(path: str, records: Iterator[Record], names: list[str], delimiter: str, hint: str) -> Iterator[Record]:
    width = len(names)
    for line, fields in records:
        if len(fields) != width:
            raise UnreadableFile(
                f"{path}:{line}: {len(fields)} column{'s'[: len(fields) != 1]}; expected {width} ({', '.join(names)}), "
                f"the delimiter being a {_NAMES[delimiter]}; {hint}"
            )
        yield line, fields


def _column_names(path: str, line: int, header: list[str], hint: str) -> list[str]:
    names = [name.strip() for name in header]
    for name in names:
        if names.count(name) > 1:
            raise UnreadableFile(
                f"{path}:{line}: the header has more than one column {name!r}; expected different names: rename one"
                f"{hint}"
            )
    return names
