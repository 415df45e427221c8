"""Loader benchmark: its output, and that it fails if the batches differ."""

from __future__ import annotations

import json

import dataloader as benchmark
import pytest

from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.config import ShardsConfig


def test_one_line(shards, capsys):
    arguments = [f"--data={shards}", "--workers", "auto", "1", "--batch=4", "--segment=3", "--repeats=2"]
    assert benchmark.main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line["results"]) == ["num_workers=auto", "num_workers=1"]
    for result in line["results"].values():
        assert result["same_batches"] == min(50, read_meta(str(shards)).splits["train"].rows // 4)
        assert result["ours_over_usual"] == pytest.approx(
            result["ours_tokens_per_second"] / result["usual_tokens_per_second"], abs=0.01
        )
    assert line["packing_alone_tokens_per_second"] > 0
    for epoch in line["shuffle"]:
        assert 0.1 < epoch["median_distance_share"] < 0.5


def test_other_batches_are_found(shards):
    config, meta = ShardsConfig(str(shards), 32, num_workers=0), read_meta(str(shards))
    options = {"shuffle": True, "drop_last": True}
    left, right = (build_dataloader(config, meta, "train", 4, seed=seed, **options) for seed in (0, 1))
    with pytest.raises(RuntimeError, match="batch 0"):
        benchmark.check_same_batches(left, right, 3)


def test_neighbours_stay_together_without_shuffling(shards, monkeypatch):
    config, meta = ShardsConfig(str(shards), 32, num_workers=0), read_meta(str(shards))
    build = benchmark.build_dataloader
    monkeypatch.setattr(benchmark, "build_dataloader", lambda *a, **k: build(*a, **{**k, "shuffle": False}))
    (epoch,) = benchmark.shuffle_quality(config, meta, 4, epochs=1)
    rows = meta.splits["train"].rows
    assert epoch["median_distance_share"] == pytest.approx(1 / rows, abs=1e-4)
    assert epoch["in_one_batch_share"] == pytest.approx(0.75, abs=0.05)
