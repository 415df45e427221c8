"""Shards in object stores and subfolders, and their training loader."""

from __future__ import annotations

import json

from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.config import ShardsConfig

BUCKET = "corpus"


def loader_of(cache, remote, split="train", **changes):
    options = {"num_workers": 0, "download_attempts": 1, "download_timeout": 10.0, **changes}
    config = ShardsConfig(path=str(cache), max_seq_length=32, remote=remote, **options)
    return build_data_spec(config, split, 8, read_meta(str(cache), remote), seed=3).dataloader


def rows_of(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def upload(s3, folder):
    """Upload a folder of shards and return its URL."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, f"owt/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/owt"


def move_to_subfolders(split, shards_per_folder):
    """Move the shards of a split to subfolders from 00003, as the converter writes them, with one index for all."""
    index = json.loads((split / "index.json").read_text())
    for number, shard in enumerate(index["shards"]):
        name = f"{3 + number // shards_per_folder:05}/shard.{number % shards_per_folder:05}.mds"
        (split / name).parent.mkdir(exist_ok=True)
        (split / shard["raw_data"]["basename"]).rename(split / name)
        shard["raw_data"]["basename"] = name
    (split / "index.json").write_text(json.dumps(index))
