"""Attention within examples, by the fastest path of each device.

A row may hold several examples and padding; tokens attend to tokens of their own example. There are three paths of one
meaning, and :class:`AttentionPattern` carries what each needs of a batch:

* `sdpa`: `F.scaled_dot_product_attention` with a mask; any device.
* on a CPU, where torch's own is slow, that is in training with dropout and on short rows in bf16:
  :class:`_WrittenAttention`.
* `varlen`: flash attention over the examples one after another, without a mask; CUDA.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from electra_composer.model.kernels import dropout


class AttentionPattern(NamedTuple):
    """Who attends to whom in a batch `[rows, length]`: one of the two, made once per forward."""

    mask: Tensor | None
    """Booleans `[rows, 1, length, length]`, True: may attend."""
    boundaries: Tensor | None
    """int32 `[most examples + 1]`: where the examples start in the rows laid end to end, then the end, repeated."""


def pattern_of(sequence_ids: Tensor, path: str = "sdpa") -> AttentionPattern:
    """The pattern of a batch.

    Args:
        sequence_ids: integers `[rows, length]`; 0 is padding, 1… the example of the row that a token belongs to.
        path: `sdpa` or `varlen`.

    Padding attends to padding: a row of the softmax must not be empty (NaN), and nothing reads what comes out there.
    """
    if path == "varlen":
        return AttentionPattern(None, boundaries_of(sequence_ids))
    return AttentionPattern(sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :], None)


def boundaries_of(sequence_ids: Tensor) -> Tensor:
    """Starts of all examples, and of each row's padding, in the rows laid end to end; then their end.

    The shape is static, as CUDA graphs want it, with a place for the most that there can be: an example has at least
    two tokens, `[CLS]` and `[SEP]`. Places too many hold the end, which makes their examples empty.

    `[rows, length]` → int32 `[rows × (length // 2 + 1) + 1]`.
    """
    rows, length = sequence_ids.shape
    total, most = rows * length, rows * (length // 2 + 1)
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    starts = starts.flatten()
    places = torch.arange(total, dtype=torch.int32, device=sequence_ids.device)
    # The n-th start goes to place n; what is no start goes to the last place, which is the end in any case.
    order = torch.where(starts, starts.cumsum(0) - 1, most)
    boundaries = torch.full((most + 1,), total, dtype=torch.int32, device=sequence_ids.device)
    return boundaries.scatter_reduce(0, order, torch.where(starts, places, total), "amin")


def attention(qkv: Tensor, pattern: AttentionPattern, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention, `softmax(Q Kᵀ / sqrt(D)) V` per head, with dropout on the probabilities.

    Args:
        qkv: `[rows, length, 3 × hidden_size]`: queries, keys and values, heads one after another in each.
        pattern: of the batch.
        num_heads: of `hidden_size`.
        dropout_p: 0 outside training.

    Returns:
        `[rows, length, hidden_size]`, dtype of `qkv`.
    """
    rows, length, width = qkv.shape
    qkv = qkv.view(rows, length, 3, num_heads, width // (3 * num_heads))
    if pattern.boundaries is not None:
        attended = _flash(qkv, pattern.boundaries, dropout_p)
    elif dropout.serves(qkv, dropout_p) and (dropout_p > 0.0 or _is_short_bf16(qkv)):
        assert pattern.mask is not None
        attended = _WrittenAttention.apply(qkv, pattern.mask, dropout_p)
    else:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=pattern.mask, dropout_p=dropout_p
        ).transpose(1, 2)
    return attended.reshape(rows, length, width // 3)


SHORT = 256
"""Up to this length a CPU's bf16 products of whole rows are faster than torch's flash attention: 3.2 × at 128, 1.9 × at
256 (benchmarks/RESULTS.md)."""


def _is_short_bf16(qkv: Tensor) -> bool:
    return qkv.dtype == torch.bfloat16 and qkv.shape[1] <= SHORT


def _flash(qkv: Tensor, boundaries: Tensor, dropout_p: float) -> Tensor:
    """`[rows, length, 3, heads, head size]` in bf16 or fp16 → `[rows × length, heads, head size]`."""
    rows, length, _, heads, size = qkv.shape
    query, key, value = qkv.view(rows * length, 3, heads, size).unbind(1)
    # torch's own build of flash attention (Dao 2023), the operator behind scaled_dot_product_attention, which has no
    # argument for examples of different lengths; flex_attention has, but knows no dropout.
    return torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, length, length, dropout_p, False, False, scale=1 / math.sqrt(size)
    )[0]


class _WrittenAttention(torch.autograd.Function):
    """Attention on a CPU as plain products, with the passes over `[rows, heads, length, length]` counted.

    Rows are taken a few at a time, so that their scores stay in the cache from one pass to the next.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor, p: float) -> Tensor:
        rows, length, _, heads, size = qkv.shape
        query, key, value = (part.flatten(0, 1) for part in qkv.permute(2, 0, 3, 1, 4).contiguous())
        probabilities = query.new_empty(rows * heads, length, length)
        bits = dropout.draw_bits(probabilities.shape) if p > 0.0 else None
        attended = torch.empty_like(query)
        bias = torch.zeros(mask.shape, dtype=qkv.dtype).masked_fill_(~mask, -math.inf)
        for piece, few in _pieces(rows, heads, length):
            scores = torch.baddbmm(
                query.new_empty(()), query[piece], key[piece].transpose(1, 2), beta=0, alpha=1 / math.sqrt(size)
            )
            scores.view(-1, heads, length, length).add_(bias[few])
            chances = probabilities[piece]
            torch.softmax(scores, -1, out=chances)
            dropped = chances if bits is None else dropout.kept(bits[piece], p, scores).mul_(chances)
            torch.baddbmm(
                query.new_empty(()), dropped, value[piece], beta=0, alpha=dropout.scale(p), out=attended[piece]
            )
        ctx.save_for_backward(query, key, value, probabilities, bits)
        ctx.p, ctx.shape = p, qkv.shape
        return attended.view(rows, heads, length, size).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        query, key, value, probabilities, bits = ctx.saved_tensors
        rows, length, _, heads, size = ctx.shape
        gradient = gradient.transpose(1, 2).reshape(rows * heads, length, size)
        gradients = query.new_empty(3, rows * heads, length, size)
        factor, keep_scale = 1 / math.sqrt(size), dropout.scale(ctx.p)
        unused = query.new_empty(())
        for piece, _ in _pieces(rows, heads, length):
            of_attended, chances = gradient[piece], probabilities[piece]
            of_chances = torch.baddbmm(unused, of_attended, value[piece].transpose(1, 2), beta=0, alpha=keep_scale)
            dropped = chances
            if bits is not None:
                keep = dropout.kept(bits[piece], ctx.p, chances)
                of_chances.mul_(keep)
                dropped = keep.mul_(chances)
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
            dropped = dropped.transpose(1, 2)
            for out, left, right, alpha in (
                (gradients[0], of_scores, key, factor),
                (gradients[1], of_scores.transpose(1, 2), query, factor),
                (gradients[2], dropped, gradient, keep_scale),
            ):
                torch.baddbmm(unused, left, right[piece], beta=0, alpha=alpha, out=out[piece])
        return gradients.view(3, rows, heads, length, size).permute(1, 3, 0, 2, 4).contiguous(), None, None


PIECE_NUMBERS = 2**19
"""Scores that are worked on at a time: 2 MB in fp32, with two more buffers of their size beside them."""


def _pieces(rows: int, heads: int, length: int) -> list[tuple[slice, slice]]:
    """The batch in pieces of whole rows: slices of `rows × heads` and of `rows`."""
    step = max(1, PIECE_NUMBERS // (heads * length * length))
    return [
        (slice(start * heads, (start + step) * heads), slice(start, start + step)) for start in range(0, rows, step)
    ]
