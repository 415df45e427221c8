"""Options of conversions: mixtures, filters, case and accents, unreadable files, failures of workers, Spark."""

from __future__ import annotations

import errno
import gzip
import importlib.util
import os
import random
import shutil
import signal

import pytest
from converter import WORDS, assert_same_files, jsonl, rows_of, write_vocabulary
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.shards import read_meta
from electra_composer.corpus import engines, part_conversion, source_parts
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.part_conversion import copy_count
from electra_composer.corpus.part_writer import PartWriter
from electra_composer.corpus.sources import Source, Sources
from electra_composer.errors import UserError
from electra_composer.vocabulary import load_tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), *WORDS)


def write_source(path, count, word, seed=0):
    """Write documents of distinct texts that begin with the given word; return the texts."""
    rng = random.Random(seed)
    texts = [f"{word} {' '.join(rng.choices(WORDS[100:], k=rng.randint(8, 30)))}." for _ in range(count)]
    path.write_bytes(jsonl(texts))
    return texts


def run(sources, out, vocabulary, **options):
    options = {"val_fraction": 0.0, "max_seq_length": 64, "progress": False, "overflow": "carry", **options}
    return convert(Conversion(sources, str(out), vocabulary, **options))


def documents_of(out, vocabulary, split="train"):
    """Return the decoded examples of a folder of shards."""
    tokenizer = load_tokenizer(vocabulary)
    found = []
    for row in rows_of(out, split):
        start = 0
        for a, b in row["segment_lengths"].reshape(-1, 2).tolist():
            ids = row["input_ids"][start : start + a + b].tolist()
            found.append(tokenizer.decode(ids, skip_special_tokens=True))
            start += a + b
    return found


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
    summary = run(sources, tmp_path / "out", vocabulary, workers=2, val_fraction=0.1)
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
    run(Sources.of(str(tmp_path / "b.jsonl")), tmp_path / "out", vocabulary, val_fraction=0.3)
    train, val = (set(documents_of(tmp_path / "out", vocabulary, split)) for split in ("train", "val"))
    assert train
    assert val
    assert not train & val


def test_a_wrong_expression_is_said(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("word1")
    with pytest.raises(UserError, match=r"--drop-lines '\(a': not a regular expression"):
        run(Sources.of(str(tmp_path / "a.txt"), drop_lines=["(a"]), tmp_path / "out", vocabulary)


def test_lines_that_are_dropped(tmp_path, vocabulary):
    (tmp_path / "a.txt").write_text("word1 word2\nCookie notice: word3\nword4 1234567\n\nword5\n\ncookie word6")
    sources = Sources.of(str(tmp_path / "a.txt"), drop_lines=["(?i)cookie", r"\d{5}"])
    summary = run(sources, tmp_path / "out", vocabulary)
    assert documents_of(tmp_path / "out", vocabulary) == ["word1 word2", "word5"]
    assert summary.text.dropped_lines == 3
    assert summary.total.documents == 2


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


# Unreadable files.


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A folder of three files, the middle one truncated; small parts."""
    monkeypatch.setattr(source_parts, "MIN_PART", 2000)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "c"):
        write_source(folder / f"{name}.jsonl", 50, "word1", seed=ord(name))
    rng = random.Random(0)
    texts = ["word2 " + " ".join(rng.choices(WORDS, k=30)) for _ in range(12_000)]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts))[:-20_000])
    return folder


def test_a_damaged_file_in_a_folder_is_named(damaged, tmp_path, vocabulary):
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: cannot be read as \.jsonl: Truncated"):
        run(Sources.of(str(damaged)), tmp_path / "out", vocabulary)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_left_out_on_request(damaged, tmp_path, vocabulary):
    sources = Sources.of(str(damaged), skip_unreadable=True)
    summary = run(sources, tmp_path / "out", vocabulary)
    assert summary.text.unreadable_files == 1
    assert len(summary.unreadable) == 1
    assert "b.jsonl.gz: cannot be read" in summary.unreadable[0]
    first = [text.split()[0] for text in documents_of(tmp_path / "out", vocabulary)]
    assert first.count("word1") >= 100  # a long document has several examples, and only the first begins with word1
    assert 0 < summary.total.documents - 100 < 12_000
    (damaged / "b.jsonl.gz").unlink()
    (damaged / "d.jsonl").write_text('{"body": "no text here"}\n')  # a missing column is not a corrupt file
    with pytest.raises(UserError, match="no column 'text'"):
        run(Sources.of(str(damaged), skip_unreadable=True), tmp_path / "other", vocabulary)


def test_a_full_disk_loses_nothing(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setattr(source_parts, "MIN_PART", 3000)
    write_source(tmp_path / "a.jsonl", 300, "word1")
    sources, finish = Sources.of(str(tmp_path / "a.jsonl")), PartWriter.finish

    def full(self, record):
        if self._number >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "finish", full)  # also in the workers, which are forked from this process
        with pytest.raises(UserError, match=r"No space left on device; 3 finished part\(s\) are kept"):
            run(sources, tmp_path / "out", vocabulary)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial/unfinished").exists()
    assert run(sources, tmp_path / "out", vocabulary).continued_tokens > 0
    run(sources, tmp_path / "whole", vocabulary)
    assert_same_files(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("tokenizer", ["given", "train"])
def test_a_full_disk_while_the_tokenizer_is_saved(tmp_path, vocabulary, monkeypatch, tokenizer):
    """tokenizers raises an exception of its own for it."""
    write_source(tmp_path / "a.jsonl", 100, "word1")
    sources = Sources.of(str(tmp_path / "a.jsonl"))
    options = (vocabulary, {}) if tokenizer == "given" else ("train", {"vocab_size": 300})

    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(UserError, match=r"cannot write the shards to .*: No space left on device"):
            run(sources, tmp_path / "out", options[0], **options[1])
    assert not (tmp_path / "out").exists()
    assert run(sources, tmp_path / "out", options[0], **options[1]).total.documents == 100


def test_a_full_disk_while_the_selection_is_saved(tmp_path, vocabulary, monkeypatch, capfd):
    write_source(tmp_path / "a.jsonl", 10, "word1")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("electra_composer.corpus.selection.write_file", full)
    with pytest.raises(UserError, match="No space left on device; nothing was kept"):
        run(Sources.of(str(tmp_path / "a.jsonl"), deduplicate=True), tmp_path / "out", vocabulary)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert capfd.readouterr().err == ""


def test_a_full_disk_of_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("word1 word2 " * 50)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("electra_composer.vocabulary.TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"folder for temporary files: No space left on device; .* set TMPDIR"):
        run(Sources.of(str(tmp_path / "a.txt")), tmp_path / "out", "train", vocab_size=100)


def test_a_worker_that_dies_is_told(tmp_path, vocabulary, monkeypatch):
    write_source(tmp_path / "a.jsonl", 30, "word1")
    monkeypatch.setattr(part_conversion, "convert_documents", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process ended abruptly"):
        run(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_worker_that_dies_while_it_counts_holds_nobody_up(tmp_path, vocabulary, monkeypatch):
    def die(size):
        engines._done.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    write_source(tmp_path / "a.jsonl", 30, "word1")
    monkeypatch.setattr(engines, "_add", die)
    with pytest.raises(UserError, match="a worker process ended abruptly"):
        run(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary)


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
    local = run(sources, tmp_path / "local", vocabulary, workers=2, val_fraction=0.05)
    spark = run(sources, tmp_path / "spark", vocabulary, engine="spark", master="local[2]", val_fraction=0.05)
    assert local.text.duplicate_documents >= 1
    assert len(os.listdir(tmp_path / "local/train")) > 3
    assert spark.total == local.total
    assert_same_files(tmp_path / "local", tmp_path / "spark")
    # An error in a Spark worker is one line too.
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"^.*bad.jsonl, line 1: 'text' is a int; expected text$"):
        run(Sources.of(str(tmp_path / "bad.jsonl")), tmp_path / "bad", vocabulary, engine="spark", master="local[2]")
    assert not (tmp_path / "bad").exists()
    __import__("pyspark").SparkContext.getOrCreate().stop()


def test_spark_that_is_not_there(tmp_path, vocabulary, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyspark", None)
    write_source(tmp_path / "a.jsonl", 3, "word1")
    with pytest.raises(UserError, match=r"pip install 'electra-composer\[spark\]'"):
        run(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary, engine="spark")
