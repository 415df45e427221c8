"""Sampling by inverse CDF in two steps: first a block of the vocabulary, then a token within it.

Each row uses one uniform number. Only block sums are accumulated over the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLING_BLOCK = 64
"""Tokens per block of the cumulative sum; the number of rows of an embedding table is a multiple of it."""

BELOW_ONE = 1.0 - 2.0**-22
"""Upper limit for uniform numbers: rounding must not make uniform number × total equal to the total."""


def sum_blocks(weights: Tensor) -> Tensor:
    """Sum the weights of each block: `[R, P]` → `[R, P / SAMPLING_BLOCK]`."""
    return weights.view(weights.shape[0], -1, SAMPLING_BLOCK).sum(-1)


def inverse_cdf(weights: Tensor, block_sums: Tensor, noise: Tensor) -> Tensor:
    """Return the first token at which the cumulative weight exceeds `noise` × total; never one of weight zero.

    `weights [R, P]` fp32, not negative; `block_sums`: see :func:`sum_blocks`; `noise [R]` in [0, 1) → int64 `[R]`.
    """
    block, rest = choose_block(block_sums, noise)
    blocks = weights.view(weights.shape[0], -1, SAMPLING_BLOCK)
    within = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(1)]
    cumulative = within.cumsum(1)
    # The block's sum and its cumulative sum round differently: stay within the block.
    token = _first_above(cumulative, within, torch.minimum(rest, cumulative[:, -1:] * BELOW_ONE))
    return (block * SAMPLING_BLOCK + token).squeeze(1)


def choose_block(block_sums: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Find the block that contains `noise` × total, int64 `[R, 1]`, and the remainder within it, fp32 `[R, 1]`.

    `block_sums [R, B]` fp32, not negative; `noise [R]` in [0, 1).
    """
    cumulative = block_sums.cumsum(1)
    threshold = noise.clamp(max=BELOW_ONE)[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, block_sums, threshold)
    return block, (threshold - cumulative.gather(1, block) + block_sums.gather(1, block)).clamp(min=0.0)


def _first_above(cumulative: Tensor, weights: Tensor, threshold: Tensor) -> Tensor:
    """Return the first column at which `cumulative`, the sums of `weights`, exceeds `threshold`: int64 `[R, 1]`.

    A parallel scan, as on CUDA, may increase by rounding where the weight is zero, and NaN exceeds nothing. In these
    cases the column of largest weight (or NaN) is returned, so that the id is in range and has a probability above 0.

    `cumulative`, `weights`: `[R, C]`; `threshold [R, 1]`.
    """
    column = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
    return torch.where(weights.gather(1, column) > 0, column, weights.argmax(1, keepdim=True))
