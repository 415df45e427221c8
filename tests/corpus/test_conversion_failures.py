"""Failures around a conversion: damaged files, full disks, workers that die."""

from __future__ import annotations

import errno
import gzip
import os
import random
import signal

import pytest
from converter import WORDS, assert_same_files, convert_sources, documents_of, jsonl, write_source
from transformers import PreTrainedTokenizerFast

from electra_composer.corpus import engines, part_conversion, source_parts
from electra_composer.corpus.part_writer import PartWriter
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError


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
        convert_sources(Sources.of(str(damaged)), tmp_path / "out", vocabulary)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_left_out_on_request(damaged, tmp_path, vocabulary):
    sources = Sources.of(str(damaged), skip_unreadable=True)
    summary = convert_sources(sources, tmp_path / "out", vocabulary)
    assert summary.text.unreadable_files == 1
    assert len(summary.unreadable) == 1
    assert "b.jsonl.gz: cannot be read" in summary.unreadable[0]
    first = [text.split()[0] for text in documents_of(tmp_path / "out", vocabulary)]
    assert first.count("word1") >= 100  # a long document has several examples, and only the first begins with word1
    assert 0 < summary.total.documents - 100 < 12_000
    (damaged / "b.jsonl.gz").unlink()
    (damaged / "d.jsonl").write_text('{"body": "no text here"}\n')  # a missing column is not a corrupt file
    with pytest.raises(UserError, match="no column 'text'"):
        convert_sources(Sources.of(str(damaged), skip_unreadable=True), tmp_path / "other", vocabulary)


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
            convert_sources(sources, tmp_path / "out", vocabulary)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial/unfinished").exists()
    assert convert_sources(sources, tmp_path / "out", vocabulary).continued_tokens > 0
    convert_sources(sources, tmp_path / "whole", vocabulary)
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
            convert_sources(sources, tmp_path / "out", options[0], **options[1])
    assert not (tmp_path / "out").exists()
    assert convert_sources(sources, tmp_path / "out", options[0], **options[1]).total.documents == 100


def test_a_full_disk_while_the_selection_is_saved(tmp_path, vocabulary, monkeypatch, capfd):
    write_source(tmp_path / "a.jsonl", 10, "word1")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("electra_composer.corpus.selection.write_file", full)
    with pytest.raises(UserError, match="No space left on device; nothing was kept"):
        convert_sources(Sources.of(str(tmp_path / "a.jsonl"), deduplicate=True), tmp_path / "out", vocabulary)
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert capfd.readouterr().err == ""


def test_a_full_disk_of_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("word1 word2 " * 50)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("electra_composer.vocabulary.TemporaryDirectory", full)
    with pytest.raises(UserError, match=r"folder for temporary files: No space left on device; .* set TMPDIR"):
        convert_sources(Sources.of(str(tmp_path / "a.txt")), tmp_path / "out", "train", vocab_size=100)


def test_a_worker_that_dies_is_told(tmp_path, vocabulary, monkeypatch):
    write_source(tmp_path / "a.jsonl", 30, "word1")
    monkeypatch.setattr(part_conversion, "convert_documents", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process ended abruptly"):
        convert_sources(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_worker_that_dies_while_it_counts_holds_nobody_up(tmp_path, vocabulary, monkeypatch):
    def die(size):
        engines._done.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    write_source(tmp_path / "a.jsonl", 30, "word1")
    monkeypatch.setattr(engines, "_add", die)
    with pytest.raises(UserError, match="a worker process ended abruptly"):
        convert_sources(Sources.of(str(tmp_path / "a.jsonl")), tmp_path / "out", vocabulary)
