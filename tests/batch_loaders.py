"""Training loader of shards in an object store."""

from __future__ import annotations

from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.config import ShardsConfig

BUCKET = "corpus"


def loader_of(cache, remote, split="train", **changes):
    options = {"num_workers": 0, "download_attempts": 1, "download_timeout": 10.0, **changes}
    config = ShardsConfig(path=str(cache), max_seq_length=32, remote=remote, **options)
    return build_data_spec(config, split, 8, read_meta(str(cache), remote), seed=3).dataloader


def rows_of(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]
