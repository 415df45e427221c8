"""Collate rows of packed examples into padded batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from electra_composer.batches.row_reader import Rows
from electra_composer.errors import UserError

Batch = dict[str, Any]
COLUMNS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")  # tensors of a batch


def batch_bytes(rows: int, max_seq_length: int) -> int:
    """Return the size of the result of :func:`collate_rows`."""
    return len(COLUMNS) * rows * max_seq_length * np.dtype(np.int64).itemsize


def collate_rows(rows: Rows, max_seq_length: int, pad_id: int = 0) -> NDArray[np.int64]:
    """Collate rows into one padded array.

    Args:
        rows: from :meth:`RowReader.read`.
        max_seq_length: width of the batch, regardless of the rows' lengths: compiled code needs one shape.
        pad_id: id of `[PAD]`.

    Returns:
        int64 `[4, rows, max_seq_length]` in the order of :data:`COLUMNS`: `input_ids`; `token_type_ids`, 0 in segment
        A and 1 in B; `position_ids`, from 0 in every example; `sequence_ids`, 0 for padding, otherwise the example's
        number within its row, from 1.

    Raises:
        UserError: segment lengths do not add up to the number of ids, as in a corrupt shard.
    """
    segment_lengths = rows.segment_lengths.astype(np.int64)
    example_lengths = segment_lengths.reshape(-1, 2).sum(1)
    first_examples = np.cumsum(rows.examples_per_row) - rows.examples_per_row  # index of each row's first example
    sums = np.add.reduceat(example_lengths, first_examples)
    if (sums != rows.row_lengths).any() or rows.row_lengths.max() > max_seq_length:
        raise UserError(
            f"a row of the shards is corrupt: its segment lengths do not add up to its tokens, or it has more than "
            f"{max_seq_length} tokens; copy the shards again or recreate them"
        )

    # Compute one value per token of the batch, row after row, then scatter all of them at once.
    num_rows, num_tokens = len(rows.row_lengths), len(rows.input_ids)
    num_examples = len(example_lengths)
    example_of_row = np.arange(num_examples) - np.repeat(first_examples, rows.examples_per_row) + 1
    starts = np.cumsum(example_lengths) - example_lengths
    of_example = np.stack([starts, example_of_row]).repeat(example_lengths, axis=1)  # [2, tokens]
    packed = np.zeros((4, num_rows * max_seq_length), np.int64)
    packed[0] = pad_id
    places = np.flatnonzero(np.arange(max_seq_length) < rows.row_lengths[:, None])
    packed[0, places] = rows.input_ids
    packed[1, places] = np.tile(np.array([0, 1]), num_examples).repeat(segment_lengths)
    packed[2, places] = np.arange(num_tokens) - of_example[0]
    packed[3, places] = of_example[1]
    return packed.reshape(4, num_rows, max_seq_length)


# Workaround (composer 0.32): the default split warns of a batch that is smaller than a microbatch, as the last one of
# an evaluation or an epoch usually is; goes when that is no longer a warning.
def split_batch(batch: Batch, rows: int) -> list[Batch]:
    """Split a batch into microbatches of at most `rows` rows; values that are not tensors are those of the batch."""
    starts = range(0, batch["input_ids"].shape[0], rows)
    return [{k: v[i : i + rows] if isinstance(v, Tensor) else v for k, v in batch.items()} for i in starts]
