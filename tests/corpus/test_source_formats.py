"""Sources in csv, tsv, Arrow and nested JSON, books without documents, and data sets saved to disk."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from converter import WORDS, convert_sources, documents_of, main, text, write_vocabulary

from electra_composer.corpus import source_parts
from electra_composer.corpus.documents import ReadStats, part_documents, read_documents
from electra_composer.corpus.estimate import estimate_text
from electra_composer.corpus.readers import describe_columns
from electra_composer.corpus.source_parts import list_parts
from electra_composer.corpus.sources import Source, Sources, check_sources
from electra_composer.errors import UserError

PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}
SENTENCES = [
    'He said "so, what?" and left.',
    "Two\nlines of it, here.",
    "naïve 漢字; third | one of them",
    "a fourth, last",
]


def read(path, **options):
    return list(read_documents(Sources.of(str(path), **options), ReadStats()))


def table(rows, delimiter=",", header=("id", "url", "body")):
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return stream.getvalue().encode()


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, pack, delimiter):
    rows = [(number, f"https://example.org/{number}/page", text) for number, text in enumerate(SENTENCES)]
    (tmp_path / f"a.csv{pack}").write_bytes(PACK[pack](b"\xef\xbb\xbf" + table(rows, delimiter)))
    assert read(tmp_path, text_column="body") == SENTENCES
    assert read(tmp_path) == SENTENCES  # the only column that looks like text
    assert read(tmp_path, text_column="id") == ["0", "1", "2", "3"]
    [line] = describe_columns(Sources.of(str(tmp_path)))
    assert "the text is the column 'body'" in line
    assert list(describe_columns(Sources.of(str(tmp_path), text_column="body"))) == []


@pytest.mark.parametrize("pack", PACK)
def test_tsv(tmp_path, pack):
    data = 'id\ttitle\ttext\n1\tFirst of the titles\tSay "this\n2\tSecond of the titles\t\n3\tThird of them\tb\xff d\n'
    (tmp_path / f"a.tsv{pack}").write_bytes(PACK[pack](data.encode("latin-1")))
    stats = ReadStats()
    assert list(read_documents(Sources.of(str(tmp_path)), stats)) == ['Say "this', "b\ufffd d"]
    assert stats.invalid == 1


def test_a_single_column_and_a_file_without_header(tmp_path):
    (tmp_path / "a.csv").write_text("title\nx\ny\n")
    assert read(tmp_path / "a.csv") == ["x", "y"]
    (tmp_path / "b.tsv").write_text("7\teng\tOne.\n8\teng\tTwo.\n")
    assert read(tmp_path / "b.tsv", text_column="2") == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,name\n1,x\n2,y\n", r"a.csv: no column 'text'; found 'id', 'name': choose one with --text-column"),
        ("a.csv", "a,b\n1,2,3\n", r"a.csv:2: 3 columns; expected 2 \(a, b\), the delimiter being a comma"),
        ("a.csv", "a,b\n" + ",".join(["some words of the text"] * 2) + "\n", r"no column 'text'; found 'a', 'b'"),
        ("a.csv", 'id,text\n1,"never closed\n2,b\n', r"a.csv:2: a field that begins with a quote .* is not closed"),
        ("a.csv", 'id,text\n1,"closed" too early\n', r"a.csv:2: text after a closing quote in line 2"),
        ("a.csv", "text,text\n1,2\n", r"a.csv:1: the header has more than one column 'text'"),
        ("a.csv", "", r"no text in .*a.csv; expected at least one document"),
        ("a.csv", "text\n", r"no text in .*a.csv"),
        ("a.tsv", 'id\ttext\n1\t"a\tb"\n', r"a.tsv:2: 3 columns; expected 2 .* a tab; if .* quoted, rename it to .csv"),
        ("a.csv.gz", "id,text\n", r"a.csv.gz: cannot be read as .csv"),
        ("a.csv", "\ufffe".encode("utf-16-le") * 2, "is UTF-16"),
        ("a.jsonl", '{"a": {"title": "x", "c": {"d": 1}}, "e": 1}', r"no column 'a.b'; found 'a.title', 'a.c.d', 'e'"),
        ("a.jsonl", '{"a": ["x"]}', r"line 1: no column 'a.b'; found 'a'"),
        ("a.jsonl", '{"a": {"b": {"c": 1}}}', r"line 1: 'a.b' is a dict; expected text"),
        ("a.arrow", "no arrow at all", r"a.arrow: cannot be read as .arrow"),
        ("dataset_dict.json", '{"splits": "x"}', r"dataset_dict.json lists no splits"),
        ("state.json", "{", r"state.json: cannot be read as JSON"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', r"gone.arrow: no such file, which state.json"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    options = {"text_column": "a.b"} if name == "a.jsonl" else {}
    with pytest.raises(UserError, match=message):
        read(tmp_path if name.endswith(".json") else tmp_path / name, **options)


def test_nested_keys(tmp_path):
    rows = [{"a": {"b": "one"}}, {"a": None}, {"a": {"b": "two", "x": 1}}, {"a.b": "three", "a": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl", text_column="a.b") == ["one", "two", "three"]
    pq.write_table(pa.table({"id": [1, 2], "a": [{"b": {"c": "one"}}, None]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_column="a.b.c") == ["one"]
    with pytest.raises(UserError, match=r"no column 'a.c'; found 'id', 'a.b.c'"):
        read(tmp_path / "a.parquet", text_column="a.c")


def save(folder, **splits):
    parts = {
        name: datasets.Dataset.from_dict({"id": range(len(texts)), "text": texts}) for name, texts in splits.items()
    }
    datasets.DatasetDict(parts).save_to_disk(folder, num_shards=dict.fromkeys(parts, 2))


def test_data_sets_saved_to_disk(tmp_path):
    save(tmp_path / "saved", train=[f"train {i}" for i in range(13)], test=["test 0", "test 1"])
    assert read(tmp_path / "saved") == [f"train {i}" for i in range(13)]
    assert read(tmp_path / "saved", split="test") == ["test 0", "test 1"]
    assert read(tmp_path / "saved/test") == ["test 0", "test 1"]
    with pytest.raises(UserError, match="no split 'dev'; found 'train', 'test': choose one with --dataset-split"):
        read(tmp_path / "saved", split="dev")
    with pytest.raises(UserError, match=r"contains .*saved.* written by save_to_disk; give it as a --source itself"):
        read(tmp_path)
    with pytest.raises(UserError, match="no column 'body'; found 'id', 'text'"):
        read(tmp_path / "saved", text_column="body")
    with pytest.raises(UserError, match="split test has no effect; it is for the source hub and a DatasetDict"):
        check_sources(Sources.of(str(tmp_path / "saved/train"), split="test"))
    # rows that are selected and shuffled are saved in their new order
    data = datasets.Dataset.from_dict({"text": [f"{i}" for i in range(50)]}).shuffle(seed=1).select(range(9))
    data.save_to_disk(tmp_path / "shuffled")
    assert read(tmp_path / "shuffled") == data["text"][:]


def test_feather(tmp_path):
    rows = pa.table({"text": SENTENCES})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    assert read(tmp_path) == SENTENCES


LINES = [f"line {number}" for number in range(10)]


@pytest.mark.parametrize(("count", "documents"), [(1, 10), (3, 4), (5, 2), (100, 1)])
def test_a_book_by_lines(tmp_path, count, documents):
    (tmp_path / "a.txt").write_text("\n\n".join(LINES) + "\n")
    found = read(tmp_path, txt_documents=count)
    assert len(found) == documents
    assert [line for document in found for line in document.split("\n") if line] == LINES
    assert all(len([line for line in document.split("\n") if line]) == count for document in found[:-1])


def write_parts(folder, kind, texts):
    rows = [(number, text) for number, text in enumerate(texts)]
    if kind.startswith("csv"):
        data = table(rows, header=("id", "text"))
        (folder / f"a.{kind}").write_bytes(PACK[kind[3:]](data))
    elif kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "a", num_shards=2)
    else:
        (folder / "a.txt").write_text("\n".join(texts))


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "saved", "lines"])
def test_every_document_is_in_one_part(tmp_path, monkeypatch, kind):
    rng = random.Random(0)
    separator = " " if kind == "lines" else '\n"quoted", '
    texts = [f"{number}{separator}" + "wörd " * rng.randint(1, 60) + "end." for number in range(2500)]
    write_parts(tmp_path, kind, texts)
    monkeypatch.setattr(source_parts, "MIN_PART", 40_000)
    sources = Sources.of(
        str(tmp_path / "a" if kind == "saved" else tmp_path), txt_documents=1 if kind == "lines" else "blank"
    )
    parts = list_parts(sources, [])
    assert len(parts) >= 3
    found = [document.text.strip() for part in parts for document in part_documents(part, sources, ReadStats())]
    assert sorted(found) == sorted(texts)
    estimated = estimate_text(sources, 20_000)
    assert estimated.documents == pytest.approx(2500, rel=0.3)


def test_the_converter_reads_all_of_them(tmp_path, capsys):
    rng = random.Random(0)
    vocabulary = write_vocabulary(tmp_path, *WORDS)
    texts = [text(rng, 3) for _ in range(12)]
    (tmp_path / "a.csv").write_bytes(table([(n, "https://a.b/c", t) for n, t in enumerate(texts[:4])]))
    save(tmp_path / "saved", train=texts[4:8])
    (tmp_path / "book.txt").write_text("\n".join(texts[8:]))
    line = ["--tokenizer", vocabulary, "--max-seq-length", "128", "--no-progress", "--workers", "1"]
    sources = [word for name in ("a.csv", "saved", "book.txt") for word in ("--source", str(tmp_path / name))]
    options = ["--txt-documents", "1", "--dataset-split", "train", "--packing", "one", "--overflow", "carry"]
    main([*line, *sources, *options, "--val-fraction", "0.1", "--out", str(tmp_path / "out")])
    assert f"{tmp_path / 'a.csv'}: the text is the column 'body'" in capsys.readouterr().out
    found = [" ".join(documents_of(tmp_path / "out", vocabulary, split)) for split in ("train", "val")]
    words = sorted(" ".join(found).replace(".", " ").split())
    assert words == sorted(" ".join(texts).lower().replace(".", " ").split())
    single = Sources([Source(str(tmp_path / "book.txt"), txt_documents="file")])
    with pytest.raises(UserError, match=r"only one document .* --txt-documents 100 after every 100 lines"):
        convert_sources(single, tmp_path / "one", vocabulary, val_fraction=0.1)
