"""CSV and TSV files: round trips with Python's csv module, delimiters, line numbers, and malformed files."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer.corpus.delimited import guess_delimiter
from electra_composer.errors import UserError
from electra_composer.tasks.delimited import read_csv, read_tsv
from electra_composer.tasks.rows import Row

common = settings(derandomize=True, database=None, max_examples=100, deadline=None)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8) | st.sampled_from(
    ['"', '""', "a,b", "a\nb", "a\r\nb", "a\tb", ";", "'", " x ", "é", "\u2028", "😀"]
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def values(rows: list[Row]) -> list[list[str]]:
    return [list(row.values.values()) for row in rows]


@common
@given(
    rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;|\t"),
    line_end=st.sampled_from(["\n", "\r\n"]),
    mark=st.booleans(),
)
def test_csv_reads_what_the_csv_module_writes(
    rows: list[tuple[str, str, str]], delimiter: str, line_end: str, mark: bool
) -> None:
    stream = io.StringIO()
    # All fields are quoted, since versions of the module differ in whether a lone carriage return is.
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b", "c"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.csv", ("\ufeff" if mark else "") + stream.getvalue())
        read = list(read_csv(path))
        assert [list(row.values) for row in read] == [["a", "b", "c"]] * len(rows)
        assert values(read) == [list(row) for row in rows]
        lines = stream.getvalue().split("\n")
        for row, first in zip(read, rows, strict=True):  # `where` is the line in which the record begins
            line = int(row.where.rpartition(":")[2])
            assert lines[line - 1].startswith('"' + first[0].split("\n")[0].replace('"', '""'))
        assert values(list(read_csv(path, header=False))) == [["a", "b", "c"], *values(read)]


@common
@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_tsv_reads_what_was_joined_by_tabs(rows: list[tuple[str, str]]) -> None:
    clean = [[field.translate({9: " ", 10: " ", 13: " "}) for field in row] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.tsv", "".join("\t".join(row) + "\n" for row in [["a", "b"], *clean]))
        read = list(read_tsv(path))
    assert values(read) == clean
    assert [row.where for row in read] == [f"{path}:{line}" for line in range(2, len(rows) + 2)]


def test_csv_equals_pandas(tmp_path: Path) -> None:
    table = pandas.DataFrame({"id": range(20), "text": [f'line {i},\n"{i % 3}"' * (i % 4) for i in range(20)]})
    table.to_csv(tmp_path / "a.csv", index=False)
    expected = pandas.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False).to_dict("records")
    assert [row.values for row in read_csv(str(tmp_path / "a.csv"))] == expected


@pytest.mark.parametrize(
    ("line", "delimiter"),
    [
        ("text,label", ","),
        ("text;label,x;y", ";"),
        ("text\tlabel", "\t"),
        ("a|b|c", "|"),
        ('"a,b,c";d', ";"),
        ("text", ","),
        ('"he said ""a;b;c""",d', ","),
    ],
)
def test_the_delimiter_is_the_most_frequent_outside_of_quotes(line: str, delimiter: str) -> None:
    assert guess_delimiter(line) == delimiter


def test_blank_lines_spaces_in_the_header_and_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000  # the csv module refuses more than 131,072 by default
    path = write(tmp_path / "a.csv", f'\n text ; label \r\n\n"a\n\nb";1\n\n{long};2')
    assert [(row.values, row.where) for row in read_csv(path)] == [
        ({"text": "a\n\nb", "label": "1"}, f"{path}:4"),
        ({"text": long, "label": "2"}, f"{path}:8"),
    ]


CSV_ERRORS = {
    "too many columns": ("a,b\n1,2\n1,2,3\n", r":3: 3 columns; expected 2 \(a, b\), the delimiter being a comma; put"),
    "too few": ("a;b\n\n1\n", r":3: 1 column; expected 2 \(a, b\), the delimiter being a semicolon"),
    "unclosed at the end": ('a,b\n1,"x\n2,y\n', r":2: a field that begins with a quote \(\"\) in this record"),
    "unclosed before another": ('a,b\n0,0\n1,"x\n2,"y"\n', r":3: text after a closing quote in line 4; expected"),
    "text after a quote": ('a,b\n"x" y,2\n', r":2: text after a closing quote in line 2"),
    "carriage returns": ("a,b\r1,2\r", r":1: a carriage return in a field without quotes"),
    "duplicate names": ("a,b,a\n1,2,3\n", r":1: the header has more than one column 'a'; .*data.header=false"),
    "Latin-1": ("a,b\n1,2\n1,é\n".encode("latin-1"), r":3: not UTF-8 \(byte 0xe9\); convert the file, .*iconv"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), "is UTF-16; expected UTF-8: convert it"),
    "UTF-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), r":1: holds NUL bytes, as UTF-16 .*UTF-16LE"),
    "gzip": (b"\x1f\x8b\x08\x00", r"is compressed by gzip; .*rename it to .*a\.csv\.gz"),
}


@pytest.mark.parametrize("name", CSV_ERRORS)
def test_malformed_csv(name: str, tmp_path: Path) -> None:
    content, message = CSV_ERRORS[name]
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError, match=message) as error:
        list(read_csv(path))
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_tsv_with_another_number_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'a\tb\n"x\ty"\nz\n')
    with pytest.raises(UserError, match=r":3: 1 column; expected 2 \(a, b\), .*tab; if fields are quoted, set data.fo"):
        list(read_tsv(path))
    assert list(read_csv(write(tmp_path / "empty.csv", ""))) == []
