"""What PyTorch and the model do on CUDA, for fake CPU tensors; used by launches.py."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_composer.model.kernels import dropout, masked_lm


def yes(*options: Any) -> bool:
    return True


def _no(*options: Any) -> bool:
    return False


def _triton(*options: Any) -> str:
    return "triton"


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Select, for CPU tensors, what PyTorch and the model do on CUDA under bf16 autocast."""
    layer_norm, aten = F.layer_norm, torch.ops.aten

    def fp32_norm(x: Tensor, shape: Any, *others: Any, **options: Any) -> Tensor:
        return layer_norm(x.float(), shape, *others, **options)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float = 0.0) -> Tensor:
        bias = attn_mask
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), -math.inf)
        bias = bias.expand(-1, query.shape[1], -1, -1)
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p)[0]

    def dropped(x: Tensor, p: float) -> Tensor:
        return torch.native_dropout(x, p, True)[0]

    # Workaround (torch 2.7): the question whether tensors are processed as lists is private; goes when fake CUDA
    # tensors can be made, and their gradients computed, without a GPU.
    lists = "torch.nn.utils.clip_grad._has_foreach_support"
    with (
        mock.patch.object(F, "layer_norm", fp32_norm),
        mock.patch.object(F, "dropout", dropped),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(dropout, "serves", _no),
        mock.patch.object(masked_lm, "resolve_implementation", _triton),
        mock.patch(lists, yes),
    ):
        yield
