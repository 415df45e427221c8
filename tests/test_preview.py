"""The preview shows the counts of the shards and the correct mark at every token."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import read_meta
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main as pretrain
from electra_composer.preview import (
    Token,
    describe_conversion,
    describe_meta,
    describe_vocabulary,
    example_lengths,
    histogram,
    main,
    render,
)
from electra_composer.reports.tokens import LEGENDS
from electra_composer.storage.shard_folder import SourceCounts
from electra_composer.vocabulary import load_tokenizer


@pytest.fixture
def reader(shards):
    return reader_of_split(str(shards), "train")


def test_lengths_are_those_of_all_examples(shards, reader):
    meta = read_meta(str(shards))
    lengths = example_lengths(reader.read(np.arange(meta.splits["train"].rows)))
    assert len(lengths) == meta.splits["train"].examples
    assert lengths.sum() == meta.splits["train"].tokens
    text = histogram(np.array([1, 3, 3, 4, 24]), 24)
    assert "5 examples: mean 7.0, median 3" in text
    shares = [float(share) for share in re.findall(r"([\d.]+)%", text)]
    assert shares == [20.0, 60.0, *[0.0] * 9, 20.0]


def test_how_well_the_vocabulary_fits(shards):
    meta = read_meta(str(shards))
    tokenizer = load_tokenizer(meta.tokenizer_folder)
    entries = tokenizer.get_vocab()
    first = [index for token, index in entries.items() if index > 4 and not token.startswith("##")][:3]
    inside = [index for token, index in entries.items() if token.startswith("##")][:2]
    ids = np.array([2, *first, *inside, first[0], 1, 3, 3, 0])  # four words, one of them split, and an unknown one
    line = describe_vocabulary(ids, tokenizer, meta)
    assert "14.29% of the tokens are unknown, 1.40 pieces a word" in line
    assert f"5 of {len(entries)} entries occur" in line


def test_a_line_for_each_segment_of_each_example():
    tokens = [Token("un", 0, 1), Token("##do", 0, 1), Token("it", 1, 1), Token("now", 0, 2)]
    assert [line.split() for line in render(tokens, color=False)] == [
        ["1", "A", "undo"],
        ["B", "it"],
        ["2", "A", "now"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["electra", "all_tokens_mlm"])
def test_with_a_checkpoint(shards, tiny_yaml, tmp_path, capsys, kind):
    settings = [
        f"objective.kind={kind}",
        "trainer.max_duration=2ba",
        "schedule.warmup=1ba",
        "trainer.eval_interval=2ba",
    ]
    pretrain(load_config(str(tiny_yaml), settings, PretrainConfig))
    capsys.readouterr()
    arguments = [str(shards), "--rows", "2", "--checkpoint", str(tmp_path / "run"), "--color", "never"]
    main(arguments)
    text = capsys.readouterr().out
    assert re.search(r"\[\w+→[\w#\[\]✓⇒]+\]", text)
    assert text.endswith(f"\n\n{LEGENDS[kind]}\n")
    assert "\x1b" not in text
    main(arguments)
    assert capsys.readouterr().out == text  # the same seed gives the same output
    assert torch.is_grad_enabled()
    main([*arguments[:-1], "always"])
    colored = capsys.readouterr().out
    assert re.sub(r"\x1b\[\d+m", "", colored) == text != colored


def test_bad_input(shards, tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(shards), "--split", "test"], "no rows in split 'test'"),
        ([str(shards), "--checkpoint", str(tmp_path / "no.pt")], "no such file or folder; expected a checkpoint"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_conversion_in_readable_lines(shards):
    meta = read_meta(str(shards))
    source = {"path": "texts/a.txt", "name": None, "weight": 2.5, "dataset": "Skylion007/openwebtext", "config": None}
    hub = {"path": "hub", "name": None, "weight": 1.0, "dataset": "my/texts", "revision": "main", "later": 1}
    meta.conversion = {
        "sources": [source, hub],
        "min_characters": 3,
        "drop_lines": [],
        "deduplicate": True,
        "lines": "x",
    }
    meta.sources = {"texts/a.txt": SourceCounts(documents=1200, text_bytes=34000)}
    assert describe_conversion(meta) == [
        "source texts/a.txt: 1,200 documents, 34,000 bytes, weight 2.5",
        "source my/texts: revision main",
        "converted with deduplicate True, lines x, min_characters 3",
    ]
    assert "{" not in describe_meta(read_meta(str(shards)))
