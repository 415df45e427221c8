"""Sampler that groups examples of similar length into batches, otherwise at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

# Both as in transformers' get_length_grouped_indices.
WINDOW_BATCHES = 50  # batches per window; examples are sorted by length within a window
MIN_WINDOWS = 4  # minimum per epoch, so that batches of a small task stay random


class LengthGroupedSampler(DistributedSampler):
    """Group examples of similar length into batches, to reduce padding.

    With a seed: draw a new random order every epoch, sort by length within windows of many batches, then shuffle the
    batches. Apart from their lengths, the examples of a batch are random. The examples that do not fill a batch are
    the end of the random order; they are not sorted and come last.

    Without a seed: sort all examples from the longest to the shortest, so that the batch that needs most memory is the
    first.

    The order depends only on seed and epoch. A rank gets every `num_replicas`-th example of a batch. As in
    `DistributedSampler`, some examples are repeated at the end if the ranks cannot share them evenly.

    Source: `get_length_grouped_indices` of transformers' `trainer_pt_utils.py`, which does not shuffle the batches of
    a window.

    Args:
        dataset: the examples; Composer uses its length to drop the repeats.
        lengths: number of tokens of each example, int64 `[examples]`.
        device_batch_size: examples per batch of this rank.
        shuffle_seed: seed of the order; None for no shuffling.
    """

    def __init__(self, dataset: Dataset, lengths: NDArray[np.int64], device_batch_size: int, shuffle_seed: int | None):
        super().__init__(
            dataset,
            num_replicas=dist.get_world_size(),
            rank=dist.get_global_rank(),
            shuffle=shuffle_seed is not None,
            seed=shuffle_seed or 0,
        )
        self.lengths = lengths
        self.batch_size = device_batch_size * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        order = self._shuffled() if self.shuffle else np.argsort(-self.lengths, kind="stable")
        return iter(np.resize(order, self.total_size)[self.rank :: self.num_replicas].tolist())

    def _shuffled(self) -> NDArray[np.int64]:
        # Not seed + epoch: the second epoch of one seed would equal the first epoch of the next seed.
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        count = len(order) // self.batch_size
        full, rest = np.split(order, [count * self.batch_size])
        window = self.batch_size * max(1, min(WINDOW_BATCHES, count // MIN_WINDOWS))
        windows = [full[start : start + window] for start in range(0, len(full), window)]
        grouped = [part[np.argsort(self.lengths[part], kind="stable")] for part in windows]
        batches = np.concatenate([*grouped, full[:0]]).reshape(count, self.batch_size)
        return np.concatenate([rng.permutation(batches).reshape(-1), rest])
