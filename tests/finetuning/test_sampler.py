"""Sampler: every example once, similar lengths per batch, shares of several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from composer.utils import dist
from numpy.typing import NDArray

from electra_composer.finetuning.sampler import LengthGroupedSampler

LENGTHS = np.random.default_rng(0).integers(3, 128, 6543)


def order(lengths: NDArray[np.int64], batch: int, seed: int | None, epoch: int = 0) -> list[int]:
    data: Any = lengths  # only the length of the data set is used
    sampler = LengthGroupedSampler(data, lengths, batch, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000, 6543])
def test_each_example_once_in_every_epoch(size: int) -> None:
    for epoch in range(2):
        assert sorted(order(LENGTHS[:size], 32, seed=3, epoch=epoch)) == list(range(size))


def test_the_order_follows_from_seed_and_epoch() -> None:
    orders = [order(LENGTHS, 32, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(found) for found in orders}) == 4  # seed 1, epoch 1 is not seed 2, epoch 0
    assert order(LENGTHS, 32, 1, 1) == orders[1]


def padding(found: list[int], batch: int = 32) -> float:
    """Return the number of padding tokens per token."""
    batches = [LENGTHS[found[start : start + batch]] for start in range(0, len(found), batch)]
    return sum(len(lengths) * lengths.max() for lengths in batches) / LENGTHS.sum() - 1


def test_batches_hold_similar_lengths() -> None:
    shuffled = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    assert padding(shuffled) > 0.8
    assert padding(order(LENGTHS, 32, seed=0)) < 0.05
    assert padding(order(LENGTHS, 32, seed=None)) < 0.02


def test_lengths_of_batches_come_in_no_order_and_the_last_batch_is_as_random_as_any() -> None:
    means = np.array([LENGTHS[order(LENGTHS, 32, 0)][start : start + 32].mean() for start in range(0, 6528, 32)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2
    # 6543 = 204 × 32 + 15: the remainder is drawn before sorting by length.
    rests = [LENGTHS[order(LENGTHS, 32, 0, epoch)[-15:]].mean() for epoch in range(40)]
    assert np.mean(rests) == pytest.approx(LENGTHS.mean(), rel=0.1)


def test_examples_of_a_batch_do_not_stay_together() -> None:
    first, second = (order(LENGTHS, 32, 0, epoch) for epoch in (0, 1))
    batch_of = {example: place // 32 for place, example in enumerate(second)}
    companions = [len({batch_of[example] for example in first[start : start + 32]}) for start in range(0, 6400, 32)]
    assert np.mean(companions) > 6  # of 32; 1 if all stayed together


def test_evaluation_goes_from_the_longest_to_the_shortest_and_keeps_ties_in_order() -> None:
    lengths = np.array([3, 9, 9, 4, 9])
    assert order(lengths, 2, None) == [1, 2, 4, 3, 0]
    assert order(lengths, 2, None, epoch=7) == [1, 2, 4, 3, 0]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("seed", [0, None])
def test_processes_share_what_one_would_see(monkeypatch: pytest.MonkeyPatch, processes: int, seed: int | None) -> None:
    lengths = LENGTHS[:100]
    alone = order(lengths, 4 * processes, seed)
    shares = []
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        shares.append(order(lengths, 4, seed))
    assert {len(share) for share in shares} == {-(-100 // processes)}
    together = [example for row in zip(*shares, strict=True) for example in row]
    assert together[:100] == alone
    assert together[100:] == alone[: len(together) - 100]  # repeated to give each rank equally many
