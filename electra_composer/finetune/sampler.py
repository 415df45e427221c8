"""The order of examples: batches of similar length, random but for that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler

WINDOW_BATCHES = 50  # batches among whose examples similar lengths are looked for: transformers' number
LEAST_WINDOWS = 4  # of an epoch, so that a small task's batches stay random, too; transformers' number as well


class LengthGroupedSampler(DistributedSampler):
    """Batches of examples of similar length, so that little of them is padding.

    Shuffled: a new random order every epoch; within windows of many batches examples are sorted by length; then the
    batches are shuffled. Which examples meet in a batch stays random but for their length. What does not fill a batch
    is the end of the random order, unsorted, and comes last. Otherwise: all examples from the longest to the shortest,
    so that a batch that does not fit into memory is the first.

    The order depends on seed and epoch alone. A process gets every `num_replicas`-th example of a batch, and, as by the
    class above, some examples are repeated at the end where the processes cannot share them evenly.

    Source: `get_length_grouped_indices` of transformers' `trainer_pt_utils.py`, which goes through the batches of a
    window in the order of their lengths.

    Args:
        dataset: what is sampled: Composer asks for its length, to leave out what is repeated.
        lengths: tokens of each example, int64 `[examples]`.
        device_batch_size: examples per batch of this process.
        shuffle_seed: of the order; None: not shuffled.
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
        # A generator of both numbers: seed + epoch would give one run's second epoch to another run as its first.
        order = self._shuffled(np.random.default_rng([self.seed, self.epoch])) if self.shuffle else self._sorted()
        return iter(np.resize(order, self.total_size)[self.rank :: self.num_replicas].tolist())

    def _sorted(self) -> NDArray[np.int64]:
        return np.argsort(-self.lengths, kind="stable")

    def _shuffled(self, rng: np.random.Generator) -> NDArray[np.int64]:
        order = rng.permutation(len(self.lengths))
        count = len(order) // self.batch_size
        full, rest = np.split(order, [count * self.batch_size])
        window = self.batch_size * max(1, min(WINDOW_BATCHES, count // LEAST_WINDOWS))
        windows = [full[start : start + window] for start in range(0, len(full), window)]
        grouped = [part[np.argsort(self.lengths[part], kind="stable")] for part in windows]
        batches = np.concatenate([*grouped, full[:0]]).reshape(count, self.batch_size)
        return np.concatenate([rng.permutation(batches).reshape(-1), rest])
