"""Conversion benchmark: its output, and that it fails if a variant loses text."""

from __future__ import annotations

import json

import convert as benchmark
import pytest


@pytest.fixture
def options(tmp_path):
    words = [f"word{number}" for number in range(50)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    texts = [" ".join(words[(start * 7 + i) % 50] for i in range(60)) + "." for start in range(300)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    return [f"--source={tmp_path / 'text.txt'}", f"--tokenizer={tmp_path / 'vocab.txt'}", "--repeats=1", "--workers=1"]


def test_one_line(options, capsys):
    assert benchmark.main(options) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = line["megabytes_per_second"]
    assert set(speed) == {"usual", "ours", "tokenizer"}
    assert line["ours_over_usual"] == pytest.approx(speed["ours"] / speed["usual"], rel=0.05)
    assert line["tokens"] > 300 * 61


def test_lost_text_is_found(options, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "tokenizer_alone", lambda *_: 17)
    assert benchmark.main(options) == 1
    assert "not the same text" in capsys.readouterr().err
