"""Tables: formats by name and content, folders and globs, files that do not fit, the hub, and flat memory."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from electra_composer.errors import UserError
from electra_composer.tasks.tables import open_table

SQUAD = {"data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q"}]}]}]}
MRQA = {"context": "c", "qas": [{"qid": "1", "question": "q"}]}
QA_COLUMNS = ("id", "question", "context", "answers", "is_impossible", "title")
CONLL = "a X O\nb X O\n\nc X O\n"
FILES = {  # name → content, format, columns
    "a.csv": ("text,label\nx,1\n", "csv", ("text", "label")),
    "a.CSV": ("text;label\nx;1\n", "csv", ("text", "label")),
    "a.tsv": ('text\tlabel\n"x\t1\n', "tsv", ("text", "label")),
    "a.jsonl": ('{"a": 1}\n{"a": 1, "b": 2}\n', "jsonl", ("a", "b")),
    "a.ndjson": ('{"a": 1}', "jsonl", ("a",)),
    "array.json": ('[{"a": 1},\n {"b": 2}]', "json", ("a", "b")),
    "lines.json": ('{"a": 1}\n{"a": 2}\n', "jsonl", ("a",)),
    "long_line.json": (json.dumps({"a": "x" * 2_000_000}) + "\n", "jsonl", ("a",)),
    "squad.json": (json.dumps(SQUAD), "squad", QA_COLUMNS),
    "pretty.json": (json.dumps(SQUAD, indent=1), "squad", QA_COLUMNS),
    "long.json": (json.dumps({"data": SQUAD["data"] * 20_000}), "squad", QA_COLUMNS),
    "mrqa.jsonl": ('{"header": {"dataset": "x"}}\n' + json.dumps(MRQA), "mrqa", QA_COLUMNS),
    "mrqa.json": (json.dumps(MRQA), "mrqa", QA_COLUMNS),
    "flat_squad.jsonl": ('{"id": "1", "context": "c", "answers": {}}', "jsonl", ("id", "context", "answers")),
    "a.conll": (CONLL, "conll", ("tokens", "tags", "0", "1", "2", "document")),
    "a.txt": (CONLL, "conll", ("tokens", "tags", "0", "1", "2", "document")),
    "eng.train": (CONLL, "conll", ("tokens", "tags", "0", "1", "2", "document")),
    "a.iob2": ("a\tO\n", "conll", ("tokens", "tags", "0", "1", "document")),
}


def write(folder: Path, name: str, content: str) -> str:
    data = content.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = zstandard.compress(data)
    (folder / name).write_bytes(data)
    return str(folder / name)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_formats_by_name_and_content(name: str, compression: str, tmp_path: Path) -> None:
    content, format, columns = FILES[name]
    path = write(tmp_path, name + compression, content)
    table = open_table("data.train", path)
    assert (table.split, table.format, table.columns, table.files) == ("train", format, columns, (path,))
    rows = list(table)
    assert rows == list(table)  # each iteration opens the file again
    assert all(tuple(row.values) == columns or set(row.values) == set(columns) for row in rows)
    assert all(row.where.startswith(path) for row in rows)


def test_a_format_can_be_set_and_a_header_be_absent(tmp_path: Path) -> None:
    path = write(tmp_path, "data.txt", "x,1\ny,2\n")
    table = open_table("data.validation", path, format="csv", header=False)
    assert (table.split, table.columns) == ("validation", ("0", "1"))
    assert [row.values for row in table] == [{"0": "x", "1": "1"}, {"0": "y", "1": "2"}]
    write(tmp_path, "README.md", "about them")
    write(tmp_path, "a.jsonl", json.dumps(MRQA))
    assert open_table("data.train", str(tmp_path), format="mrqa").files == (f"{tmp_path}/a.jsonl",)


def test_objects_that_leave_out_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}\n' + '{"a": 3}\n' * 200 + '{"c": 4}\n')
    table = open_table("data.train", path)
    rows = list(table)
    assert table.columns == ("a", "b")
    assert [rows[0].values, rows[1].values, rows[-1].values] == [
        {"a": 1, "b": None},
        {"a": None, "b": 2},
        {"a": None, "b": None, "c": 4},
    ]


def test_folders_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"b.csv": "label,text\n2,y\n", "a.csv": "text,label\nx,1\n"}.items():
        write(tmp_path, name, content)
    write(tmp_path, "README.txt", "Some words.\n\nMore.\n")
    write(tmp_path, ".hidden.jsonl", "")
    write(tmp_path, "_SUCCESS", "")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for source in (
        str(tmp_path),
        str(tmp_path / "*.csv"),
        f"~/{tmp_path.name}",
        f"{tmp_path.parent}/{tmp_path.name[:-1]}?/?.csv",
    ):
        table = open_table("data.train", source)
        assert [Path(file).name for file in table.files] == ["a.csv", "b.csv"]
        assert [row.values for row in table] == [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]
    (tmp_path / "conll").mkdir()
    for name in ("1.conll", "2.conll"):
        write(tmp_path / "conll", name, "-DOCSTART- O\n\na O\n\n-DOCSTART- O\nb O\n")
    rows = list(open_table("data.train", str(tmp_path / "conll")))
    assert [row.values["document"] for row in rows] == [0, 1, 2, 3]


ERRORS: dict[str, tuple[dict[str, str], str, str]] = {
    "missing": ({}, "a.csv", r"data\.train .*a\.csv: no such file or folder, and no file matches it as a glob"),
    "empty folder": ({}, "", r"the folder has no files; expected files of one format"),
    "several formats": (
        {"a.csv": "a\n1\n", "b.jsonl": '{"a": 1}'},
        "",
        r"files of several formats: jsonl \(b\.jsonl\), csv \(a\.csv\); expected one: give a glob such as .*/\*\.csv",
    ),
    "several splits": (
        {"train-0.csv": "a\n1\n", "en_dev.csv": "a\n1\n"},
        "",
        r"files of several splits: en_dev\.csv, train-0\.csv; expected one: give the file, or a glob such as",
    ),
    "unknown suffix": ({"a.xlsx": "x"}, "a.xlsx", r"a\.xlsx: the format cannot be told by its name; expected \.csv, "),
    "compression": ({"a.csv.xz": "x"}, "a.csv.xz", r"the format cannot .*all but \.parquet also with \.gz or \.zst"),
    "text": ({"a.txt": "some words\nno sentences\n"}, "a.txt", r"or a CoNLL file with blank lines .*set data\.format"),
    "empty file": ({"a.csv": ""}, "a.csv", r"a\.csv: no rows; expected at least one: the file is empty or has a head"),
    "header only": ({"a.csv": "a,b\n"}, "a.csv", r"a\.csv: no rows"),
    "empty JSON": ({"a.json": ""}, "a.json", r"a\.json:1: the file ends too early; expected an array of objects"),
    "one object": ({"a.json": '{\n"a": [1]\n}'}, "a.json", r"a\.json: one JSON object of an unknown layout; .*SQuAD"),
    "other columns": (
        {"a.csv": "a,b\n1,2\n", "b.csv": "a,c\n1,2\n"},
        "",
        r"b\.csv: columns a, c; expected those of .*a\.csv: a, b; rename them",
    ),
    "broken parquet": ({"a.parquet": "PAR1"}, "a.parquet", r"a\.parquet: cannot be read: .*copy it again"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_sources_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    files, source, message = ERRORS[name]
    for file, content in files.items():
        write(tmp_path, file, content)
    with pytest.raises(UserError, match=message):
        open_table("data.train", str(tmp_path / source))


def test_an_unknown_format_and_a_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.format xml: unknown; expected auto, csv, tsv"):
        open_table("data.train", str(tmp_path), format="xml")
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress("".join(f"{number},{number**9}\n" for number in range(9999)).encode())[:-1000])
    with pytest.raises(UserError, match=r"a\.csv\.gz: cannot be read: Truncated compressed stream; .*copy it again"):
        list(open_table("data.train", str(path), header=False))


def test_a_file_that_changes_its_columns_later(tmp_path: Path) -> None:
    table = open_table("data.train", write(tmp_path, "a.csv", "a,b\n1,2\n"))
    write(tmp_path, "a.csv", "a,c\n1,2\n")
    with pytest.raises(UserError, match=r"a\.csv: columns a, c; expected"):
        list(table)


FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["neg", "pos"]),
        "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
    }
)
VALUES = {"text": ["x", "y", "é"], "label": [1, -1, 0], "tags": [[0, 1], [], [1]]}
NAMES = [
    {"text": "x", "label": "pos", "tags": ["O", "B-X"]},
    {"text": "y", "label": None, "tags": []},
    {"text": "é", "label": "neg", "tags": ["B-X"]},
]


def test_the_hub_and_its_parquet_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, split: str) -> datasets.Dataset:
        asked.append((*args, split))
        return datasets.Dataset.from_dict(VALUES, features=FEATURES)

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = open_table("data.train", "test", hub="some/reviews", hub_config="en")
    assert asked == [("some/reviews", "en", "test")]
    assert (table.split, table.format, table.columns) == ("train", "hub", ("text", "label", "tags"))
    assert [row.values for row in table] == [row.values for row in table] == NAMES
    assert next(iter(table)).where == "some/reviews test, row 1"
    datasets.Dataset.from_dict(VALUES, features=FEATURES).to_parquet(tmp_path / "a.parquet")
    table = open_table("data.train", str(tmp_path / "a.parquet"))
    assert [row.values for row in table] == NAMES
    assert [row.where for row in table] == [f"{tmp_path}/a.parquet, row {number}" for number in (1, 2, 3)]


def test_a_data_set_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, split: str) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"data\.train: the data set a/b \(train\) cannot be .*no route to host; check"):
        open_table("data.train", "train", hub="a/b")


def test_parquet_equals_pyarrow_and_its_errors(tmp_path: Path) -> None:
    size = 2500  # three batches
    columns = {"n": list(range(size)), "l": [[i] * (i % 3) for i in range(size)], "s": ["ü", None] * (size // 2)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=700)
    rows = list(open_table("data.train", str(tmp_path / "a.parquet")))
    assert [row.values for row in rows] == pa.table(columns).to_pylist()
    assert rows[-1].where.endswith("a.parquet, row 2500")
    pq.write_table(pa.table([[1], [2]], names=["n", "n"]), tmp_path / "double.parquet")
    with pytest.raises(UserError, match=r"double\.parquet: more than one column 'n'"):
        open_table("data.train", str(tmp_path / "double.parquet"))
    latin = pa.array([b"a", b"\xe9"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(2, latin.buffers()[1], latin.buffers()[2])
    pq.write_table(pa.table({"s": text}), tmp_path / "latin.parquet")
    with pytest.raises(UserError, match=r"latin\.parquet, rows 1 to 2: .*utf-8.*; correct the values"):
        open_table("data.train", str(tmp_path / "latin.parquet"))
    complete = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(complete[:-10])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: "):
        open_table("data.train", str(tmp_path / "a.parquet"))


def csv_file(path: Path, rows: int) -> None:
    text = "".join(f'"some, text\nof row {row}",{row % 2}\n' for row in range(rows))
    path.write_bytes(gzip.compress(f"text,label\n{text}".encode(), 1))


def json_file(path: Path, rows: int) -> None:
    path.write_text(json.dumps([{"text": f"some text of row {row}", "label": row % 2} for row in range(rows)]))


def parquet_file(path: Path, rows: int) -> None:
    texts = pa.array([f"some text of row {row}" for row in range(rows)])
    pq.write_table(pa.table({"text": texts, "label": texts}), path, row_group_size=rows)


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv.gz", csv_file), ("a.json", json_file), ("a.parquet", parquet_file)]
)
def test_memory_does_not_depend_on_the_number_of_rows(
    name: str, write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    """Resident memory stays flat over 300,000 rows; as a list they take more than 100 MB."""
    write(tmp_path / name, 300_000)
    process, used = psutil.Process(), []
    number = 0
    for number, _ in enumerate(open_table("data.train", str(tmp_path / name)), 1):
        if number % 10_000 == 0:
            used.append(process.memory_info().rss)
    assert number == 300_000
    assert max(used) - used[0] < 20e6
