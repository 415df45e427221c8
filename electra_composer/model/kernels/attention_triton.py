"""Attention within the examples of short rows for CUDA, in Triton; see attention.py.

A program computes a block of queries of one row and head, with the scores in registers. It reads queries, keys and
values where the projection wrote them, and the numbers of the examples instead of a mask; keys of other examples than
the block's are skipped. The forward stores the result and, for the backward, each query's log-sum-exp. The backward
recomputes the probabilities and writes the gradients where the projection's backward reads them. Nothing is added
atomically, so the same inputs give the same gradients.

Dropout is decided by Philox, keyed by a seed in device memory and counted by the places of query and key, and is
decided again in the backward. The seed is a tensor, so that a CUDA graph that contains its drawing has new random
numbers in every replay. Probabilities are dropped with `p` rounded to 16 bits, as in dropout.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from electra_composer.model.kernels import attention_triton_kernels as kernels
from electra_composer.model.kernels import dropout
from electra_composer.model.kernels.product_precision import product_precision

MAX_LENGTH: int = kernels.MAX_LENGTH.value
"""Tokens of the longest row."""

MAX_HEAD_SIZE = 128
"""Numbers of a head: larger ones leave no registers for the scores."""


class Launch(NamedTuple):
    """How a kernel is launched; chosen so that no registers are spilled (see benchmarks/compile_kernels.py)."""

    block: int
    """Tokens of a program: queries in the forward, and each token once as key and once as query in the backward."""
    step: int
    """Tokens of the other side that are processed together."""
    warps: int
    stages: int
    """Steps whose loads are in flight."""


def forward_launch(length: int, head_size: int, dtype: torch.dtype) -> Launch:
    """Return the launch of the forward for rows of `length` tokens."""
    padded = _padded_length(length)
    if dtype == torch.float32:
        return Launch(32, 32, 8, 1)
    if head_size > 64:
        return Launch(min(padded, 128), 32, 8, 2)
    if padded <= 128:
        return Launch(padded, padded, 4 if padded <= 64 else 8, 1)
    return Launch(128, 64, 8, 2)


def backward_launch(length: int, head_size: int, dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    """Return the launch of the backward; `step == block`: the row is one tile, whose scores are computed once.

    A tile of 128 × 128 needs products that read shared memory (compute capability 9.0); others hold their factors in
    registers.
    """
    padded = _padded_length(length)
    if dtype == torch.float32:
        return Launch(32, 32, 8, 1)
    if padded <= 64 or (padded <= 128 and capability >= (9, 0)):
        return Launch(padded, padded, 4 if padded <= 64 and head_size <= 64 else 8, 1)
    return Launch(128, 32, 8, 1) if head_size <= 64 else Launch(32, 32, 8, 1)


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return that of a CUDA device; (0, 0) in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _padded_length(length: int) -> int:
    """Smallest tile of a row: dropout decides for 32 keys together."""
    return max(32, triton.next_power_of_2(length))


def unsupported(length: int, head_size: int) -> str | None:
    """Return why rows of this length, with heads of this size, are not supported, or None."""
    if length > MAX_LENGTH:
        return f"rows of {length} tokens; expected at most {MAX_LENGTH}"
    if head_size > MAX_HEAD_SIZE:
        return f"heads of size {head_size}; expected at most {MAX_HEAD_SIZE}"
    return None


@torch.library.custom_op("electra_composer::attention_triton", mutates_args=())
def attention_triton(
    qkv: Tensor, sequence_ids: Tensor, seed: Tensor, num_heads: int, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention within examples.

    Args:
        qkv: fp32, bf16 or fp16 `[rows, length, 3 × hidden_size]`: queries, keys and values, each a concatenation of
            heads.
        sequence_ids: integers `[rows, length]`; tokens attend to tokens with the same number.
        seed: int64 with one element, on the same device; not read without dropout.
        num_heads: heads in `hidden_size`.
        dropout_p: probability of zeroing a probability.

    Returns:
        The result `[rows, length, hidden_size]`, dtype of `qkv`, and the log-sum-exp of each query's scores in base 2,
        fp32 `[rows, num_heads, length]`, for the backward.

    Raises:
        ValueError: rows or heads that are too long.
    """
    rows, length, width = qkv.shape
    hidden, size = width // 3, width // 3 // num_heads
    if reason := unsupported(length, size):
        raise ValueError(f"Triton's attention got {reason}: use the path sdpa")
    qkv, sequence_ids = qkv.contiguous(), sequence_ids.contiguous()
    out = qkv.new_empty(rows, length, hidden)
    logsumexp = qkv.new_empty(rows, num_heads, length, dtype=torch.float32)
    launch = forward_launch(length, size, qkv.dtype)
    blocks = triton.cdiv(length, launch.block)
    kernels.forward[(rows * num_heads * blocks,)](
        qkv, sequence_ids, seed, out, logsumexp, length, blocks, *_numbers(size, dropout_p),
        BLOCK_L=_padded_length(length), STEP=launch.step, **_constants(num_heads, size, launch, dropout_p),
    )  # fmt: skip
    return out, logsumexp


@attention_triton.register_fake
def _(qkv, sequence_ids, seed, num_heads, dropout_p):
    rows, length, width = qkv.shape
    return qkv.new_empty(rows, length, width // 3), qkv.new_empty(rows, num_heads, length, dtype=torch.float32)


@torch.library.custom_op("electra_composer::attention_triton_backward", mutates_args=())
def _backward_kernel(
    grad_out: Tensor,
    qkv: Tensor,
    sequence_ids: Tensor,
    seed: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    dropout_p: float,
) -> Tensor:
    """Compute the gradient of `qkv`, with its shape and dtype."""
    rows, length, width = qkv.shape
    size = width // 3 // num_heads
    grad_out, qkv, sequence_ids = grad_out.contiguous(), qkv.contiguous(), sequence_ids.contiguous()
    grad_qkv = torch.empty_like(qkv)
    launch = backward_launch(length, size, qkv.dtype, compute_capability(qkv.device))
    constants, numbers = _constants(num_heads, size, launch, dropout_p), _numbers(size, dropout_p)
    if length <= launch.step == launch.block:
        kernels.backward_of_tile[(rows * num_heads,)](
            qkv, sequence_ids, seed, logsumexp, grad_out, grad_qkv, length, *numbers, **constants
        )
    else:
        blocks = triton.cdiv(length, launch.block)
        kernels.backward[(rows * num_heads * blocks,)](
            qkv, sequence_ids, seed, out, logsumexp, grad_out, grad_qkv, length, blocks, *numbers,
            BLOCK_L=_padded_length(length), STEP=launch.step, **constants,
        )  # fmt: skip
    return grad_qkv


@_backward_kernel.register_fake
def _(grad_out, qkv, *options):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _numbers(size: int, dropout_p: float) -> tuple[float, int, float]:
    """Return the factor of the scores, the threshold of the random numbers, and the factor of what is kept."""
    threshold = dropout.threshold(dropout_p)
    return 1 / math.sqrt(size), threshold, dropout.scale(dropout_p) if threshold < dropout.LEVELS else 0.0


def _constants(num_heads: int, size: int, launch: Launch, dropout_p: float) -> dict[str, object]:
    return {
        "HEADS": num_heads,
        "HEAD_SIZE": size,
        "BLOCK_D": max(16, triton.next_power_of_2(size)),
        "BLOCK": launch.block,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": product_precision(),
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }


def _setup_context(ctx, inputs, output):
    qkv, sequence_ids, seed, ctx.num_heads, ctx.dropout_p = inputs
    ctx.save_for_backward(qkv, sequence_ids, seed, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or every backward fills a tensor with zeros for it


def _backward(ctx, grad_out, _):
    return _backward_kernel(grad_out, *ctx.saved_tensors, ctx.num_heads, ctx.dropout_p), None, None, None, None


attention_triton.register_autograd(_backward, setup_context=_setup_context)
