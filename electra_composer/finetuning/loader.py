"""Batches of finetuning: pad, collate, split into microbatches, load."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from numpy.typing import NDArray
from torch import Tensor

from electra_composer.batches.background import BackgroundLoader
from electra_composer.batches.collation import split_batch
from electra_composer.batches.workers import WorkerLoader, loader_workers
from electra_composer.finetuning.data import EncodedExample, EncodedExamples
from electra_composer.finetuning.ranking import RankedExample, RankedExamples
from electra_composer.finetuning.sampler import LengthGroupedSampler

PAD_MULTIPLE = 8  # for tensor cores

BATCH_BYTES = 2**22
"""Memory kept for a batch that a worker process hands over: 200 rows of 512 tokens. Larger ones go the usual way."""

Encoded = EncodedExamples | RankedExamples


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
        pin_memory: whether the run's device is a GPU, which copies from pinned memory without waiting.
    """
    is_ranked = isinstance(examples, RankedExamples)
    kind: type[BackgroundLoader | WorkerLoader] = WorkerLoader
    if num_workers == "auto":
        kind, num_workers = BackgroundLoader, 0
    assert isinstance(num_workers, int)
    collation = functools.partial(collate_ranked if is_ranked else collate, pad_id=pad_id)
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


def collate(items: Sequence[EncodedExample], pad_id: int) -> dict[str, Any]:
    """Pad examples to the longest of the batch, rounded up to a multiple of 8.

    Returns:
        `input_ids`, `token_type_ids` (1: B and its `[SEP]`), `position_ids`, `sequence_ids` (1: token, 0: padding),
        int64 `[rows, length]`; `indices`, int64 `[rows]`: positions in the :class:`EncodedExamples`, used to restore
        the order of predictions; `labels [rows]`, int64 or fp32, absent for a test set; `num_tokens`, the number of
        tokens without padding, an int.
    """
    arrays, positions = _pad_rows([item.input_ids for item in items], pad_id)
    firsts = np.array([item.first_length for item in items])[:, None]
    arrays["token_type_ids"] = arrays["sequence_ids"] * (positions >= firsts)
    return _to_batch(arrays, items)


def collate_ranked(items: Sequence[RankedExample], pad_id: int) -> dict[str, Any]:
    """Concatenate the rows of all examples and pad them to the longest, rounded up to a multiple of 8.

    Returns:
        `input_ids`, `token_type_ids` (0), `position_ids`, `sequence_ids`, `candidates` (1: token of the candidate),
        int64 `[rows, length]`; `example_ids`, int64 `[rows]`: position in the batch of the row's example, ascending;
        `indices` and, except for a test set, `labels`, int64 `[examples]`; `num_tokens`, an int.
    """
    rows = [row for item in items for row in item.rows]
    arrays, positions = _pad_rows([row.input_ids for row in rows], pad_id)
    starts, ends = (np.array([getattr(row, name) for row in rows])[:, None] for name in ("start", "end"))
    arrays |= {
        "token_type_ids": np.zeros_like(arrays["input_ids"]),
        "candidates": ((positions >= starts) & (positions < ends)).astype(np.int64),
        "example_ids": np.repeat(np.arange(len(items)), [len(item.rows) for item in items]),
    }
    return _to_batch(arrays, items)


def _pad_rows(rows: Sequence[NDArray[np.int32]], pad_id: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Return `input_ids`, `position_ids` and `sequence_ids` of :func:`collate`, and 0, 1, 2, … as `[1, length]`."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    positions = np.arange(width)[None, :]
    is_token = positions < lengths[:, None]
    input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    input_ids[is_token] = np.concatenate(rows)
    # Padding is at position 0: rounding up must not exceed the position table.
    return {
        "input_ids": input_ids,
        "position_ids": positions * is_token,
        "sequence_ids": is_token.astype(np.int64),
    }, positions


def _to_batch(arrays: dict[str, NDArray[Any]], items: Sequence[EncodedExample | RankedExample]) -> dict[str, Any]:
    """Add `indices`, `labels` and `num_tokens`, and convert arrays to tensors."""
    arrays["indices"] = np.array([item.position for item in items], dtype=np.int64)
    if items[0].label is not None:
        arrays["labels"] = np.array([item.label for item in items])
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {**tensors, "num_tokens": int(arrays["sequence_ids"].sum())}


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
