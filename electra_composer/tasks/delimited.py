"""Read CSV files (quotes as in RFC 4180) and TSV files (no quotes)."""

from __future__ import annotations

from collections.abc import Iterator

from electra_composer.corpus.delimited import Table, read_table
from electra_composer.tasks.rows import Row
from electra_composer.tasks.texts import read_lines

_NO_HEADER = ", or set data.header=false if the file has no header"


def read_csv(path: str, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a CSV file. The delimiter is the most frequent one of `,`, tab, `;` and `|` in the first line.

    Fields may be quoted, and then contain line breaks, delimiters and doubled quotes. Blank lines are skipped.

    Args:
        header: the first record has the names of the columns; otherwise they are `0`, `1`, ….

    Raises:
        UserError: not UTF-8, a record with another number of fields, an unclosed quote, or a duplicate column name.
    """
    return _rows(path, read_table(path, read_lines(path), quoted=True, header=header, header_hint=_NO_HEADER))


def read_tsv(path: str, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a TSV file: tabs between fields, quotes have no meaning, as in GLUE's files.

    Raises:
        UserError: see :func:`read_csv`.
    """
    hint = "if fields are quoted, set data.format=csv"
    return _rows(path, read_table(path, read_lines(path), False, header, hint, header_hint=_NO_HEADER))


def _rows(path: str, table: Table | None) -> Iterator[Row]:
    if table is not None:
        for line, fields in table.records:
            yield Row(dict(zip(table.names, fields, strict=True)), f"{path}:{line}")
