"""Collation of packed rows, compared with a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from small_shards import LENGTH, make_rows

from electra_composer.batches.collation import COLUMNS, collate_rows
from electra_composer.batches.row_reader import Rows
from electra_composer.errors import UserError


def reference_collate(rows, length, pad_id):
    """Return what `collate_rows` should, from a loop over tokens."""
    batch = []
    for row in rows:
        ids, tokens = iter(row["input_ids"].tolist()), []
        for number, (first, second) in enumerate(row["segment_lengths"].reshape(-1, 2).tolist(), start=1):
            for position in range(first + second):
                tokens.append((next(ids), int(position >= first), position, number))
        batch.append(tokens + [(pad_id, 0, 0, 0)] * (length - len(tokens)))
    return np.array(batch).transpose(2, 0, 1)


@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_collate_against_a_loop_over_tokens(pad_id, dtype):
    rows = [
        {"input_ids": row.input_ids.astype(dtype), "segment_lengths": row.segment_lengths}
        for row in make_rows(50, seed=3)
    ]
    packed = collate_rows(as_rows(rows), LENGTH, pad_id)
    assert packed.dtype == np.int64
    assert COLUMNS == ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
    for name, values, expected in zip(COLUMNS, packed, reference_collate(rows, LENGTH, pad_id), strict=True):
        assert values.tolist() == expected.tolist(), name


def as_rows(rows):
    ids, segments = [row["input_ids"] for row in rows], [row["segment_lengths"] for row in rows]
    return Rows(
        np.concatenate(ids),
        np.array([len(row) for row in ids]),
        np.concatenate(segments),
        np.array([len(lengths) // 2 for lengths in segments]),
    )


def test_collate_of_one_full_row():
    row = {"input_ids": np.arange(1, LENGTH + 1, dtype=np.uint16), "segment_lengths": np.array([10, 6], np.uint16)}
    packed = collate_rows(as_rows([row]), LENGTH)
    assert packed[:, 0].tolist() == [list(range(1, 17)), [0] * 10 + [1] * 6, list(range(16)), [1] * 16]


@pytest.mark.parametrize(("ids", "lengths"), [(5, [4, 0]), (20, [20, 0]), (6, [3, 0, 4, 0])])
def test_collate_refuses_corrupt_rows(ids, lengths):
    row = {"input_ids": np.ones(ids, np.uint16), "segment_lengths": np.array(lengths, np.uint16)}
    with pytest.raises(UserError, match="a row of the shards is corrupt"):
        collate_rows(as_rows([row]), LENGTH)
