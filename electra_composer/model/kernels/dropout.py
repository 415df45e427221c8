"""Dropout for the CPU, where random numbers for `F.dropout` take a quarter of a training step.

Each element uses 16 random bits, four elements per 64-bit number of NumPy's SFC64. It is seeded by one number from
torch's generator, so results are reproducible from torch's seed. CUDA and `torch.compile` use `F.dropout`, whose random
numbers are fused there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Workaround (torch 2.7): `F.dropout` on the CPU draws one double per element; goes when torch draws fewer bits there.
LEVELS = 2**16
"""Probabilities are rounded to multiples of 1 / LEVELS: 0.1 is 0.100006."""


class Dropout(nn.Module):
    """`nn.Dropout`, with an optional fused addition of a residual.

    Args:
        p: probability of zeroing an element; the others are divided by 1 - p.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    @property
    def is_active(self) -> bool:
        """Whether elements are dropped: in training, unless the probability is 0."""
        return self.training and self.p > 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Floats of any shape → the same shape: `dropout(x)`, or `residual + dropout(x)`."""
        if not self.is_active:
            return x if residual is None else residual + x
        if not serves(x, self.p):
            dropped = F.dropout(x, self.p)
            return dropped if residual is None else residual + dropped
        return _Dropout.apply(x, residual, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def serves(x: Tensor, p: float) -> bool:
    """Return whether this implementation is used for `x`: on a CPU, outside `torch.compile`, rounded `p` below 1."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and threshold(p) < LEVELS


def threshold(p: float) -> int:
    """Number of the `LEVELS` values of 16 bits that mean "drop"."""
    return round(p * LEVELS)


def scale(p: float) -> float:
    """Factor of the kept elements: 1 / (1 - p), with `p` rounded to 16 bits, so that the mean is preserved."""
    return LEVELS / (LEVELS - threshold(p))


def draw_bits(shape: torch.Size) -> Tensor:
    """Draw uniform int16 numbers of this shape, seeded by torch's default CPU generator."""
    count = shape.numel()
    seed = int(torch.empty((), dtype=torch.int64).random_())
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.int16)[:count]).view(shape)


def kept(bits: Tensor, p: float, like: Tensor) -> Tensor:
    """Return 1 where an element is kept and 0 where it is dropped, with shape and dtype of `like`.

    Floats, because products of floats and booleans are not vectorised.
    """
    return torch.ge(bits, threshold(p) - LEVELS // 2, out=torch.empty_like(like, memory_format=torch.contiguous_format))


class _Dropout(torch.autograd.Function):
    """Autograd function that saves two bytes per element for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, p: float) -> Tensor:
        bits = draw_bits(x.shape)
        ctx.save_for_backward(bits)
        ctx.p, ctx.dtype = p, x.dtype
        factors = kept(bits, p, x)
        if residual is None:
            return factors.mul_(x).mul_(scale(p))
        if residual.dtype != x.dtype:
            return residual + factors.mul_(x).mul_(scale(p))
        return torch.addcmul(residual, x, factors, value=scale(p), out=factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        of_x = kept(bits, ctx.p, gradient).mul_(gradient).mul_(scale(ctx.p)).to(ctx.dtype)
        return of_x, gradient if ctx.needs_input_grad[1] else None, None
