"""Small folders of shards to be mixed as streams."""

from __future__ import annotations

import numpy as np
from small_shards import LENGTH
from streaming import MDSWriter

from electra_composer.batches.shards import build_dataloader, read_data
from electra_composer.config import ShardsConfig, StreamConfig
from electra_composer.storage.shard_folder import Meta, SplitCounts, describe_tokenizer

ROWS = {"a": 60, "b": 25, "c": 10}
VAL = {"a": 5, "b": 3, "c": 0}


def write_stream(out, tokenizer, stream, length=LENGTH, dtype="uint16"):
    """Write rows `[CLS] stream number … [SEP]` of 4 tokens in stream a, 5 in b, 6 in c."""
    index = list(ROWS).index(stream)
    counts = {}
    columns = {"input_ids": f"ndarray:{dtype}", "segment_lengths": "ndarray:uint16"}
    for split, rows in (("train", ROWS[stream]), ("val", VAL[stream])):
        with MDSWriter(columns=columns, out=str(out / split), hashes=["xxh64"]) as writer:
            for number in range(rows):
                ids = np.array([2, 5 + index, 10 + number, *[9] * index, 3], dtype)
                writer.write({"input_ids": ids, "segment_lengths": np.array([len(ids), 0], np.uint16)})
        counts[split] = SplitCounts(rows, rows, rows, rows * (4 + index))
    tokenizer.save_pretrained(out / "tokenizer")
    meta = Meta(describe_tokenizer(tokenizer, "words"), length, "packed", 0, {}, counts)
    (out / "meta.json").write_text(meta.to_json())


def config(folders, weights, **changes):
    streams = {name: StreamConfig(path=str(folders / name), **weight) for name, weight in weights.items()}
    return ShardsConfig(path="", max_seq_length=LENGTH, **{"num_workers": 0, "streams": streams, **changes})


def loader_of(options, batch_size=8, seed=3, **changes):
    settings = {"shuffle": True, "drop_last": True, **changes}
    return build_dataloader(options, read_data(options), "train", batch_size, seed=seed, **settings)
