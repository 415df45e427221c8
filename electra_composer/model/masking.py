"""Choice of masked positions, their replacement in the generator's input, and the discriminator's labels.

Pure functions on tensors. Every random choice is made from uniform numbers passed by the caller, so results do not
depend on how a batch is split. Source: google-research/electra `pretrain/pretrain_helpers.py`. It draws positions with
replacement; we draw without, so that the fraction of masked tokens is the configured one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_slots(mask_prob: float, max_seq_length: int) -> int:
    """Maximum of masked positions per row: `int((mask_prob + 0.005) × max_seq_length)` (`configure_pretraining.py`)."""
    return int((mask_prob + 0.005) * max_seq_length)


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


def mask_counts(candidates: Tensor, sequence_ids: Tensor, mask_prob: float, slots: int) -> Tensor:
    """Number of masked positions per row.

    A fraction `mask_prob` of its tokens (`[CLS]` and `[SEP]` included, as in the paper's code), rounded, at least 1, at
    most the number of slots and the number of candidates.

    Returns:
        Integers `[rows]`.
    """
    tokens = (sequence_ids > 0).sum(dim=1)
    counts = torch.round(tokens * mask_prob).long().clamp(min=1, max=slots)
    return torch.minimum(counts, candidates.sum(dim=1))


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
