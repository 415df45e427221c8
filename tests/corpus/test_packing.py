"""Packing of examples into rows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from electra_composer.corpus.examples import Example, Packer, one_per_row


def some_examples(count, longest, seed=0):
    """Return examples in which every id is the number of the example."""
    rng = random.Random(seed)
    examples = []
    for number in range(count):
        length_a = rng.randint(3, longest)
        length_b = rng.choice([0, rng.randint(0, longest - length_a)])
        examples.append(Example(np.full(length_a + length_b, number, np.int32), length_a, length_b))
    return examples


def pack(examples, max_seq_length, **options):
    packer = Packer(max_seq_length, **options)
    return [row for example in examples for row in packer.add(example)] + list(packer.finish())


@pytest.mark.parametrize(("window", "open_rows"), [(1, 1), (1, 1000), (100, 8), (10_000, 1000)])
def test_packing_keeps_every_example_whole_and_once(window, open_rows):
    examples = some_examples(3000, 128)
    rows = pack(examples, 128, window=window, open_rows=open_rows)
    found = []
    for row in rows:
        assert row.segment_lengths.dtype == np.uint16
        assert row.segment_lengths.sum() == len(row.input_ids) <= 128
        start = 0
        for length_a, length_b in row.segment_lengths.reshape(-1, 2).tolist():
            ids = row.input_ids[start : start + length_a + length_b]
            assert len(set(ids.tolist())) == 1
            found.append((int(ids[0]), length_a, length_b))
            start += length_a + length_b
    assert sorted(found) == [(i, e.length_a, e.length_b) for i, e in enumerate(examples)]


def packed_lengths(lengths, **options):
    examples = [Example(np.full(n, i, np.int32), n, 0) for i, n in enumerate(lengths)]
    return [row.segment_lengths[::2].tolist() for row in pack(examples, 12, **options)]


def test_packing_is_best_fit():
    # Rows of 12. 10 leaves 2, which closes the row; 7 leaves 5; 4 fits there (1 left, closed); 6 opens one; 3 fits it.
    assert packed_lengths([10, 7, 4, 6, 3], window=1) == [[10], [7, 4], [6, 3]]
    # 8 and 7 leave 4 and 5: 4 goes where it fits exactly, and 5 into the other.
    assert packed_lengths([8, 7, 4, 5], window=1) == [[8, 4], [7, 5]]


def test_packing_takes_the_longest_of_a_window_first():
    # In the given order, 5 and 4 share a row, and 7 and 8 have one each; longest first, two rows suffice.
    assert len(packed_lengths([5, 4, 7, 8], window=1)) == 3
    assert packed_lengths([5, 4, 7, 8]) == [[7, 5], [8, 4]]


def test_packing_closes_the_fullest_row_when_too_many_are_open():
    assert packed_lengths([7, 8, 7, 3], window=1, open_rows=2) == [[8], [7, 3], [7]]


def test_packing_is_deterministic_and_close_to_full():
    examples = some_examples(20_000, 64, seed=5)
    first, second = pack(examples, 128), pack(examples, 128)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(first, second, strict=True))
    assert sum(len(row.input_ids) for row in first) / (128 * len(first)) > 0.99


def test_packing_refuses_what_fits_no_row():
    with pytest.raises(ValueError, match="an example of 20 tokens does not fit rows of 16"):
        pack([Example(np.zeros(20, np.int32), 20, 0)], 16)


def test_one_per_row():
    examples = some_examples(5, 16)
    rows = list(one_per_row(examples))
    assert [row.segment_lengths.tolist() for row in rows] == [[e.length_a, e.length_b] for e in examples]
