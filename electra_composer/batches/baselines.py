"""What a generator reaches that has learnt nothing from context: the loss to compare an MLM loss with.

A generator can copy the masked tokens that stay in sight, and know how frequent every word is. A loss above or at what
that gives means that nothing has been learnt from context yet, however far it has fallen from its start.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.streams import epoch_rows_wanted, folders_of, weigh
from electra_composer.config import ObjectiveConfig, ShardsConfig
from electra_composer.storage.shard_folder import Meta

ROWS = 20_000  # read at most, evenly spaced: a third of a second, and the entropy to a hundredth


def unigram_counts(config: ShardsConfig, meta: Meta, split: str, max_rows: int = ROWS) -> NDArray[np.int64] | None:
    """How often each token occurs in evenly spaced rows of a split, of each stream by its share of an epoch.

    Returns:
        `[vocabulary]`, with 0 for the special tokens that are never masked; None where the shards are not on this
        machine (or not unpacked) yet.

    Raises:
        UserError: a shard that cannot be read.
    """
    folders = folders_of(config, meta)
    readers = [None if folder.remote is not None else reader_of_split(folder.path, split) for folder in folders]
    shares = weigh(folders, split, epoch_rows_wanted(config), seed=0)
    counts = np.zeros(meta.tokenizer.vocab_size)
    for reader, share in zip(readers, shares, strict=True):
        if reader is None:
            return None
        numbers = np.arange(0, reader.rows, math.ceil(reader.rows / max_rows))
        found = np.bincount(reader.read(numbers).input_ids, minlength=len(counts))
        # One folder's counts stay whole numbers as they were found; several are brought to their rows in an epoch.
        weight = 1.0 if len(folders) == 1 else share.rows / len(numbers)
        counts += weight * found
    counts[[meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep")]] = 0
    return np.rint(counts).astype(np.int64)


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of words drawn by their counts: the loss of who knows their frequencies and nothing else."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def mlm_loss_without_context(entropy: float, objective: ObjectiveConfig) -> float:
    """The MLM loss, in nats per masked token, of copying what is in sight and of word frequencies elsewhere.

    `electra`: 15% of the masked tokens are kept, and only they are in sight, so that copying is free: 0.85 × entropy.
    `bert`: of the masked tokens in sight, half are the original and half random words. Who gives the word in sight one
    half and the frequencies the other pays ln 2 for a kept token and the entropy + ln 2 for one that was replaced.
    """
    if objective.mask_style == "electra":
        return 0.85 * entropy
    return 0.8 * entropy + 0.1 * math.log(2) + 0.1 * (entropy + math.log(2))


def loss_without_context(config: ShardsConfig, meta: Meta, objective: ObjectiveConfig) -> float | None:
    """:func:`mlm_loss_without_context` of a run's training rows; None where they are not here yet."""
    counts = unigram_counts(config, meta, config.train_split)
    if counts is None or not counts.any():
        return None
    return mlm_loss_without_context(unigram_entropy(counts), objective)
