"""Rows of examples, and random queries, keys and values, for the tests of attention in Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton_interpreter import DEVICE, ON_GPU


def fewer_on_a_gpu(values: list[Any], on_gpu: list[Any]) -> list[Any]:
    """A GPU compiles two kernels for each value, which takes seconds."""
    return on_gpu if ON_GPU else values


def make_ids(length: int, lengths: list[list[int]]) -> Tensor:
    """Rows of examples of these lengths, filled up with padding."""
    ids = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, examples in zip(ids, lengths, strict=True):
        numbers = torch.arange(1, len(examples) + 1).repeat_interleave(torch.tensor(examples, dtype=torch.long))
        row[: len(numbers)] = numbers[:length]
    return ids.to(DEVICE)


def usual_ids(length: int) -> Tensor:
    """One example; several and padding; examples of one token; padding alone."""
    return make_ids(length, [[length], [length // 3, length // 4], [1] * (length - length // 5), []])


def make_qkv(ids: Tensor, heads: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*ids.shape, 3 * heads * size, device=DEVICE).to(dtype).requires_grad_()
