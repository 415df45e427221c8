"""Batches of finetuning: pad, collate, split into microbatches, load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from torch import Tensor

from electra_composer.batches.background import BackgroundLoader
from electra_composer.batches.collation import split_batch
from electra_composer.batches.workers import WorkerLoader, loader_workers
from electra_composer.finetuning.ranking import RankedExample, RankedExamples
from electra_composer.finetuning.sampler import LengthGroupedSampler
from electra_composer.tasks.encoded import PAD_MULTIPLE, EncodedRows, collate, pad_rows, to_batch

BATCH_BYTES = 2**22
"""Memory kept for a batch that a worker process hands over: 200 rows of 512 tokens. Larger ones go the usual way."""

Encoded = EncodedRows | RankedExamples


def build_loader(
    examples: Encoded,
    pad_id: int,
    device_batch_size: int,
    num_workers: int | str,
    shuffle_seed: int | None,
    pin_memory: bool = False,
) -> DataSpec:
    """Build the loader of this rank's share of the examples.

    The sampler repeats examples to give every rank equally many. Composer drops the repeats before it updates a
    metric, so evaluation counts every example once on any number of ranks.

    Args:
        device_batch_size: examples per batch on this device; ranked examples bring all of their rows.
        num_workers: loader processes; `auto`: a thread of this process.
        shuffle_seed: seed of the order, which changes every epoch; None sorts from the longest to the shortest example.
        pin_memory: whether the run's device is a GPU, which copies from pinned memory without waiting, and multiplies
            faster if the length of a batch is a multiple of 8.
    """
    is_ranked = isinstance(examples, RankedExamples)
    kind: type[BackgroundLoader | WorkerLoader] = WorkerLoader
    if num_workers == "auto":
        kind, num_workers = BackgroundLoader, 0
    assert isinstance(num_workers, int)
    multiple = PAD_MULTIPLE if pin_memory else 1
    collation = functools.partial(collate_ranked if is_ranked else collate, pad_id=pad_id, multiple=multiple)
    loader = kind(
        examples,
        batch_size=device_batch_size,
        sampler=LengthGroupedSampler(examples, examples.lengths, device_batch_size, shuffle_seed),
        pin_memory=pin_memory,
        **loader_workers(num_workers, collation, BATCH_BYTES),
    )
    return DataSpec(
        loader,
        split_batch=split_ranked if is_ranked else split_batch,
        get_num_samples_in_batch=lambda batch: len(batch["indices"]),
        get_num_tokens_in_batch=lambda batch: batch["num_tokens"],
    )


def collate_ranked(items: Sequence[RankedExample], pad_id: int, multiple: int = PAD_MULTIPLE) -> dict[str, Any]:
    """Concatenate the rows of all examples and pad them to the longest, rounded up to a multiple of `multiple`.

    Returns:
        `input_ids`, `token_type_ids` (0), `position_ids`, `sequence_ids`, `candidates` (1: token of the candidate),
        int64 `[rows, length]`; `example_ids`, int64 `[rows]`: position in the batch of the row's example, ascending;
        `indices` and, except for a test set, `labels`, int64 `[examples]`; `num_tokens`, an int.
    """
    rows = [row for item in items for row in item.rows]
    arrays, positions = pad_rows([row.input_ids for row in rows], pad_id, multiple)
    starts, ends = (np.array([getattr(row, name) for row in rows])[:, None] for name in ("start", "end"))
    arrays |= {
        "token_type_ids": np.zeros_like(arrays["input_ids"]),
        "candidates": ((positions >= starts) & (positions < ends)).astype(np.int64),
        "example_ids": np.repeat(np.arange(len(items)), [len(item.rows) for item in items]),
    }
    if items[0].label is not None:
        arrays["labels"] = np.array([item.label for item in items])
    return to_batch(arrays, [item.position for item in items])


def split_ranked(batch: dict[str, Any], examples: int) -> list[dict[str, Any]]:
    """Split a batch into microbatches of at most `examples` examples, each with all of its rows: views of the batch."""
    parts, ids = [], batch["example_ids"]
    for start in range(0, len(batch["indices"]), examples):
        first, end = torch.searchsorted(ids, ids.new_tensor([start, start + examples])).tolist()
        part = {
            name: value[start : start + examples] if name in ("indices", "labels") else value[first:end]
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        parts.append({**part, "example_ids": part["example_ids"] - start, "num_tokens": batch["num_tokens"]})
    return parts
