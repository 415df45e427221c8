"""The MLM loss without context, compared with closed forms and with a model that ignores context."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from electra_composer.batches.baselines import (
    loss_without_context,
    mlm_loss_without_context,
    unigram_counts,
    unigram_entropy,
)
from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.config import ObjectiveConfig, ShardsConfig
from electra_composer.errors import UserError
from electra_composer.model.masking import mask_tokens


def test_entropy_in_closed_form():
    assert unigram_entropy(np.array([0, 5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([3, 1])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_counts_are_those_of_the_loader(shards):
    config, meta = ShardsConfig(path=str(shards), max_seq_length=32, num_workers=0), read_meta(str(shards))
    loader = build_dataloader(config, meta, "train", 8, shuffle=False, drop_last=False, seed=0)
    expected = np.zeros(meta.tokenizer.vocab_size, np.int64)
    for batch in loader:
        expected += np.bincount(batch["input_ids"].flatten().numpy(), minlength=len(expected))
    expected[[meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep")]] = 0
    assert (unigram_counts(config, meta, "train") == expected).all()
    fewer = unigram_counts(config, meta, "train", max_rows=5)
    assert 0 < fewer.sum() < expected.sum()


def test_a_damaged_shard_is_said_to_be(shards, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    shard = folder / "train/00000/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:200] + b"\xff" * (shard.stat().st_size - 200))
    config = ShardsConfig(path=str(folder), max_seq_length=32, num_workers=0)
    with pytest.raises(UserError, match="corrupt"):
        unigram_counts(config, read_meta(str(folder)), "train")


def test_shards_that_are_elsewhere_have_none_yet(shards):
    config = ShardsConfig(path=str(shards), max_seq_length=32, num_workers=0, remote="s3://bucket/shards")
    assert loss_without_context(config, read_meta(str(shards)), ObjectiveConfig()) is None


def losses_without_context(ids, shares, style):
    mask, vocab = 4, len(shares)
    noise = torch.rand(2, *ids.shape)
    seen = mask_tokens(ids, torch.ones(ids.shape), style, mask, vocab, noise[0], noise[1])
    kept = 1.0 if style == "electra" else 0.5  # probability that a visible word is the original
    probability = torch.where(seen == mask, shares[ids], (1 - kept) * shares[ids] + kept * (seen == ids))
    return -probability.log()


@pytest.mark.parametrize("style", ["electra", "bert"])
def test_loss_is_what_a_model_without_context_pays(style):
    """Masked by `mask_tokens`; predicted by copying visible words and by word frequencies elsewhere."""
    vocab, first = 50, 5
    shares = torch.arange(1, vocab - first + 1, dtype=torch.float64)
    shares = torch.cat([torch.zeros(first, dtype=torch.float64), shares / shares.sum()])
    torch.manual_seed(0)
    ids = torch.multinomial(shares, 400_000, replacement=True).reshape(-1, 100)
    losses = losses_without_context(ids, shares, style)
    expected = mlm_loss_without_context(
        unigram_entropy((shares * 1e9).round().long().numpy()), ObjectiveConfig(mask_style=style)
    )
    # Visible words that are frequent are predicted slightly better than the closed form says.
    assert losses.mean().item() == pytest.approx(expected, rel=0.02)


def test_shards_of_which_some_are_still_compressed_have_none_yet(shards, tmp_path):
    """A run decompresses shards one by one, and may be restarted before all are decompressed."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    (folder / "train/00000/shard.00000.mds").rename(folder / "train/00000/shard.00000.mds.zstd")
    config = ShardsConfig(path=str(folder), max_seq_length=32, num_workers=0)
    assert unigram_counts(config, read_meta(str(folder)), "train") is None
