"""MLM loss of a generator that ignores context, as a baseline.

Without context, a generator can only copy masked tokens that are still visible and predict word frequencies. An MLM
loss at or above this baseline means that nothing has been learnt from context yet, however far it has fallen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.streams import plan_epoch
from electra_composer.config import ObjectiveConfig, ShardsConfig
from electra_composer.storage.shard_folder import Meta

ROWS = 20_000  # read at most, evenly spaced: takes a third of a second, and gives the entropy within 0.01


def unigram_counts(config: ShardsConfig, meta: Meta, split: str, max_rows: int = ROWS) -> NDArray[np.int64] | None:
    """Count each token in evenly spaced rows of a split, weighting streams by their rows in an epoch.

    Returns:
        `[vocabulary]`, with 0 for the special tokens that are never masked; None if the shards are not yet on this
        machine, or still compressed.

    Raises:
        UserError: a shard cannot be read.
    """
    shares = plan_epoch(config, meta, split, seed=0)
    counts = np.zeros(meta.tokenizer.vocab_size)
    for folder, rows, _ in shares:
        reader = None if folder.remote is not None else reader_of_split(folder.path, split)
        if reader is None:
            return None
        numbers = np.arange(0, reader.rows, math.ceil(reader.rows / max_rows))
        found = np.bincount(reader.read(numbers).input_ids, minlength=len(counts))
        # One folder's counts stay integers; several are scaled to their rows in an epoch.
        counts += found * (1.0 if len(shares) == 1 else rows / len(numbers))
    counts[[meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep")]] = 0
    return np.rint(counts).astype(np.int64)


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of the word frequencies: the loss of a model that knows nothing else."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def mlm_loss_without_context(entropy: float, objective: ObjectiveConfig) -> float:
    """Return the MLM loss, in nats per masked token, of copying visible words and predicting frequencies elsewhere.

    `electra`: 15% of the masked tokens are kept, and only these show a word, so that copying costs nothing:
    0.85 × entropy.
    `bert`: of the masked tokens that show a word, half show the original and half a random word. A model that gives
    probability 1/2 to the visible word and 1/2 to the frequencies has a loss of ln 2 for a kept token and of
    entropy + ln 2 for a replaced one.
    """
    if objective.resolved().mask_style == "electra":
        return 0.85 * entropy
    return 0.8 * entropy + 0.1 * math.log(2) + 0.1 * (entropy + math.log(2))


def loss_without_context(config: ShardsConfig, meta: Meta, objective: ObjectiveConfig) -> float | None:
    """Return :func:`mlm_loss_without_context` of a run's training rows; None if they are not on this machine yet."""
    counts = unigram_counts(config, meta, config.train_split)
    if counts is None or not counts.any():
        return None
    return mlm_loss_without_context(unigram_entropy(counts), objective)
