"""kernels/dropout.py against the definition of dropout: rate, factor, independence and gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from electra_composer.model.kernels import dropout
from electra_composer.model.kernels.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.01])
def test_rate_and_factor_over_a_million_elements(p: float) -> None:
    """Dropped: a fraction p, within five standard errors and the resolution of 16 bits. Kept: x / (1 - p)."""
    x = torch.ones(1000, 1000)
    out = Dropout(p)(x)
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / x.numel()) + 2.0**-17
    values = out[out != 0].unique()
    assert values.numel() == 1
    assert values.item() == pytest.approx(1 / (1 - p), abs=1e-4)
    assert out.double().mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / x.numel()) + 1e-5)


def test_elements_are_independent() -> None:
    """Neighbours, which share a random word, are dropped independently."""
    dropped = (Dropout(0.3)(torch.ones(250_000, 4)) == 0).double()
    together = (dropped.T @ dropped / len(dropped)).fill_diagonal_(0.09)
    assert ((together - 0.09).abs() < 5 * math.sqrt(0.09 * 0.91 / len(dropped))).all()


def test_a_seed_says_everything_and_calls_differ() -> None:
    x, module = torch.randn(7, 5), Dropout(0.5)
    torch.manual_seed(3)
    first, second = module(x), module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradient_is_that_of_the_mask(shape: tuple[int, ...], with_residual: bool) -> None:
    x = torch.randn(shape, requires_grad=True)
    residual = torch.randn(shape, requires_grad=True) if with_residual else None
    out = Dropout(0.4)(x, residual)
    factor = torch.where((out if residual is None else out - residual) == 0, 0.0, dropout.scale(0.4))
    expected = x * factor if residual is None else residual + x * factor
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(shape)
    out.backward(upstream)
    torch.testing.assert_close(x.grad, upstream * factor)
    if residual is not None:
        torch.testing.assert_close(residual.grad, upstream)


def test_other_dtypes_and_layouts() -> None:
    """bf16 with an fp32 residual, as under autocast; transposed inputs."""
    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    out = Dropout(0.5)(x, torch.zeros(6, 8))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad == 0, out == 0)
    transposed = Dropout(0.5)(torch.arange(1.0, 13).view(3, 4).t())
    kept = transposed != 0
    torch.testing.assert_close(transposed[kept], torch.arange(1.0, 13).view(3, 4).t()[kept] * 2)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_evaluation_changes_nothing(p: float) -> None:
    x, residual = torch.randn(4, 4), torch.randn(4, 4)
    module = Dropout(p).eval()
    state = torch.get_rng_state()
    assert torch.equal(module(x), x)
    assert torch.equal(module(x, residual), x + residual)
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_dropped_is_zero() -> None:
    """p = 1 uses `F.dropout`, because the factor would be 1 / 0."""
    x = torch.randn(4, 4, requires_grad=True)
    out = Dropout(1.0)(x)
    out.sum().backward()
    assert (out == 0).all()
    assert (x.grad == 0).all()


def test_compiled_it_is_torchs_dropout() -> None:
    """One graph without breaks, reproducible from the seed."""
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="eager")
    x = torch.randn(9, 9)
    torch.manual_seed(1)
    out = compiled(x, x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, x + F.dropout(x, 0.5))
