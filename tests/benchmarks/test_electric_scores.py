"""The benchmark of scores changes held-out texts as it says, and counts how often the original scores higher."""

from __future__ import annotations

import itertools
import json

import electric_scores as benchmark
import numpy as np
import pytest

from electra_composer.batches.shards import read_meta
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main as pretrain
from electra_composer.vocabulary import load_tokenizer


def test_changes_keep_the_number_of_tokens():
    rng = np.random.default_rng(0)
    words = [[1], [2, 3], [1], [4], [5], [6, 7]]
    for _ in range(50):
        changed = benchmark.swapped(words, rng)
        assert sorted(changed) == sorted(words)
        assert sum(one != other for one, other in zip(words, changed, strict=True)) == 2
        changed = benchmark.replaced(words, [[8], [9, 10], [1]], rng)
        assert [len(word) for word in changed] == [len(word) for word in words]
        assert sum(one != other for one, other in zip(words, changed, strict=True)) == 1


def test_one_line(shards, tiny_yaml, tmp_path, capsys, monkeypatch):
    """With scores that fall with every pair of words that is not of the text's language."""
    settings = ["objective.kind=electric", "trainer.max_duration=1ba", "schedule.warmup=1ba"]
    pretrain(load_config(str(tiny_yaml), settings, PretrainConfig))
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(shards), "--sentences", "8"]
    capsys.readouterr()
    benchmark.main(arguments)
    line = json.loads(capsys.readouterr().out)
    assert (line["benchmark"], line["kind"], line["sentences"]) == ("electric_scores", "electric", 8)
    assert 0 <= line["swapped"]["original_higher"] <= 1

    entries = load_tokenizer(read_meta(str(shards)).tokenizer_folder)
    seen = [a + b for a in "bdfgklmnprst" for b in "aeiou"]  # each word determines the next

    def likelihoods(model, texts, batch_size):
        found = []
        for text in texts:
            words = entries.decode(text).split()
            pairs = itertools.pairwise(words)
            found.append([float(seen[(seen.index(one) + 1) % len(seen)] == other) for one, other in pairs])
        return found

    monkeypatch.setattr(benchmark, "pseudo_log_likelihoods", likelihoods)
    benchmark.main(arguments)
    line = json.loads(capsys.readouterr().out)
    assert line["swapped"]["original_higher"] == line["replaced"]["original_higher"] == 1.0
    assert line["swapped"]["standard_error"] == 0.0
    with pytest.raises(SystemExit):
        benchmark.main([*arguments[:-1], "100000"])
    assert "texts of 8 words in its held-out split; expected 100000" in capsys.readouterr().err
