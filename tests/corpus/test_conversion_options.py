"""Options of conversions: mixtures, filters, case and accents, Spark."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
from converter import assert_same_files, convert_sources, documents_of, jsonl, write_source

from electra_composer.batches.shards import read_meta
from electra_composer.corpus import source_parts
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.part_conversion import copy_count
from electra_composer.corpus.sources import Source, Sources
from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer


def test_a_mixture_takes_each_source_by_its_weight(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 8000)
    for name, word in (("a", "word1"), ("b", "word2"), ("c", "word3")):
        write_source(tmp_path / f"{name}.jsonl", 400, word, seed=ord(name))
    sources = Sources(
        [
            Source(str(tmp_path / "a.jsonl"), name="once"),
            Source(str(tmp_path / "b.jsonl"), name="half", weight=0.5),
            Source(str(tmp_path / "c.jsonl"), name="more", weight=2.25),
        ]
    )
    summary = convert_sources(sources, tmp_path / "out", vocabulary, workers=2, val_fraction=0.1)
    counts = {name: part.documents for name, part in summary.sources.items()}
    assert abs(counts["half"] - 200) < 4 * (400 * 0.25) ** 0.5
    val = summary.splits["val"].documents
    first = [text.split()[0] for text in documents_of(tmp_path / "out", vocabulary)]
    held_out = [text.split()[0] for text in documents_of(tmp_path / "out", vocabulary, "val")]
    # A document of "more" is in validation once, or in train 2.25 times on average.
    of_more = held_out.count("word3")
    assert counts["once"] == 400
    assert abs(counts["more"] - (2.25 * (400 - of_more) + of_more)) < 4 * (400 * 0.1875) ** 0.5
    assert [first.count(f"word{i}") + held_out.count(f"word{i}") for i in (1, 2, 3)] == [*counts.values()]
    assert len(held_out) == val
    assert len(set(held_out)) == 3
    meta = read_meta(str(tmp_path / "out"))
    assert meta.sources == summary.sources
    assert sum(part.tokens for part in meta.sources.values()) == sum(part.tokens for part in meta.splits.values())
    assert "half" in str(summary)
    assert "share" in str(summary)
    # All sources are spread over the shards.
    third = len(first) // 3
    assert all(len(set(first[start : start + third])) == 3 for start in (0, third, 2 * third))


def test_how_often_a_document_is_taken():
    for weight in (0.3, 1.0, 2.75):
        taken = [copy_count(0, digest, weight) for digest in range(4000)]
        assert set(taken) <= {int(weight), int(weight) + 1}
        assert sum(taken) / 4000 == pytest.approx(weight, abs=4 * 0.5 / 4000**0.5)
    assert [copy_count(0, digest, 0.5) for digest in range(50)] != [copy_count(1, digest, 0.5) for digest in range(50)]


def test_no_text_is_in_both_splits(tmp_path, vocabulary):
    texts = write_source(tmp_path / "a.jsonl", 200, "word1")
    (tmp_path / "b.jsonl").write_bytes(jsonl([*texts, *texts[::-1]]))
    convert_sources(Sources.of(str(tmp_path / "b.jsonl")), tmp_path / "out", vocabulary, val_fraction=0.3)
    train, val = (set(documents_of(tmp_path / "out", vocabulary, split)) for split in ("train", "val"))
    assert train
    assert val
    assert not train & val


def test_a_wrong_expression_is_said(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("word1")
    with pytest.raises(UserError, match=r"--drop-lines '\(a': not a regular expression"):
        convert_sources(Sources.of(str(tmp_path / "a.txt"), drop_lines=["(a"]), tmp_path / "out", vocabulary)


def test_lines_that_are_dropped(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("word1 word2\nCookie notice: word3\nword4 1234567\n\nword5\n\ncookie word6")
    sources = Sources.of(str(tmp_path / "a.txt"), drop_lines=["(?i)cookie", r"\d{5}"])
    summary = convert_sources(sources, tmp_path / "out", vocabulary)
    assert documents_of(tmp_path / "out", vocabulary) == ["word1 word2", "word5"]
    assert summary.text.dropped_lines == 3
    assert summary.total.documents == 2


def test_the_seeds_cleaning_is_part_of_the_plan_and_of_the_shards(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("word1 () word2()\n() word3\n\n()")
    plain, cleaned = (Sources.of(str(tmp_path / "a.txt"), clean=clean) for clean in (None, "seed"))
    assert "clean" not in Conversion(plain).plan()["sources"]  # as in plans from before it existed
    assert Conversion(cleaned).plan()["sources"]["clean"] == "seed"
    convert_sources(cleaned, tmp_path / "out", vocabulary)
    assert documents_of(tmp_path / "out", vocabulary) == ["word1 word2 word3"]
    assert read_meta(str(tmp_path / "out")).conversion["clean"] == "seed"
    convert_sources(plain, tmp_path / "plain", vocabulary)
    assert "clean" not in read_meta(str(tmp_path / "plain")).conversion


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"cafe"}),
        ({"keep_accents": True}, {"café"}),
        ({"cased": True}, {"Café", "CAFÉ"}),
    ],
)
def test_case_and_accents_of_a_trained_vocabulary(tmp_path, options, expected):
    (tmp_path / "a.txt").write_text("\n\n".join(["Café CAFÉ"] * 30))
    convert(
        Conversion(
            Sources.of(str(tmp_path / "a.txt")),
            str(tmp_path / "out"),
            "train",
            vocab_size=40,
            val_fraction=0.0,
            progress=False,
            **options,
        )
    )
    tokenizer = load_tokenizer(str(tmp_path / "out/tokenizer"))  # as the trainer loads it
    assert set(tokenizer.tokenize("Café CAFÉ")) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, ["cafe", "cafe"]), ({"keep_accents": True}, ["café", "café"]), ({"cased": True}, ["Café", "CAFÉ"])],
)
def test_case_and_accents_of_a_vocabulary_file(tmp_path, options, expected):
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *expected])
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"), **options)
    assert tokenizer.tokenize("Café CAFÉ") == expected


def test_case_is_the_business_of_other_tokenizers(tmp_path, vocabulary):
    load_tokenizer(vocabulary).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="defines case and accents itself"):
        load_tokenizer(str(tmp_path / "tokenizer"), cased=True)


# Spark.

needs_spark = pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None, reason="needs pyspark and Java"
)


@needs_spark
@pytest.mark.slow
def test_spark_writes_the_same_bytes(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 20_000)  # in the driver, which divides the sources
    texts = write_source(tmp_path / "a.jsonl", 500, "word1")
    write_source(tmp_path / "b.jsonl", 300, "word2", seed=1)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*texts, texts[0]]))
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    sources = Sources([Source(paths[0]), Source(paths[1], weight=1.5)], deduplicate=True)
    local = convert_sources(sources, tmp_path / "local", vocabulary, workers=2, val_fraction=0.05)
    spark = convert_sources(
        sources, tmp_path / "spark", vocabulary, engine="spark", master="local[2]", val_fraction=0.05
    )
    assert local.text.duplicate_documents >= 1
    assert len(os.listdir(tmp_path / "local/train")) > 3
    assert spark.total == local.total
    assert_same_files(tmp_path / "local", tmp_path / "spark")
    # An error in a Spark worker is one line too.
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"^.*bad.jsonl, line 1: 'text' is a int; expected text$"):
        convert_sources(
            Sources.of(str(tmp_path / "bad.jsonl")), tmp_path / "bad", vocabulary, engine="spark", master="local[2]"
        )
    assert not (tmp_path / "bad").exists()
    __import__("pyspark").SparkContext.getOrCreate().stop()


def test_spark_that_is_not_there(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyspark", None)
    write_source(tmp_path / "a.jsonl", 3, "word1")
    with pytest.raises(UserError, match=r"pip install 'electra-composer\[spark\]'"):
        convert_sources(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary, engine="spark")
