"""Command-line conversions that are refused with a one-line error, or that end with warnings."""

from __future__ import annotations

import gzip
import os

import pytest
from converter import arguments, files_of, main


def test_warnings(corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b" ".join([b"word1 \xff"] * 400))
    options = ["--source", str(tmp_path / "a.txt"), "--val-fraction", "0.0001"]
    main([*arguments(corpus, tmp_path / "out"), *options][2:])
    printed = capsys.readouterr().err
    assert "of the tokens were dropped" in printed
    assert "--lines sentence and --overflow carry keep them" in printed
    assert "1 documents contain bytes that are not UTF-8" in printed
    assert "the val split is empty" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--tokenizer", "./nothing"], "tokenizer ./nothing: no such file or folder"),
        (["--out", "{corpus}"], "exists already; choose another --out, or pass --overwrite"),
        (["--out", "{corpus}", "--overwrite"], "is not a folder of shards"),
        (["--max-seq-length", "4"], "--max-seq-length is 4; expected 5 to 65535"),
        (["--val-fraction", "1"], "--val-fraction is 1.0; expected a fraction in [0, 1)"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--master", "local[2]"], "--master local[2] requires --engine spark"),
        (["--weight", "2", "--weight", "3"], "--weight was given 2 times for 1 sources"),
        (["--mixture", "mixture.yaml"], "--mixture cannot be combined with --source and --weight"),
        (["--drop-lines", "("], "not a regular expression"),
        (["--text-column", "body"], "no column 'body'; found 'id', 'text'"),
        (["--tokenizer", "train", "--vocab-size", "20"], "vocab_size is 20; this text needs at least"),
        (["--compression", "rar"], "--compression rar is not supported by Streaming"),
        (["--json", "{corpus}/no/such.json"], "no such folder"),
    ],
)
def test_one_line_and_exit_2(corpus, tmp_path, capsys, options, message):
    options = [option.format(corpus=corpus) for option in options]
    before = files_of(corpus)
    with pytest.raises(SystemExit) as exit_:
        main([*arguments(corpus, tmp_path / "out"), *options])
    printed = capsys.readouterr().err.strip().split("\n")
    assert exit_.value.code == 2
    assert len(printed) == 1
    assert printed[0].startswith("error: ")
    assert message in printed[0]
    assert os.listdir(tmp_path) == []
    assert files_of(corpus) == before


def test_a_source_cut_short_leaves_nothing(corpus, tmp_path, capsys):
    data = gzip.compress((corpus / "corpus.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-100])
    with pytest.raises(SystemExit):
        main([*arguments(corpus, tmp_path / "out"), "--source", str(tmp_path / "a.jsonl.gz")][2:])
    assert "a.jsonl.gz: cannot be read as .jsonl: Truncated compressed stream" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.jsonl.gz"]
