"""Division of sources into parts: every document is in one part, wherever the borders are."""

from __future__ import annotations

import gzip
import itertools
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from converter import jsonl, tar_of
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer.corpus import source_parts
from electra_composer.corpus.documents import ReadStats, part_documents, read_documents
from electra_composer.corpus.readers import read_slice, slice_lines
from electra_composer.corpus.source_parts import Part, Slice, interleave, list_parts
from electra_composer.corpus.sources import Source, Sources, check_sources, fingerprint_files, read_mixture
from electra_composer.errors import UserError

PACK = {"": lambda data: data, ".gz": gzip.compress, ".zst": zstandard.compress}
common = settings(derandomize=True, database=None, max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("slices")


def texts_of(parts, sources):
    return [document.text for part in parts for document in part_documents(part, sources, ReadStats())]


@common
@given(
    lines=st.lists(st.sampled_from(["", " ", "\r", "a", "bb", "a longer line", "x" * 40, "\t\t"]), max_size=30),
    end=st.booleans(),
    places=st.lists(st.integers(1, 300), max_size=6, unique=True),
    suffix=st.sampled_from(list(PACK)),
    by_blank_lines=st.booleans(),
)
def test_every_line_is_in_one_slice(scratch, lines, end, places, suffix, by_blank_lines):
    data = ("\n".join(lines) + ("\n" if end else "")).encode()
    path = scratch / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](data))
    borders = [0, *sorted(places), None]
    slices = [Slice(str(path), a, b) for a, b in itertools.pairwise(borders)]
    pieces = [b"".join(slice_lines(piece, by_blank_lines)) for piece in slices]
    assert b"".join(pieces) == data
    for before, after in itertools.pairwise(pieces):
        if before and after:  # a border is between two lines; by paragraphs, after a blank one
            assert before.endswith(b"\n")
            assert not by_blank_lines or not before.split(b"\n")[-2].strip()


def write_corpus(folder, texts, kind):
    """Write the texts to one file of the given format."""
    if kind == "parquet":
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet", row_group_size=7)
    elif kind.startswith("jsonl"):
        (folder / f"a.{kind}").write_bytes(PACK[kind[5:]](jsonl(texts)))
    elif kind.startswith("txt"):
        data = "\n\n\n".join(texts).encode()
        (folder / f"a.{kind}").write_bytes(PACK[kind[3:]](data))
    else:
        files = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
        (folder / f"a.{kind}").write_bytes(tar_of(files, "w:xz" if kind == "tar.xz" else "w"))


KINDS = ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "txt", "txt.gz", "tar", "tar.xz"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_in_one_part(tmp_path, monkeypatch, kind):
    rng = random.Random(0)
    texts = [f"{number} " + "wörd " * rng.randint(1, 60) + "end." for number in range(200)]
    write_corpus(tmp_path, texts, kind)
    monkeypatch.setattr(source_parts, "MIN_PART", 4000)
    sources = Sources.of(str(tmp_path))
    parts = list_parts(sources, [])
    assert len(parts) >= 3
    assert parts == list_parts(sources, [])
    found = [text.strip() for text in texts_of(parts, sources)]
    assert sorted(found) == sorted(texts)
    if not kind.startswith("tar"):  # a part has every n-th member of an archive
        assert found == texts


def test_small_files_are_converted_together(tmp_path, monkeypatch):
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number}\n\nsecond")
    sources = Sources.of(str(tmp_path), txt_documents="file")
    assert len(list_parts(sources, [])) == 1
    monkeypatch.setattr(source_parts, "MIN_PART", 300)
    parts = list_parts(sources, [])
    assert 5 < len(parts) < 20
    assert texts_of(parts, sources) == [f"document {number}\n\nsecond" for number in range(100)]


def test_a_file_that_is_one_document_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 100)
    (tmp_path / "a.txt").write_text("line\n\n" * 1000)
    assert len(list_parts(Sources.of(str(tmp_path), txt_documents="file"), [])) == 1
    assert len(list_parts(Sources.of(str(tmp_path)), [])) > 10


def test_few_slices_of_what_cannot_be_entered_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 1000)
    write_corpus(tmp_path, [f"{number} some words" for number in range(20_000)], "jsonl.gz")
    assert len(list_parts(Sources.of(str(tmp_path)), [])) == source_parts.MAX_SLICES


def test_each_file_of_the_hub_is_a_part(monkeypatch):
    stream = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"]}).to_iterable_dataset(num_shards=3)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    parts = list_parts(Sources(), [])
    assert [texts_of([part], Sources()) for part in parts] == [["a", "b"], ["c"], ["d"]]
    assert list(read_documents(Sources(), ReadStats())) == ["a", "b", "c", "d"]


def test_sources_are_spread_over_the_whole():
    sources = Sources([Source("a"), Source("b", weight=2.5)])
    parts = [Part(0, 0, (Slice(f"a{i}"),)) for i in range(4)] + [Part(1, 0, (Slice("b"),))]
    mixed = interleave(parts, sources)
    assert [(part.source, part.copy) for part in mixed] == [(0, 0), (1, 0), (0, 0), (1, 1), (0, 0), (1, 2), (0, 0)]
    assert sorted(part for part in mixed if part.copy == 0) == sorted(parts)


def test_a_mixture_in_a_file(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("sources:\n- {path: a, weight: 2}\n- {path: hub, dataset: x/y, name: wiki, text_column: body}\n")
    assert read_mixture(str(path)) == [
        Source("a", weight=2.0),
        Source("hub", dataset="x/y", name="wiki", text_column="body"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources:\n- {path: a, wieght: 2}\n", "wieght.*expected a list under sources:.*weight"),
        ("sources:\n- {path: a, weight: much}\n", "much"),
        ("source: a\n", "source"),
        ("- a\n", "expected a list under sources:"),
        ("sources: []\n", "no sources"),
        ("a: [\n", "expected a list under sources:"),
        (None, "No such file"),
    ],
)
def test_a_mixture_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "mixture.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=rf"(?s)--mixture .*mixture.yaml: .*{message}"):
        read_mixture(str(path))


def test_weights_and_names_that_make_no_sense(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for weight in (0, -1, 1000):
        with pytest.raises(UserError, match=rf"weight is {weight}; expected a number in \(0, 100\]"):
            check_sources(Sources.of(str(tmp_path), weight=weight))
    with pytest.raises(UserError, match="is given more than once"):
        check_sources(Sources.of(str(tmp_path), str(tmp_path)))


def test_changed_files_are_told_apart(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    before = fingerprint_files(Sources.of(str(tmp_path)))
    assert (before["count"], before["bytes"]) == (2, 10)
    assert fingerprint_files(Sources.of(str(tmp_path))) == before
    (tmp_path / "b.txt").write_text("b.txt, longer")
    assert fingerprint_files(Sources.of(str(tmp_path))) != before


def test_utf16_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(UserError, match=r"a.txt: is UTF-16; expected UTF-8"):
        list(read_slice(Slice(str(tmp_path / "a.txt")), Source()))
