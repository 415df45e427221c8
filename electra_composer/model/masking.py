"""Choice of masked positions, their replacement in the generator's input, and the discriminator's labels.

Pure functions on tensors. Every random choice is made from uniform numbers or a generator passed by the caller, so
results do not depend on how a batch is split. Source: google-research/electra `pretrain/pretrain_helpers.py`.

Positions are drawn in one of three ways (`objective.mask_draw`):

* `exact`: without replacement, so that the fraction of masked tokens is the configured one.
* `with_replacement`: as google-research/electra does. A position that is drawn twice counts twice in the MLM loss: of
  128 tokens, 19 slots hold 17.7 distinct positions on average.
* `bernoulli`: each token independently, as richarddwang/electra_pytorch does: 18.8 ± 4.0 of 128 tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEVIATIONS = 6
"""Standard deviations above the mean for which `bernoulli` has slots: about one row in 10⁸ has more masked tokens, and
loses those beyond."""


def num_slots(mask_prob: float, max_seq_length: int, draw: str = "exact") -> int:
    """Maximum of masked positions per row.

    `int((mask_prob + 0.005) × max_seq_length)` (`configure_pretraining.py`); for `bernoulli` the mean number of masked
    positions plus :data:`DEVIATIONS` standard deviations, at most `max_seq_length`.
    """
    if draw != "bernoulli":
        return int((mask_prob + 0.005) * max_seq_length)
    mean = mask_prob * max_seq_length
    return min(max_seq_length, math.ceil(mean + DEVIATIONS * math.sqrt(mean * (1 - mask_prob))))


def noise_width(max_seq_length: int, slots: int) -> int:
    """Number of uniform numbers per row: one per position, three per slot."""
    return max_seq_length + 3 * slots


def split_noise(noise: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split `[rows, noise_width]`: positions `[rows, length]`; case, random token, sample `[rows, slots]` each."""
    length = noise.shape[1] - 3 * slots
    position, replace, random_token, sample = noise.split([length, slots, slots, slots], dim=1)
    return position, replace, random_token, sample


def maskable(input_ids: Tensor, sequence_ids: Tensor, special_ids: tuple[int, ...]) -> Tensor:
    """True where a token may be masked: neither padding nor in `special_ids`; inputs and output `[rows, length]`."""
    candidates = sequence_ids > 0
    for special_id in special_ids:
        candidates = candidates & (input_ids != special_id)
    return candidates


def mask_counts(
    candidates: Tensor, sequence_ids: Tensor, mask_prob: float, slots: int, with_replacement: bool = False
) -> Tensor:
    """Number of drawn positions per row, for `exact` and `with_replacement`.

    A fraction `mask_prob` of its tokens (`[CLS]` and `[SEP]` included, as in the paper's code), rounded, at least 1, at
    most the number of slots and, without replacement, the number of candidates. 0 in a row without candidates.

    Returns:
        Integers `[rows]`.
    """
    tokens = (sequence_ids > 0).sum(dim=1)
    counts = torch.round(tokens * mask_prob).long().clamp(min=1, max=slots)
    if with_replacement:
        return torch.where(candidates.any(dim=1), counts, 0)
    return torch.minimum(counts, candidates.sum(dim=1))


def bernoulli_counts(candidates: Tensor, mask_prob: float, slots: int, generator: torch.Generator) -> Tensor:
    """Draw the number of masked positions per row for `bernoulli`: binomial, at most `slots`.

    This many positions drawn by :func:`choose_positions` are distributed as if each candidate were masked with
    probability `mask_prob`, independently of the others.

    Returns:
        Integers `[rows]`.
    """
    counts = candidates.sum(dim=1).double()
    drawn = torch.binomial(counts, torch.full_like(counts, mask_prob), generator=generator)
    return drawn.long().clamp(max=slots)


def bernoulli_counts_of(noise: Tensor, candidates: Tensor, mask_prob: float, slots: int) -> Tensor:
    """Number of candidates per row that the position noise masks with probability `mask_prob` each, at most `slots`.

    :func:`choose_positions` takes the positions with the largest noise, and therefore these.

    Returns:
        Integers `[rows]`.
    """
    return ((noise >= 1.0 - mask_prob) & candidates).sum(dim=1).clamp(max=slots)


def choose_positions(candidates: Tensor, counts: Tensor, slots: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw positions uniformly, without replacement, among the candidates of each row.

    Args:
        candidates: booleans `[rows, length]`.
        counts: integers `[rows]`, at most `slots` and at most the candidates of the row.
        slots: number of slots N.
        noise: uniform in [0, 1), `[rows, length]`.

    Returns:
        `positions [rows, N]`, integers, distinct within a row; `weights [rows, N]`, fp32: 1 for the first `counts`
        slots, 0 for the unused ones, which have arbitrary positions.
    """
    scores = noise.masked_fill(~candidates, -1.0)
    positions = scores.topk(slots, dim=1).indices
    weights = torch.arange(slots, device=counts.device)[None, :] < counts[:, None]
    return positions, weights.float()


def choose_with_replacement(candidates: Tensor, counts: Tensor, slots: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw positions uniformly, with replacement, among the candidates of each row.

    Args:
        candidates, slots: as for :func:`choose_positions`.
        counts: integers `[rows]`, at most `slots`, 0 in rows without candidates.
        noise: uniform in [0, 1), `[rows, length]`; the first N of a row are read.

    Returns:
        `positions [rows, N]`, integers; `weights [rows, N]`, fp32: 1 for the first `counts` slots, 0 for the unused
        ones. Unused slots have position 0, as in the paper's code: it is `[CLS]`, which is never drawn.
    """
    ranks = candidates.cumsum(dim=1)  # of a candidate among those of its row, from 1
    total = ranks[:, -1:]
    drawn = (noise[:, :slots] * total).long().clamp(max=total - 1) + 1  # rounding may reach the total
    used = torch.arange(slots, device=counts.device)[None, :] < counts[:, None]
    positions = torch.searchsorted(ranks, drawn.contiguous())
    return torch.where(used, positions, 0), used.float()


def merge_repeats(positions: Tensor, replace: Tensor) -> tuple[Tensor, Tensor]:
    """Let the slots of one position agree, so that it does not matter which of them is written last.

    Args:
        positions: integers `[rows, N]`.
        replace: uniform numbers that select `[MASK]` or the original, fp32 `[rows, N]`.

    Returns:
        The first slot that has the position of each slot, integers `[rows, N]`; and the smallest `replace` of the slots
        of each position, `[rows, N]`: a position that was drawn more than once keeps its token only if all its draws
        keep it, as in the paper's code.
    """
    same = positions[:, :, None] == positions[:, None, :]
    return same.int().argmax(dim=2), torch.where(same, replace[:, None, :], 1.0).amin(dim=2)


def mask_tokens(
    tokens: Tensor, weights: Tensor, style: str, mask_id: int, vocab_size: int, replace: Tensor, random_token: Tensor
) -> Tensor:
    """Replace the tokens at the masked positions for the generator's input.

    Args:
        tokens: original ids `[rows, N]`.
        weights: `[rows, N]`; slots of weight 0 keep their token.
        style: `electra`: 85% `[MASK]`, 15% unchanged (paper's code); `bert`: 80% `[MASK]`, 10% random, 10% unchanged.
        mask_id: id of `[MASK]`.
        vocab_size: random tokens are drawn from all ids below it.
        replace: uniform in [0, 1), `[rows, N]`; selects the case.
        random_token: uniform in [0, 1), `[rows, N]`; selects the random token.

    Returns:
        Ids `[rows, N]`.
    """
    used = weights > 0
    if style == "electra":
        return torch.where(used & (replace < 0.85), mask_id, tokens)
    if style == "bert":
        random_ids = (random_token * vocab_size).long().clamp(max=vocab_size - 1)
        masked = torch.where(used & (replace < 0.8), mask_id, tokens)
        return torch.where(used & (replace >= 0.8) & (replace < 0.9), random_ids, masked)
    raise ValueError(f"mask style {style!r}: expected 'electra' or 'bert'")


def replaced_labels(corrupted: Tensor, originals: Tensor, sequence_ids: Tensor) -> Tensor:
    """Labels of the discriminator: True where a token differs from the original; a sample equal to it is original
    (paper, section 2)."""
    return (corrupted != originals) & (sequence_ids > 0)
