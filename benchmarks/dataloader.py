"""Tokens/s of the loader compared with Streaming's standard loader; prints one JSON line.

    python benchmarks/dataloader.py --data data/reviews --workers 1 2

`usual` is `StreamingDataset` and `StreamingDataLoader`, one sample at a time, over the same shards with the same
collation. Both run in alternation and shuffle with the same seed; the program fails unless they give the same batches.
`shuffle` is the distance between rows that are neighbours in the corpus, for each epoch: the median as a fraction of
the epoch (0.293 for a uniformly random order), and the fraction of neighbours in the same batch.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import interleave, print_result
from streaming import StreamingDataLoader, StreamingDataset

from electra_composer.batches.collation import COLUMNS, Batch, collate_rows
from electra_composer.batches.row_reader import Rows, reader_of_split
from electra_composer.batches.shards import build_dataloader, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError, report_user_errors
from electra_composer.storage.shard_folder import Meta

SEED = 0


def usual_loader(config: ShardsConfig, meta: Meta, batch_size: int) -> StreamingDataLoader:
    """Build the loader of Streaming's documentation, with a collation that gives our batches."""
    dataset = StreamingDataset(
        local=config.path, split=config.train_split, batch_size=batch_size, shuffle=True, shuffle_seed=SEED
    )
    return StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=1 if config.num_workers == "auto" else config.num_workers,
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
    """Endless batches of a loader, epoch after epoch."""

    def __init__(self, loader: Any) -> None:
        self._batches = self._endless(loader)
        self.tokens = 0

    def _endless(self, loader: Any) -> Iterator[Batch]:
        while True:
            yield from loader

    def take(self, batches: int) -> None:
        """Read `batches` batches and count their tokens."""
        for _ in range(batches):
            self.tokens += next(self._batches)["num_tokens"]


def check_same_batches(left: Any, right: Any, batches: int) -> int:
    """Compare the first batches of two loaders.

    Returns:
        The number of batches compared.

    Raises:
        RuntimeError: they differ.
    """
    compared = 0
    for compared, (a, b) in enumerate(itertools.islice(zip(left, right, strict=False), batches), 1):
        if any(not torch.equal(a[name], b[name]) for name in COLUMNS):
            raise RuntimeError(f"batch {compared - 1} of our loader differs from Streaming's")
    return compared


def shuffle_quality(config: ShardsConfig, meta: Meta, batch_size: int, epochs: int) -> list[dict[str, float]]:
    """Return the distances between rows that are neighbours in the corpus, epoch by epoch."""
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


def packing_alone(config: ShardsConfig, meta: Meta, batch_size: int) -> float:
    """Return tokens/s of reading and packing the batches of an epoch in this thread, which does nothing else."""
    loader = build_dataloader(config, meta, config.train_split, batch_size, shuffle=True, drop_last=True, seed=SEED)
    if not loader.background:
        raise UserError(f"--data {config.path}: compressed; convert without --compression")
    speeds = []
    for _ in range(4):
        start = time.perf_counter()
        tokens = sum(batch["num_tokens"] for batch in loader.batches())
        speeds.append(tokens / (time.perf_counter() - start))
    return statistics.median(speeds[1:])  # the first opens the shards


def reading_alone(config: ShardsConfig, rows: int) -> float:
    """Return tokens/s of reading and decoding blocks of rows in order, in this process, without packing."""
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
    parser.add_argument(
        "--workers", nargs="+", default=["auto", "1", "2"], help="values of data.num_workers; Streaming's: 1 for auto"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--segment", type=int, default=500, help="batches per timed call")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    meta = read_meta(options.data)
    rows = meta.splits["train"].rows
    numbers = [int(workers) for workers in options.workers if workers != "auto"]
    if min(numbers, default=1) < 1 or rows < options.batch * 2 * max(numbers, default=1):
        raise UserError(
            f"--data {options.data}: {rows} rows are too few for --batch {options.batch}, or --workers is below 1"
        )
    results = {}
    for name in options.workers:
        workers = name if name == "auto" else int(name)
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
        results[f"num_workers={workers}"] = {
            **{f"{name}_tokens_per_second": round(value) for name, value in speed.items()},
            "ours_over_usual": round(speed["ours"] / speed["usual"], 2),
            "same_batches": compared,
        }
        del streams, loaders
    config = ShardsConfig(options.data, meta.max_seq_length, num_workers=0)
    in_thread = replace(config, num_workers="auto")
    print_result(
        "dataloader",
        **vars(options),
        max_seq_length=meta.max_seq_length,
        results=results,
        packing_alone_tokens_per_second=round(packing_alone(in_thread, meta, options.batch)),
        reading_alone_tokens_per_second=round(reading_alone(config, rows)),
        shuffle=shuffle_quality(config, meta, options.batch, epochs=3),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
