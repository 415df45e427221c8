"""Inputs and reference computations for the masked-LM tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes are static here; torch's fourth check, of dynamic shapes, takes as long as these together.
OPERATOR_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def make_inputs(
    count: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Make all arguments of `masked_lm`; padding rows hold garbage, some rows have weight 0."""
    generator = torch.Generator().manual_seed(seed)
    padded = -(-vocab_size // 64) * 64
    weight = torch.randn(padded, width, generator=generator) * (2.0 / math.sqrt(width))
    weight[vocab_size:] = 1e4
    bias = torch.randn(padded, generator=generator)
    bias[vocab_size:] = 1e6
    inputs = {
        "features": torch.randn(count, width, generator=generator).to(dtype),
        "weight": weight,
        "bias": bias,
        "targets": torch.randint(vocab_size, (count,), generator=generator),
        "row_weights": (torch.rand(count, generator=generator) > 0.2).float(),
        "noise": torch.rand(count, generator=generator),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    for name in ("features", "weight", "bias"):
        inputs[name].requires_grad_()
    return inputs


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Compute the gradients of 3.7 × `loss`, so that the incoming gradient is not 1."""
    return list(torch.autograd.grad(loss * 3.7, [inputs[name] for name in ("features", "weight", "bias")]))


def plain(inputs: dict[str, Tensor], vocab_size: int, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Compute loss, token losses and logits with autograd and all logits at once."""
    logits = F.linear(inputs["features"], inputs["weight"][:vocab_size], inputs["bias"][:vocab_size]).float()
    losses = F.cross_entropy(logits, inputs["targets"], reduction="none", label_smoothing=label_smoothing)
    return (losses * inputs["row_weights"]).sum(), losses, logits


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative distance in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def one_distribution(
    draws: int, vocab_size: int, spread: float = 1.5, target: int = 3
) -> tuple[dict[str, Tensor], Tensor]:
    """Make `draws` rows with the same logits `[vocab_size]`, given by the bias, and uniform noise."""
    padded = -(-vocab_size // 64) * 64
    bias = torch.full((padded,), 1e6)
    bias[:vocab_size] = torch.randn(vocab_size) * spread
    inputs = {
        "features": torch.zeros(draws, 16),
        "weight": torch.zeros(padded, 16),
        "bias": bias,
        "targets": torch.full((draws,), target),
        "row_weights": torch.ones(draws),
        "noise": torch.rand(draws),
    }
    return inputs, bias[:vocab_size]


def assert_distributed(sampled: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square test at level 0.001 (Wilson-Hilferty quantile)."""
    counts, expected = (
        torch.bincount(sampled.cpu(), minlength=len(probabilities)).double(),
        probabilities * len(sampled),
    )
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert freedom > 10
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
