"""Self-attention within examples, with the fastest implementation for each device.

A row may hold several examples and padding; tokens attend to tokens of their own example, or, if causal, to themselves
and those before them. :class:`AttentionPattern` holds the description of a batch that the four equivalent
implementations need:

* `sdpa`: `F.scaled_dot_product_attention` with a mask; any device.
* :class:`_WrittenAttention`: replaces `sdpa` on a CPU where torch's is slow: training with dropout, short rows in bf16.
* `varlen`: flash attention over concatenated examples, without a mask; CUDA.
* `triton`: rows of at most 512 tokens, without a mask; CUDA, see attention_triton.py. Not causal: where it is chosen,
  causal attention takes `sdpa`.
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
    """Which tokens attend to each other in a batch `[rows, length]`, for one path. Built once per forward."""

    bias: Tensor | None = None
    """`sdpa`: floats `[rows, 1, length, length]` to be added to the scores: 0, or minus infinity between examples and,
    if causal, for later tokens. Torch makes this of a boolean mask in every call, on every device; built once, it is
    shared by all layers."""
    boundaries: Tensor | None = None
    """`varlen`: int32 `[maximum of examples + 1]`: starts of the examples in the flattened rows, then the end,
    repeated."""
    causal: bool = False
    """`varlen`: whether a token attends to no later one; the bias of `sdpa` contains it."""
    sequence_ids: Tensor | None = None
    """`triton`: integers `[rows, length]`."""
    seed: Tensor | None = None
    """`triton`: int64 `[1]` for the dropout of one call."""

    def of_layers(self, layers: int, dropout_p: float) -> list[AttentionPattern]:
        """Give each layer of an encoder its seed, drawn from torch's generator on the device by one call."""
        if self.sequence_ids is None or dropout_p == 0.0:
            return [self] * layers
        seeds = _draw_seeds(self.sequence_ids, layers).split(1)
        return [AttentionPattern(sequence_ids=self.sequence_ids, seed=seed) for seed in seeds]


def pattern_of(
    sequence_ids: Tensor, path: str = "sdpa", most_examples: int | None = None, causal: bool = False
) -> AttentionPattern:
    """Build the attention pattern of a batch.

    Args:
        sequence_ids: integers `[rows, length]`; 0 for padding, otherwise the example's number in the row, from 1.
        path: `sdpa`, `varlen` or `triton`.
        most_examples: for `varlen`, see :func:`boundaries_of`.
        causal: whether a token attends to no later one. The pattern for `triton` is then that for `sdpa`.

    Padding attends to padding: an empty row of the softmax would be NaN. Its output is not used.
    """
    if path == "triton" and not causal:
        return AttentionPattern(sequence_ids=sequence_ids)
    if path == "varlen":
        return AttentionPattern(boundaries=boundaries_of(sequence_ids, most_examples), causal=causal)
    device_type = sequence_ids.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else torch.get_default_dtype()
    differ = sequence_ids[:, None, :, None] != sequence_ids[:, None, None, :]
    excluded = differ | torch.ones_like(differ[0, 0]).triu(1) if causal else differ
    bias = torch.zeros(excluded.shape, dtype=dtype, device=excluded.device).masked_fill(excluded, -math.inf)
    return AttentionPattern(bias=bias)


def boundaries_of(sequence_ids: Tensor, most: int | None = None) -> Tensor:
    """Return the starts of all examples, and of each row's padding, in the flattened rows, followed by their end.

    The shape is static, as CUDA graphs require. Unused entries hold the end, so their examples are empty; each still
    costs a block of every kernel.

    Args:
        sequence_ids: integers `[rows, length]`.
        most: bound of the examples and runs of padding; more are an error, on CUDA an assertion on the device. By
            default as many as there can be: an example has at least two tokens, `[CLS]` and `[SEP]`.

    Returns:
        int32 `[most + 1]`.
    """
    rows, length = sequence_ids.shape
    total, possible = rows * length, rows * (length // 2 + 1)
    most = possible if most is None else min(most, possible)
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    starts = starts.flatten()
    if most < possible:
        # Workaround (torch 2.7): private function; goes when there is a public one that does not wait for the device.
        torch._assert_async(starts.sum() <= most, f"a batch has more than the {most} examples of its bound")
    places = torch.arange(total, dtype=torch.int32, device=sequence_ids.device)
    # The n-th start goes to entry n; all other tokens go to the last entry, which is always the end.
    order = torch.where(starts, starts.cumsum(0) - 1, most)
    boundaries = torch.full((most + 1,), total, dtype=torch.int32, device=sequence_ids.device)
    return boundaries.scatter_reduce(0, order, torch.where(starts, places, total), "amin")


class ExampleBound:
    """Bound of the examples and runs of padding in a microbatch, for :func:`boundaries_of`.

    It is well above what is expected, so that nearly all batches have boundaries of one shape, and a fraction of what
    is possible: 577 instead of 8,320 for 128 rows of 128 tokens with 1.67 examples each.

    Args:
        rows: of a microbatch, at most.
        length: tokens of a row.
        examples_per_row: mean over the data.
    """

    def __init__(self, rows: int, length: int, examples_per_row: float):
        self.rows = rows
        self.possible = rows * (length // 2 + 1)
        self.expected = min(self.possible, math.ceil(1.5 * rows * (examples_per_row + 1)) + 64)

    def of(self, sequence_ids: Tensor) -> int:
        """Return the bound for the microbatches of a batch, `[all rows, length]` on the host."""
        starts = (sequence_ids[:, 1:] != sequence_ids[:, :-1]).sum(1) + 1
        fullest = starts.topk(min(self.rows, len(starts))).values.sum()
        return self.expected if fullest <= self.expected else self.possible


def attention(qkv: Tensor, pattern: AttentionPattern, num_heads: int, dropout_p: float = 0.0) -> Tensor:
    """Compute softmax attention, `softmax(Q Kᵀ / sqrt(D)) V` per head, with dropout on the probabilities.

    Args:
        qkv: `[rows, length, 3 × hidden_size]`: queries, keys and values, each a concatenation of heads.
        pattern: which tokens attend to each other.
        num_heads: heads in `hidden_size`.
        dropout_p: 0 outside training.

    Returns:
        `[rows, length, hidden_size]`, dtype of `qkv`.
    """
    if pattern.sequence_ids is not None:
        return _triton(qkv, pattern.sequence_ids, pattern.seed, num_heads, dropout_p)
    rows, length, width = qkv.shape
    qkv = qkv.view(rows, length, 3, num_heads, width // (3 * num_heads))
    if pattern.boundaries is not None:
        attended = _flash(qkv, pattern.boundaries, pattern.causal, dropout_p)
        return attended.reshape(rows, length, width // 3)
    assert pattern.bias is not None
    bias = pattern.bias.to(qkv.dtype)  # differs where the parameters are in half precision, as under FSDP
    if dropout.serves(qkv, dropout_p) and (dropout_p > 0.0 or _is_short_bf16(qkv)):
        attended = _WrittenAttention.apply(qkv, bias, dropout_p)
    else:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p)
        attended = attended.transpose(1, 2)
    return attended.reshape(rows, length, width // 3)


def _triton(qkv: Tensor, sequence_ids: Tensor, seed: Tensor | None, num_heads: int, dropout_p: float) -> Tensor:
    from electra_composer.model.kernels.attention_triton import attention_triton

    device_type = qkv.device.type
    if torch.is_autocast_enabled(device_type):
        qkv = qkv.to(torch.get_autocast_dtype(device_type))
    if dropout_p == 0.0:
        seed = sequence_ids  # not read
    elif seed is None:
        seed = _draw_seeds(sequence_ids, 1)
    return attention_triton(qkv, sequence_ids, seed, num_heads, dropout_p)[0]


def _draw_seeds(sequence_ids: Tensor, count: int) -> Tensor:
    """Draw int64 `[count]` on the device, without synchronisation; a CUDA graph draws them anew in each replay."""
    return torch.randint(2**62, (count,), device=sequence_ids.device)


SHORT = 256
"""Up to this length, products of complete rows in bf16 on a CPU are faster than torch's flash attention: 3.2 × at 128,
1.9 × at 256 (benchmarks/RESULTS.md)."""


def _is_short_bf16(qkv: Tensor) -> bool:
    return qkv.dtype == torch.bfloat16 and qkv.shape[1] <= SHORT


def _flash(qkv: Tensor, boundaries: Tensor, causal: bool, dropout_p: float) -> Tensor:
    """`[rows, length, 3, heads, head size]` in bf16 or fp16 → `[rows × length, heads, head size]`."""
    rows, length, _, heads, size = qkv.shape
    padded = F.pad(qkv, (0, -size % 8)) if size % 8 else qkv  # multiples of 8 are expected; zeros change no score
    query, key, value = padded.view(rows * length, 3, heads, -1).unbind(1)
    return _flash_forward(query, key, value, boundaries, length, dropout_p, causal, 1 / math.sqrt(size))[..., :size]


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    length: int,
    dropout_p: float,
    causal: bool,
    scale: float,
) -> Tensor:
    # Workaround (torch 2.7): flash attention (Dao 2023) is called by its private operator, because
    # scaled_dot_product_attention has no argument for examples of different lengths and flex_attention has no dropout;
    # goes when a public function has both.
    return torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, length, length, dropout_p, causal, False, scale=scale
    )[0]


# Workaround (torch 2.7): on a CPU, scaled_dot_product_attention with dropout or with short rows in bf16 is slow; goes
# when torch is as fast there.
class _WrittenAttention(torch.autograd.Function):
    """Attention on a CPU as plain matrix products, with few passes over `[rows, heads, length, length]`.

    Rows are processed in pieces, so that their scores stay in the cache between passes.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, p: float) -> Tensor:
        rows, length, _, heads, size = qkv.shape
        query, key, value = (part.flatten(0, 1) for part in qkv.permute(2, 0, 3, 1, 4).contiguous())
        probabilities = query.new_empty(rows * heads, length, length)
        bits = dropout.draw_bits(probabilities.shape) if p > 0.0 else None
        attended = torch.empty_like(query)
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
            # Workaround (torch 2.7): private function; goes when softmax's backward has a public one.
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
"""Scores per piece: 2 MB in fp32, plus two buffers of the same size."""


def _pieces(rows: int, heads: int, length: int) -> list[tuple[slice, slice]]:
    """Split the batch into pieces of complete rows: slices of `rows × heads` and of `rows`."""
    step = max(1, PIECE_NUMBERS // (heads * length * length))
    return [
        (slice(start * heads, (start + step) * heads), slice(start, start + step)) for start in range(0, rows, step)
    ]
