"""Reading documents of every format, and the errors for those that cannot be read."""

from __future__ import annotations

import gzip
import lzma
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from converter import jsonl, tar_of

from electra_composer.corpus.chunks import document_lines
from electra_composer.corpus.documents import ReadStats, read_documents
from electra_composer.corpus.files import find_files
from electra_composer.corpus.sources import Sources, check_sources
from electra_composer.errors import UserError

TEXTS = ["First document.\nTwo lines, naïve.", "Second.", "Third, 漢字."]


def read(*sources, **options):
    stats = ReadStats()
    texts = list(read_documents(Sources.of(*map(str, sources), **options), stats))
    assert stats.documents == len(texts)
    assert stats.bytes == sum(len(text.encode()) for text in texts)
    return texts, stats


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", lambda data: data),
        ("a.json", lambda data: b"\xef\xbb\xbf" + data),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.gz", lambda data: gzip.compress(data[:30]) + gzip.compress(data[30:])),
        ("a.jsonl.zst", zstandard.compress),
        ("a.jsonl.zst", lambda data: zstandard.compress(data[:30]) + zstandard.compress(data[30:])),
    ],
)
def test_json_lines(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS)))
    assert read(tmp_path / name)[0] == TEXTS


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path, type_):
    table = pa.table({"id": [0, 1, 2, 3], "body": pa.array([*TEXTS, None]).cast(type_)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet", text_column="body")[0] == TEXTS


def test_text_with_blank_lines_or_one_document_a_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\nOne.\r\nStill one.\r\n \t\r\n\r\nTwo.")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"Three."))
    texts = ["One.\r\nStill one.\r\n", "Two.", "Three."]
    assert read(tmp_path)[0] == texts
    whole, _ = read(tmp_path, txt_documents="file")
    assert [text.split() for text in whole] == [["One.", "Still", "one.", "Two."], ["Three."]]


def test_folders_and_globs_in_order(tmp_path):
    for name in ("b/2.jsonl", "a/1.txt", "a/10.txt", "a/notes.md", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    assert read(tmp_path)[0] == ["a/1.txt", "a/10.txt", "b/2.jsonl"]
    assert read(tmp_path / "**/*.jsonl", tmp_path / "a")[0] == ["b/2.jsonl", "a/1.txt", "a/10.txt"]


def test_limits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["x" * 10] * 20))
    assert len(read(tmp_path, max_documents=3)[0]) == 3
    assert len(read(tmp_path, max_bytes=45)[0]) == 5  # including the document that reaches the limit


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xffd\n\ngood")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "b\xc3d"}\n{"text": "half \\ud83d pair"}\n')
    raw = pa.array([b"b\xfed", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "c.parquet")
    texts, stats = read(tmp_path)
    assert texts == ["good\n", "b\ufffdd\n", "good", "b\ufffdd", "half ? pair", "b\ufffdd", "good"]
    assert stats.invalid == 4


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2: no column 'text'; found 'body', 'id'"),
        ("a.jsonl", b'["a"]\n', r"line 1: expected an object, found a list"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: 'text' is a int; expected text"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS * 100))[:-50], r"a.jsonl.gz: cannot be read as .jsonl: Truncated"),
        ("a.jsonl.gz", b"not gzip at all", r"a.jsonl.gz: cannot be read as .jsonl"),
        (
            "a.txt.zst",
            zstandard.compress(b"text " * 5000 + os.urandom(500))[:-90],
            r"a.txt.zst: cannot be read as .txt",
        ),
        ("a.parquet", b"PAR1 not parquet PAR1", r"a.parquet: cannot be read as .parquet"),
        ("a.parquet", b"", r"a.parquet: cannot be read as .parquet"),
        ("a.jsonl", b"", r"no text in .*a.jsonl; expected at least one document"),
        ("a.txt", b" \n\n\t\n", r"no text in .*a.txt"),
        ("a.doc", b"text\n", r"a.doc: unknown file format; expected .parquet, .arrow, .jsonl"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_parquet_without_the_column_or_with_another_type(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text'; found 'body', 'number': choose one with --text-column"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="'number' holds int64; expected text"):
        read(tmp_path / "a.parquet", text_column="number")


def test_sources_that_are_not_there(tmp_path):
    for source in ("nothing", "*.jsonl"):
        with pytest.raises(UserError, match="no such file or folder, and no file matches"):
            check_sources(Sources.of(str(tmp_path / source)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no file of a supported format"):
        find_files(str(tmp_path / "empty"))


def test_hub(monkeypatch):
    calls = []

    def load(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_dict({"id": [0, 1, 2], "text": TEXTS}).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub")[0] == TEXTS
    options = {"revision": "refs/convert/parquet", "split": "train", "streaming": True}
    assert calls == [(("Skylion007/openwebtext", None), options)]
    with pytest.raises(UserError, match=r"data set Skylion007/openwebtext .*: no column 'body'; found 'id', 'text'"):
        read("hub", text_column="body")


def test_hub_out_of_reach_or_breaking_off(monkeypatch):
    def load(*args, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found a.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError, match=r"data set a/b at revision c cannot be read .*scripts are no longer .*--revision"
    ):
        read("hub", dataset="a/b", revision="c")

    def break_off():
        yield {"text": TEXTS[0]}
        raise ConnectionError("reset by peer")

    features = datasets.Features({"text": datasets.Value("string")})
    stream = datasets.IterableDataset.from_generator(break_off, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: stream)
    with pytest.raises(UserError, match="reading from the hub failed: reset by peer"):
        read("hub")


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.xz", "w:xz"), (".tar.gz", "w:gz"), (".tgz", "w:gz")]
)
def test_archives_like_that_of_openwebtext(tmp_path, suffix, mode):
    inner = [tar_of({f"{i}-{j}.txt": f"document {i} {j}".encode() for j in range(3)}, "w:xz") for i in range(2)]
    files = {"openwebtext/a.xz": inner[0], "../../outside.txt": b"outside", "b.xz": inner[1], "readme.md": b"no"}
    (tmp_path / f"owt{suffix}").write_bytes(tar_of(files, mode))
    texts, _ = read(tmp_path)
    assert texts == [*(f"document 0 {j}" for j in range(3)), "outside", *(f"document 1 {j}" for j in range(3))]
    assert not (tmp_path.parent.parent / "outside.txt").exists()


@pytest.mark.parametrize("cut", [10, 700, 3000])
def test_archives_that_are_cut_short(tmp_path, cut):
    words = os.urandom(3000).hex().encode()
    whole = tar_of({"a.txt": words, "b.xz": tar_of({"c.txt": words}, "w:xz")}, "w:xz")
    (tmp_path / "owt.tar.xz").write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"owt\.tar\.xz: cannot be read as \.tar"):
        read(tmp_path / "owt.tar.xz")


def test_an_archive_in_an_archive_that_is_damaged(tmp_path):
    (tmp_path / "owt.tar").write_bytes(tar_of({"a.xz": lzma.compress(b"no archive")}))
    with pytest.raises(UserError, match="cannot be read as"):
        read(tmp_path / "owt.tar")


def test_documents_that_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a long one", "b", "a long one", "another", "b", "a long one "]))
    texts, stats = read(tmp_path / "a.jsonl", deduplicate=True, min_characters=2)
    assert texts == ["a long one", "another", "a long one "]
    assert (stats.short, stats.duplicates) == (2, 1)
    texts, stats = read(tmp_path / "a.jsonl", deduplicate=True, max_documents=2)
    assert texts == ["a long one", "b"]


def test_unicode_forms(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["cafe\u0301 \ufb01", "caf\u00e9 fi"]))
    assert read(tmp_path / "a.jsonl", normalize="NFC")[0] == ["caf\u00e9 \ufb01", "caf\u00e9 fi"]
    assert read(tmp_path / "a.jsonl", normalize="NFKC", deduplicate=True)[0] == ["caf\u00e9 fi"]


# Lines of the rule of richarddwang/electra_pytorch (`ELECTRADataProcessor` in `_utils/utils.py`).
SEED_LINES = [
    "Georg () was born () in 1809.",
    "  f() and g( ) and h(()) and (x)  ",
    "()",
    " () ",
    "\t ",
    "",
    "(" + "a" * 77 + ")",  # 79 characters
    "(" + "a" * 78 + ")",  # 80
    "b" * 76 + "()()",  # 80, of which 76 stay
    "naïve (漢字) () " * 9,
]


@pytest.mark.parametrize("short_lines", [False, True])
def test_the_seeds_cleaning(tmp_path, short_lines):
    """Its rule, line by line: leave out lines of whitespace, and for Wikipedia those of less than 80 characters; then
    delete `()`."""
    expected = []
    for line in SEED_LINES:
        if line.isspace() or not line or (short_lines and len(line) < 80):
            continue
        expected.append(line.strip().replace("()", ""))
    (tmp_path / "a.jsonl").write_bytes(jsonl(["\n".join(SEED_LINES)]))
    drop = {"drop_lines": ["^.{0,79}$"]} if short_lines else {}
    found, stats = read(tmp_path / "a.jsonl", clean="seed", **drop)
    assert document_lines(found[0], "newline") == [line.strip() for line in expected if line.strip()]
    assert stats.lines == (7 if short_lines else 0)
    assert read(tmp_path / "a.jsonl")[0] == ["\n".join(SEED_LINES)]  # none is the default


def test_a_document_that_the_seeds_cleaning_empties_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["()\n()", "word ()"]))
    assert read(tmp_path / "a.jsonl", clean="seed")[0] == ["word "]
