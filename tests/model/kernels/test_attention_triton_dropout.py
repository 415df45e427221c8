"""Dropout of attention in Triton against Philox in NumPy; run by test_attention_triton.py without a GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_inputs import make_ids, make_qkv, usual_ids
from philox import keep_factors, philox
from torch import Tensor
from triton_interpreter import DEVICE, KERNEL_MARKS, ON_GPU, multiply_bf16

from electra_composer.model.kernels.attention import attention, pattern_of

pytest.importorskip("triton")

from electra_composer.model.kernels.attention_triton import attention_triton


@pytest.fixture
def _bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bf16(monkeypatch)


def identity_values(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values that show the probabilities: one head of size `length`, values are the identity."""
    query, key = torch.randn(2, rows, length, length, device=DEVICE) / length**0.25
    return query, key, torch.eye(length, device=DEVICE).expand(rows, -1, -1)


class TestKernels:
    pytestmark = KERNEL_MARKS

    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        torch.manual_seed(0)

    @pytest.mark.parametrize("length", [24, 40])
    def test_kernel_drops_as_philox_decides(self, length: int) -> None:
        """Values that are the identity show the probabilities."""
        rows, p, seed = 2, 0.3, 2**40 + 12345
        query, key, value = identity_values(rows, length)
        ids = make_ids(length, [[length - 5, 3], [length]])
        qkv = torch.cat([query, key, value], -1)
        given_seed = torch.tensor([seed], device=DEVICE)
        out, _ = attention_triton(qkv, ids, given_seed, 1, p)
        chances, _ = attention_triton(qkv, ids, given_seed, 1, 0.0)
        factors = keep_factors(seed, rows, 1, length, p)[:, 0].to(DEVICE)
        torch.testing.assert_close(out, (chances * factors).float())

    @pytest.mark.parametrize(
        ("length", "size", "dtype"), [(24, 8, torch.float32), (40, 8, torch.float32), (100, 16, torch.bfloat16)]
    )
    @pytest.mark.usefixtures("_bf16")
    def test_kernel_backward_drops_what_the_forward_dropped(self, length: int, size: int, dtype: torch.dtype) -> None:
        """Values and gradients against autograd through the formula, with the factors from NumPy."""
        rows, heads, p, seed = 1, 2, 0.3, 987654321
        ids = make_ids(length, [[length // 2, length // 3]])
        qkv = make_qkv(ids, heads, size, dtype)
        out, _ = attention_triton(qkv, ids, torch.tensor([seed], device=DEVICE), heads, p)
        upstream = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, qkv, upstream)

        exact = qkv.detach().double().requires_grad_()
        query, key, value = exact.view(rows, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / math.sqrt(size)
        chances = scores.masked_fill((ids[:, :, None] != ids[:, None, :])[:, None], -math.inf).softmax(-1)
        factors = keep_factors(seed, rows, heads, length, p).to(DEVICE)
        expected = ((chances * factors) @ value).transpose(1, 2).flatten(2)
        (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(gradient.double(), expected_gradient, atol=tolerance, rtol=tolerance)

    def test_kernel_drops_everything(self) -> None:
        ids = usual_ids(9)
        qkv = make_qkv(ids, 1, 8)
        out, _ = attention_triton(qkv, ids, torch.zeros(1, dtype=torch.long, device=DEVICE), 1, 1.0)
        out.sum().backward()
        assert (out == 0).all()
        assert qkv.grad is not None
        assert (qkv.grad == 0).all()

    @pytest.mark.parametrize("length", [20, 40])
    def test_kernel_repeats_itself_to_the_bit(self, length: int) -> None:
        ids = make_ids(length, [[length - 3]])
        qkv, seed = make_qkv(ids, 1, 16), torch.tensor([7], device=DEVICE)
        results = []
        for number in (seed, seed, seed + 1):
            out, _ = attention_triton(qkv, ids, number, 1, 0.2)
            results.append((out, torch.autograd.grad(out.square().sum(), qkv)[0]))
        for first, second, other in zip(*results, strict=True):
            assert torch.equal(first, second)
            assert not torch.equal(first, other)

    def test_kernel_is_seeded_by_torch(self) -> None:
        """A layer's seed does not depend on the other layers, and each layer has its own."""
        ids = make_ids(20, [[12, 5]])
        qkv, pattern = make_qkv(ids, 1, 16), pattern_of(ids, "triton")

        def results() -> list[Tensor]:
            torch.manual_seed(3)
            layers = [attention(qkv, of_layer, 1, 0.2) for of_layer in pattern.of_layers(2, 0.2)]
            return [*layers, attention(qkv, pattern, 1, 0.2)]

        first, second = results(), results()
        assert all(map(torch.equal, first, second))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[1], first[2])


def test_philox_against_published_numbers() -> None:
    """The test vector of the authors' library Random123 for 7 rounds (tests/kat_vectors)."""
    words = philox(np.zeros(4, dtype=np.uint32), (0, 0))
    assert [f"{word:08x}" for word in words] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]


def test_rate_of_the_factors() -> None:
    """Kept: a fraction 1 - p within five standard errors, also of two neighbours that share a call of Philox."""
    p = 0.1
    kept = keep_factors(3, 4, 4, 128, p) > 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel()) + 2.0**-17
    both = ~kept[..., :8] & ~kept[..., 8:16]
    assert abs(both.double().mean().item() - p**2) < 5 * math.sqrt(p**2 / both.numel())


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize(("length", "p"), [(128, 0.1), (512, 0.1)])
def test_true_size_drops_as_philox_decides(length: int, p: float) -> None:
    ids = usual_ids(length)
    qkv = make_qkv(ids, 1, 64, torch.bfloat16)
    value = torch.zeros(4, length, 64, device="cuda")
    value[:, :64] = torch.eye(64, device="cuda")
    qkv = torch.cat([qkv.detach()[..., :128], value.bfloat16()], -1)
    out, _ = attention_triton(qkv, ids, torch.tensor([11], device="cuda"), 1, p)
    chances, _ = attention_triton(qkv, ids, ids, 1, 0.0)
    factors = keep_factors(11, 4, 1, length, p)[:, 0, :, :64].cuda()
    torch.testing.assert_close(out.double(), chances.double() * factors, atol=1e-2, rtol=2e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_cuda_graph_draws_anew_in_each_replay_and_follows_the_seed() -> None:
    ids = usual_ids(128)
    qkv, pattern = make_qkv(ids, 2, 64, torch.bfloat16), pattern_of(ids, "triton")

    def run() -> Tensor:
        return attention(qkv, pattern.of_layers(1, 0.1)[0], 2, 0.1)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    results = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        graph.replay()
        results.append(captured.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
