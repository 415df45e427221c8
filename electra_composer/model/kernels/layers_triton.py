"""Residual, dropout and LayerNorm as one operator, and GELU with its bias, for CUDA, in Triton.

Each is one kernel in the forward and two in the backward, of which the second adds the sums that the first has made
over blocks of rows: the gradients of weights and biases do not depend on the order in which programs run. The kernels
are in layers_triton_kernels.py; they are chosen where encoder.py and heads.py say `fused`.

Saved for the backward are the inputs and two numbers per row. Dropout is recomputed from its seed, which is a number on
the device, so nothing here waits for the device and a CUDA graph can capture it. As in dropout.py, probabilities are
rounded to multiples of 2^-16.
"""

import torch
import triton
from torch import Tensor

from electra_composer.model.kernels import dropout
from electra_composer.model.kernels.layers_triton_kernels import (
    add_norm as add_norm_kernel,
)
from electra_composer.model.kernels.layers_triton_kernels import (
    add_norm_gradient,
    gelu_gradient,
    sum_partials,
)
from electra_composer.model.kernels.layers_triton_kernels import (
    gelu as gelu_kernel,
)

BLOCK_ELEMENTS = 2048
"""Elements of a program's block: 16 per thread with four warps."""

PROGRAMS = 512
"""Most programs of a backward, each with a sum for every column; a constant, for the same results on all GPUs."""

GELU_COLUMNS = 256


def block_sizes(width: int) -> dict[str, int]:
    """Return the block of rows and columns for kernels that hold complete rows."""
    block = max(16, triton.next_power_of_2(width))
    return {"ROWS": max(1, BLOCK_ELEMENTS // block), "BLOCK": block}


def split(count: int, rows: int, programs: int) -> tuple[int, int]:
    """Divide `count` rows among at most `programs` programs: rows of each, a multiple of `rows`, and programs."""
    each = triton.cdiv(triton.cdiv(count, programs), rows) * rows
    return each, triton.cdiv(count, each)


def dropout_arguments(p: float) -> tuple[int, float]:
    """Return how many of 2^16 values mean "drop", and the factor of the kept elements."""
    threshold = dropout.threshold(p)
    return threshold, dropout.scale(p) if threshold < dropout.LEVELS else 0.0


def add_partials(partials: Tensor, *outputs: Tensor) -> None:
    """Sum `partials [len(outputs), programs, width]` over programs into the outputs `[width]`."""
    parts, programs, width = partials.shape
    first, second, third = [*outputs, *outputs[:1] * 2][:3]
    sum_partials[(triton.cdiv(width, 32), parts)](
        partials, first, second, third, programs, width, PARTS=64, BLOCK=32, num_warps=4
    )


@torch.library.custom_op("electra_composer::add_norm", mutates_args=())
def add_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `LayerNorm(residual + dropout(x + bias))`.

    Args:
        x: floats `[..., width]`, such as the output of a linear layer without its bias.
        bias: `[width]`, or None.
        residual: the shape of `x`, or None.
        weight, shift: of LayerNorm, `[width]`.
        seed: int64, one number on the device; None: no dropout.
        p: probability of dropout.
        eps: of LayerNorm.

    Returns:
        The result twice, in the dtype of `residual` (of `x` without) and in that of `x`: one for the next residual, one
        for the next matrix product, so that the backward gets both gradients and adds them itself. Then mean and
        1 / standard deviation of every row, fp32, for the backward.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    width = x.shape[-1]
    count, sizes = x.numel() // width, block_sizes(width)
    stream, product = torch.empty_like(x if residual is None else residual), torch.empty_like(x)
    means, rstds = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    add_norm_kernel[(triton.cdiv(count, sizes["ROWS"]),)](
        x, weight if bias is None else bias, x if residual is None else residual, weight, shift,
        means if seed is None else seed, stream, product, means, rstds, count, width, eps, *dropout_arguments(p),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, DROPOUT=seed is not None, num_warps=4, **sizes,
    )  # fmt: skip
    return stream, product, means, rstds


@add_norm.register_fake
def _(x, bias, residual, weight, shift, seed, p, eps):
    statistic = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return *_empty(x if residual is None else residual, x), statistic, torch.empty_like(statistic)


@torch.library.custom_op("electra_composer::add_norm_backward", mutates_args=())
def add_norm_backward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    seed: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    of_stream: Tensor | None,
    of_product: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `x`, `residual`, `weight`, `shift` and `bias`; empty where there is no such input."""
    x = x.contiguous()
    residual, of_stream, of_product = (None if t is None else t.contiguous() for t in (residual, of_stream, of_product))
    width = x.shape[-1]
    count, sizes = x.numel() // width, block_sizes(width)
    each, programs = split(count, sizes["ROWS"], PROGRAMS)
    of_x, of_weight, of_shift = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    of_residual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    of_bias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    partials = x.new_empty(2 if bias is None else 3, programs, width, dtype=torch.float32)
    add_norm_gradient[(programs,)](
        x, weight if bias is None else bias, x if residual is None else residual, weight,
        means if seed is None else seed, means, rstds, x if of_stream is None else of_stream,
        x if of_product is None else of_product, of_x, of_residual, partials,
        count, width, each, *dropout_arguments(p),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, DROPOUT=seed is not None,
        HAS_STREAM=of_stream is not None, HAS_PRODUCT=of_product is not None, num_warps=4, **sizes,
    )  # fmt: skip
    add_partials(partials, of_weight, of_shift, *([] if bias is None else [of_bias]))
    return of_x, of_residual, of_weight, of_shift, of_bias


@add_norm_backward.register_fake
def _(x, bias, residual, weight, seed, means, rstds, of_stream, of_product, p):
    return _empty(x, residual, weight, weight, bias, like=x)


def _empty(*tensors, like=None):
    """Return an empty contiguous tensor like each; one without elements for None."""
    return tuple(
        like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in tensors
    )


def _save_for_norm(ctx, inputs, output):
    x, bias, residual, weight, _, seed, p, _ = inputs
    ctx.save_for_backward(x, bias, residual, weight, seed, *output[2:])
    ctx.p = p
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx, of_stream, of_product, *_):
    if of_stream is None and of_product is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # under activation checkpointing it can be read once
    _, bias, residual, *_ = saved
    of_x, of_residual, of_weight, of_shift, of_bias = add_norm_backward(*saved, of_stream, of_product, ctx.p)
    of_bias, of_residual = None if bias is None else of_bias, None if residual is None else of_residual
    return of_x, of_bias, of_residual, of_weight, of_shift, None, None, None


add_norm.register_autograd(_norm_backward, setup_context=_save_for_norm)


@torch.library.custom_op("electra_composer::gelu_bias", mutates_args=())
def gelu_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Compute the exact GELU (erf) of `x + bias`: floats `[..., width]` and `[width]` → the shape and dtype of `x`."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    count, sizes = x.numel() // width, _gelu_sizes(width)
    grid = (triton.cdiv(count, sizes["ROWS"]), triton.cdiv(width, sizes["BLOCK"]))
    gelu_kernel[grid](x, bias, out, count, width, num_warps=4, **sizes)
    return out


@gelu_bias.register_fake
def _(x, bias):
    return _empty(x)[0]


def _gelu_sizes(width: int) -> dict[str, int]:
    block = min(GELU_COLUMNS, max(16, triton.next_power_of_2(width)))
    return {"ROWS": BLOCK_ELEMENTS // block, "BLOCK": block}


@torch.library.custom_op("electra_composer::gelu_bias_backward", mutates_args=())
def gelu_bias_backward(x: Tensor, bias: Tensor, of_out: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `x` and `bias`."""
    x, of_out = x.contiguous(), of_out.contiguous()
    of_x, of_bias, width = torch.empty_like(x), torch.empty_like(bias), x.shape[-1]
    count, sizes = x.numel() // width, _gelu_sizes(width)
    column_blocks = triton.cdiv(width, sizes["BLOCK"])
    each, programs = split(count, sizes["ROWS"], max(1, 2 * PROGRAMS // column_blocks))
    partials = x.new_empty(1, programs, width, dtype=torch.float32)
    gelu_gradient[(programs, column_blocks)](
        x, bias, of_out, of_x, partials, count, width, each, num_warps=4, **sizes
    )  # fmt: skip
    add_partials(partials, of_bias)
    return of_x, of_bias


@gelu_bias_backward.register_fake
def _(x, bias, of_out):
    return _empty(x, bias)


gelu_bias.register_autograd(
    lambda ctx, of_out: gelu_bias_backward(*ctx.saved_tensors, of_out),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
