"""Tokens/s that the loader gives, against Streaming's usual one sample at a time, in turns; prints one JSON line.

    python benchmarks/dataloader.py --data data/reviews --workers 1 2

`usual` is `StreamingDataset` and `StreamingDataLoader` over the same shards with the same collation. Both shuffle with
the same seed, and the program fails unless they give the same batches. `shuffle` says how far neighbours of the corpus
end up apart in each epoch: the median distance as a share of the epoch (0.293 where every order is as likely), and how
many are in one batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import describe, interleave
from streaming import StreamingDataLoader, StreamingDataset

from electra_composer.batches.collation import COLUMNS, Batch, collate_rows
from electra_composer.batches.row_reader import Rows, reader_of_split
from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError, report_user_errors
from electra_composer.storage.shard_folder import Meta

SEED = 0


def usual_loader(config: ShardsConfig, meta: Meta, batch_size: int) -> StreamingDataLoader:
    """What Streaming's documentation shows, with a collation that makes our batches."""
    dataset = StreamingDataset(
        local=config.path, split=config.train_split, batch_size=batch_size, shuffle=True, shuffle_seed=SEED
    )
    return StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        persistent_workers=True,
        drop_last=True,
        collate_fn=partial(_collate, max_seq_length=meta.max_seq_length, pad_id=meta.tokenizer.special_ids["pad"]),
    )


def _collate(samples: Sequence[dict[str, Any]], max_seq_length: int, pad_id: int) -> Batch:
    ids, segments = [row["input_ids"] for row in samples], [row["segment_lengths"] for row in samples]
    rows = Rows(
        np.concatenate(ids),
        np.array([len(row) for row in ids]),
        np.concatenate(segments),
        np.array([len(lengths) // 2 for lengths in segments]),
    )
    packed = torch.from_numpy(collate_rows(rows, max_seq_length, pad_id))
    return {**dict(zip(COLUMNS, packed, strict=True)), "num_tokens": len(rows.input_ids)}


class Stream:
    """Epoch after epoch of a loader, some batches at a time."""

    def __init__(self, loader: Any) -> None:
        self._batches = self._endless(loader)
        self.tokens = 0

    def _endless(self, loader: Any) -> Iterator[Batch]:
        while True:
            yield from loader

    def take(self, batches: int) -> None:
        """Read so many batches, and count their tokens."""
        for _ in range(batches):
            self.tokens += next(self._batches)["num_tokens"]


def check_same_batches(left: Any, right: Any, batches: int) -> int:
    """Compare the first batches of two loaders.

    Raises:
        RuntimeError: they differ.
    """
    compared = 0
    for a, b in zip(left, right, strict=False):
        if any(not torch.equal(a[name], b[name]) for name in COLUMNS):
            raise RuntimeError(f"batch {compared} of our loader is not that of Streaming's")
        compared += 1
        if compared == batches:
            break
    return compared


def shuffle_quality(config: ShardsConfig, meta: Meta, batch_size: int, epochs: int) -> list[dict[str, float]]:
    """Where neighbours of the corpus go, epoch by epoch."""
    loader = build_dataloader(config, meta, config.train_split, batch_size, shuffle=True, drop_last=False, seed=SEED)
    result = []
    for epoch in range(epochs):
        order = np.fromiter(iter(loader.dataset), np.int64)  # type: ignore[arg-type]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        apart = np.abs(np.diff(place))
        result.append(
            {
                "epoch": epoch,
                "median_distance_share": round(float(np.median(apart) / len(order)), 4),
                "in_one_batch_share": round(float((place[1:] // batch_size == place[:-1] // batch_size).mean()), 6),
            }
        )
    return result


def reading_alone(config: ShardsConfig, rows: int) -> float:
    """Tokens/s of reading and decoding blocks of rows in their order, in this process, without batches of a loader."""
    reader = reader_of_split(config.path, config.train_split)
    if reader is None:
        raise UserError(f"--data {config.path}: compressed; convert without --compression")
    tokens = 0
    start = time.perf_counter()
    for first in range(0, rows - rows % 1024, 1024):
        tokens += len(reader.read(np.arange(first, first + 1024)).input_ids)
    return tokens / (time.perf_counter() - start)


@report_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of shards")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--segment", type=int, default=500, help="batches of each timed call")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    meta = read_meta(options.data)
    rows = meta.splits["train"].rows
    if min(options.workers) < 1 or rows < options.batch * 2 * max(options.workers):
        raise UserError(
            f"--data {options.data}: {rows} rows are too few for --batch {options.batch}, or --workers below 1"
        )
    results = {}
    for workers in options.workers:
        config = ShardsConfig(options.data, meta.max_seq_length, num_workers=workers)
        loaders = {
            "usual": usual_loader(config, meta, options.batch),
            "ours": build_dataloader(config, meta, "train", options.batch, shuffle=True, drop_last=True, seed=SEED),
        }
        compared = check_same_batches(loaders["usual"], loaders["ours"], 50)
        streams = {name: Stream(loader) for name, loader in loaders.items()}
        seconds = interleave(
            {name: partial(stream.take, options.segment) for name, stream in streams.items()},
            options.repeats,
            warmup=1,
            device="cpu",
        )
        calls = options.repeats + 1
        speed = {name: streams[name].tokens / calls / statistics.median(taken) for name, taken in seconds.items()}
        results[f"{workers} worker{'s' if workers > 1 else ''}"] = {
            **{f"{name}_tokens_per_second": round(value) for name, value in speed.items()},
            "ours_over_usual": round(speed["ours"] / speed["usual"], 2),
            "same_batches": compared,
        }
        del streams, loaders
    config = ShardsConfig(options.data, meta.max_seq_length, num_workers=0)
    print(
        json.dumps(
            {
                "benchmark": "dataloader",
                **vars(options),
                "max_seq_length": meta.max_seq_length,
                "results": results,
                "reading_alone_tokens_per_second": round(reading_alone(config, rows)),
                "shuffle": shuffle_quality(config, meta, options.batch, epochs=3),
                "machine": describe(),
            }
        ),
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
