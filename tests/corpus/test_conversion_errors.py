"""Command-line conversions that are refused with a one-line error, or that end with warnings."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest
from converter import arguments, files_of, main


def test_warnings(corpus, tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b" ".join([b"word1 \xff"] * 400))
    (tmp_path / "b.txt").write_text("word1")
    options = ["--source", str(tmp_path / "*.txt"), "--val-fraction", "0.0001"]
    main([*arguments(corpus, tmp_path / "out"), *options][2:])
    summary, printed = capsys.readouterr()
    assert re.search(r"dropped at the ends of segments: [\d,]+ tokens, [\d.]+% of all", summary)
    assert "of the tokens were dropped" in printed
    assert "--lines sentence and --overflow carry keep them" in printed
    assert "1 documents contain bytes that are not UTF-8" in printed
    assert "--val-fraction 0.0001 of 2 documents leaves the val split empty; it got one document" in printed


@pytest.mark.parametrize(("length", "dropped"), [(1300, True), (70, False)])
def test_dropped_tokens_are_said_and_from_5_percent_warned_of(corpus, tmp_path, capsys, length, dropped):
    lines = [" ".join(["word1"] * 50)] * 20 + [" ".join(["word2"] * length)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    options = ["--source", str(tmp_path / "a.txt"), "--val-fraction", "0"]
    share = main([*arguments(corpus, tmp_path / "out"), *options][2:]).dropped_share
    summary, printed = capsys.readouterr()
    assert (share > 0.05) == dropped
    assert f"tokens, {share:.2%} of all" in summary
    assert ("of the tokens were dropped" in printed) == dropped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--tokenizer", "./nothing"], "tokenizer ./nothing: no such file or folder"),
        (["--out", "{corpus}"], "exists already; choose another --out, or pass --overwrite"),
        (["--out", "{corpus}", "--overwrite"], "is not a folder of shards"),
        (["--max-seq-length", "4"], "argument --max-seq-length: is '4'; expected an integer from 5 to 65,535"),
        (["--val-fraction", "1"], "argument --val-fraction: is '1'; expected a number in [0, 1)"),
        (["--workers", "0"], "argument --workers: is '0'; expected an integer from 1 to 1,024"),
        (["--master", "local[2]"], "--master local[2] requires --engine spark"),
        (["--weight", "2", "--weight", "3"], "--weight was given 2 times for 1 sources"),
        (["--mixture", "mixture.yaml"], "--mixture cannot be combined with --source and --weight"),
        (["--drop-lines", "("], "not a regular expression"),
        (["--text-column", "body"], "no column 'body'; found 'id', 'text'"),
        (["--tokenizer", "train", "--vocab-size", "20"], "vocab_size is 20; this text needs at least"),
        (["--compression", "rar"], "--compression rar is not supported by Streaming"),
        (["--json", "{corpus}/no/such.json"], "no such folder"),
        (["--json", "{corpus}"], "cannot be written; choose another file"),
        (["--tokenizer", "no-such/name"], "--tokenizer train"),
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


def test_the_json_of_an_estimate_and_a_full_disk_of_it(corpus, tmp_path, capsys):
    estimate = main([*arguments(corpus, tmp_path / "out"), "--dry-run", "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == estimate.to_dict()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*arguments(corpus, tmp_path / "out"), "--json", "/dev/full"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith(
        f"error: --json /dev/full: No space left on device; the shards in {tmp_path}/out are complete\n"
    )
    assert (tmp_path / "out/meta.json").exists()
