"""Tokenized examples of any task, and their batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

PAD_MULTIPLE = 8  # of the length of a batch, for tensor cores; a CPU needs no padding beyond the longest row
IGNORED = -100  # label of tokens without one; the default `ignore_index` of torch's cross-entropy


class EncodedRow(NamedTuple):
    """One row of :class:`EncodedRows`; `position` is its index there."""

    input_ids: NDArray[np.int32]
    first_length: int
    position: int
    per_row: Mapping[str, Any]
    per_token: Mapping[str, NDArray[Any]]


@dataclass
class EncodedRows(Dataset):
    """Tokenized rows, unpadded and concatenated: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

    An example is one row or, if it is longer than the window, several.

    Attributes:
        tokens: int32 `[all tokens]`.
        offsets: int64 `[rows + 1]`: row i is `tokens[offsets[i]:offsets[i + 1]]`.
        first_lengths: int64 `[rows]`: number of tokens of type 0: `[CLS]`, A and its `[SEP]`.
        per_row: arrays `[rows, …]` that become part of the batch, such as `labels`.
        per_token: arrays `[all tokens]` that become part of the batch, padded with :data:`IGNORED`.
        source: what the task needs to score and to describe the examples.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    first_lengths: NDArray[np.int64]
    per_row: dict[str, NDArray[Any]] = field(default_factory=dict)
    per_token: dict[str, NDArray[Any]] = field(default_factory=dict)
    source: Any = None

    def __len__(self) -> int:
        return len(self.first_lengths)

    def __getitem__(self, index: int) -> EncodedRow:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return EncodedRow(
            self.tokens[part],
            self.first_lengths[index],
            index,
            {name: values[index] for name, values in self.per_row.items()},
            {name: values[part] for name, values in self.per_token.items()},
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each row, int64 `[rows]`."""
        return np.diff(self.offsets)


def collate(items: Sequence[EncodedRow], pad_id: int, multiple: int = PAD_MULTIPLE) -> dict[str, Any]:
    """Pad rows to the longest of the batch, rounded up to a multiple of `multiple`.

    Returns:
        `input_ids`, `token_type_ids` (1: B and its `[SEP]`), `position_ids`, `sequence_ids` (1: token, 0: padding),
        int64 `[rows, length]`; `indices`, int64 `[rows]`: positions in the :class:`EncodedRows`, used to restore the
        order of predictions; those of `per_row` and `per_token`; `num_tokens`, the number of tokens without padding,
        an int.
    """
    arrays, positions = pad_rows([item.input_ids for item in items], pad_id, multiple)
    firsts = np.array([item.first_length for item in items])[:, None]
    arrays["token_type_ids"] = arrays["sequence_ids"] * (positions >= firsts)
    is_token = arrays["sequence_ids"] == 1
    for name in items[0].per_token:
        parts = np.concatenate([item.per_token[name] for item in items])
        arrays[name] = np.full(is_token.shape, IGNORED, dtype=np.int64)
        arrays[name][is_token] = parts
    for name in items[0].per_row:
        arrays[name] = np.array([item.per_row[name] for item in items])
    return to_batch(arrays, [item.position for item in items])


def pad_rows(
    rows: Sequence[NDArray[np.int32]], pad_id: int, multiple: int
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Return `input_ids`, `position_ids` and `sequence_ids` of :func:`collate`, and 0, 1, 2, … as `[1, length]`."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // multiple) * multiple
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


def to_batch(arrays: dict[str, NDArray[Any]], positions: Sequence[int]) -> dict[str, Any]:
    """Add `indices` and `num_tokens`, and convert arrays to tensors."""
    arrays["indices"] = np.array(positions, dtype=np.int64)
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {**tensors, "num_tokens": int(arrays["sequence_ids"].sum())}
