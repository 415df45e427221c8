"""kernels/attention.py: each implementation against explicit attention, one example at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flash_stand_in import flash_forward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from electra_composer.model.kernels import attention as kernel
from electra_composer.model.kernels import dropout
from electra_composer.model.kernels.attention import ExampleBound, attention, boundaries_of, pattern_of

IDS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2, 2, 2, 2],
        [1, 1, 2, 2, 3, 3, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 2, 2, 3, 3, 4, 4],
    ]
)


def written_out(qkv: Tensor, ids: Tensor, heads: int, factors: Tensor | None = None, causal: bool = False) -> Tensor:
    """Attention per row, example and head; `factors [rows, heads, length, length]` multiply the probabilities."""
    rows, length, width = qkv.shape
    size = width // (3 * heads)
    out = torch.zeros(rows, length, heads, size, dtype=qkv.dtype)
    for row in range(rows):
        for example in ids[row].unique():
            places = (ids[row] == example).nonzero().squeeze(1)
            for head in range(heads):
                q, k, v = (qkv[row, places, part * heads * size + head * size :][:, :size] for part in range(3))
                later = torch.ones(len(q), len(q)).triu(1).bool() & causal
                chances = torch.softmax((q @ k.T / math.sqrt(size)).masked_fill(later, -math.inf), -1)
                if factors is not None:
                    chances = chances * factors[row, head][places][:, places]
                out[row, places, head] = chances @ v
    return out.reshape(rows, length, heads * size)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_is_attention_within_examples(heads: int, causal: bool) -> None:
    qkv = torch.randn(5, 8, 48, dtype=torch.float64)
    out = attention(qkv, pattern_of(IDS, causal=causal), heads)
    torch.testing.assert_close(out, written_out(qkv, IDS, heads, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_told_the_direction(causal: bool) -> None:
    """The operator itself, on a device that computes nothing: `is_causal` follows the dropout."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
            calls.append((operator, inputs))
            return operator(*inputs, **(named or {}))

    pattern = pattern_of(IDS.to("meta"), "varlen", causal=causal)
    with Record():
        assert attention(torch.empty(5, 8, 48, device="meta").bfloat16(), pattern, 2).shape == (5, 8, 16)
    (inputs,) = (inputs for operator, inputs in calls if operator is torch.ops.aten._flash_attention_forward.default)
    assert inputs[3] is inputs[4] is pattern.boundaries
    assert inputs[5:] == (8, 8, 0.0, causal, False)


@pytest.mark.parametrize("piece_numbers", [1, 2**19])
def test_without_dropout_the_products_and_their_gradient_are_the_same(
    piece_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The implementation for bf16 on a CPU, tested in double precision; it draws no random numbers."""
    monkeypatch.setattr(kernel, "PIECE_NUMBERS", piece_numbers)
    monkeypatch.setattr(kernel, "_is_short_bf16", lambda qkv: True)
    qkv = torch.randn(5, 8, 48, dtype=torch.float64, requires_grad=True)
    state = torch.get_rng_state()
    out = attention(qkv, pattern_of(IDS), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert out.grad_fn is not None
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    expected = written_out(qkv, IDS, 4)
    torch.testing.assert_close(out, expected)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(("length", "written"), [(32, True), (kernel.SHORT + 8, False)])
def test_bf16_on_a_cpu(length: int, written: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to fp32: short rows with `_WrittenAttention`, long ones with torch's attention."""
    taken = []
    apply = kernel._WrittenAttention.apply
    monkeypatch.setattr(kernel._WrittenAttention, "apply", lambda *inputs: taken.append(1) or apply(*inputs))
    ids = torch.ones(2, length, dtype=torch.long)
    ids[0, length // 3 :] = 2
    qkv = torch.randn(2, length, 48)
    out = attention(qkv.bfloat16(), pattern_of(ids), 4)
    assert bool(taken) == written
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(qkv, pattern_of(ids), 4), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("piece_numbers", [1, 2**19])
def test_dropout_attention_and_its_gradient(heads: int, piece_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the formula for the bits drawn; in one piece and row by row."""
    monkeypatch.setattr(kernel, "PIECE_NUMBERS", piece_numbers)
    drawn = []

    def remember(shape: torch.Size) -> Tensor:
        drawn.append(torch.randint(-(2**15), 2**15, tuple(shape), dtype=torch.int16))
        return drawn[-1]

    monkeypatch.setattr(dropout, "draw_bits", remember)
    qkv = torch.randn(5, 8, 48, dtype=torch.float64, requires_grad=True)
    out = attention(qkv, pattern_of(IDS), heads, dropout_p=0.3)
    (bits,) = drawn
    factors = (bits >= round(0.3 * 2**16) - 2**15).double().view(5, heads, 8, 8) / (1 - round(0.3 * 2**16) / 2**16)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    expected = written_out(qkv, IDS, heads, factors)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, qkv, upstream)[0])


def test_dropout_attention_in_bfloat16() -> None:
    """bf16 in and out, as under CPU autocast; the mean over many draws is attention without dropout."""
    qkv = torch.randn(1, 8, 48).repeat(4000, 1, 1).bfloat16().requires_grad_()
    out = attention(qkv, pattern_of(IDS[2:3].expand(4000, -1)), 4, dropout_p=0.1)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().mean(0), written_out(qkv[:1].float(), IDS[2:3], 4)[0], atol=0.05, rtol=0.05)


def test_without_dropout_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, and training with probability 0, draw no random numbers."""
    monkeypatch.setattr(dropout, "draw_bits", None)
    qkv = torch.randn(5, 8, 48)
    torch.testing.assert_close(attention(qkv, pattern_of(IDS), 4), written_out(qkv, IDS, 4))


@pytest.mark.parametrize("length", [2, 7, 32])
def test_boundaries_against_numpy(length: int) -> None:
    generator = np.random.default_rng(length)
    ids = np.zeros((6, length), dtype=np.int64)
    for row in ids[:5]:
        place, example = 0, 1
        while place < length and generator.random() < 0.9:
            size = int(generator.integers(2, 9))
            row[place : place + size] = example
            place, example = place + size, example + 1
    starts = [
        row * length + place
        for row in range(6)
        for place in range(length)
        if place == 0 or ids[row, place] != ids[row, place - 1]
    ]
    boundaries = boundaries_of(torch.from_numpy(ids))
    assert boundaries.dtype == torch.int32
    assert boundaries.shape == (6 * (length // 2 + 1) + 1,)
    assert boundaries[: len(starts)].tolist() == starts
    assert (boundaries[len(starts) :] == 6 * length).all()


def test_boundaries_hold_the_most_examples_there_can_be() -> None:
    """Rows of examples of two tokens and one token of padding: every entry is used."""
    ids = torch.tensor([[1, 1, 2, 2, 3, 3, 0]] * 3)
    assert boundaries_of(ids).tolist() == [0, 2, 4, 6, 7, 9, 11, 13, 14, 16, 18, 20, 21]


def test_boundaries_of_a_bound() -> None:
    """The five rows have 1, 2, 4, 1 and 4 examples and runs of padding."""
    everything = boundaries_of(IDS)
    for most in (12, 15, 25, 100):
        assert boundaries_of(IDS, most).tolist() == everything[: min(most, 25) + 1].tolist()
    with pytest.raises(RuntimeError, match="a batch has more than the 11 examples of its bound"):
        boundaries_of(IDS, 11)


def test_the_bound_of_a_batch_covers_any_split_into_microbatches() -> None:
    """Microbatches of two rows: the two fullest rows count, whichever microbatch they are in."""
    bound = ExampleBound(rows=128, length=128, examples_per_row=1.67)
    assert (bound.expected, bound.possible) == (577, 128 * 65)
    bound = ExampleBound(rows=2, length=8, examples_per_row=1.5)
    assert bound.expected == bound.possible == 10
    for expected, found in ((8, 8), (7, 10)):
        bound.expected = expected
        assert bound.of(IDS) == found  # 4 + 4
        assert bound.of(IDS[:1]) == expected


@pytest.mark.parametrize(("heads", "size", "causal"), [(4, 12, False), (2, 16, False), (3, 1, False), (4, 12, True)])
def test_varlen_with_heads_of_any_size(heads: int, size: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_flash_forward", flash_forward)
    qkv = torch.randn(5, 8, 3 * heads * size, dtype=torch.float64, requires_grad=True)
    results = []
    for pattern in (pattern_of(IDS, "varlen", 14, causal), pattern_of(IDS, causal=causal)):
        out = attention(qkv, pattern, heads)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    torch.testing.assert_close(*results)


def test_the_bias_is_built_once_and_in_the_dtype_of_the_scores() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        bias = pattern_of(IDS).bias
    assert bias is not None
    assert bias.dtype == torch.bfloat16
    assert torch.equal(bias == 0, (IDS[:, :, None] == IDS[:, None, :])[:, None])
    assert pattern_of(IDS).bias.dtype == torch.float32  # type: ignore[union-attr]
    qkv = torch.randn(5, 8, 48)
    as_boolean = torch.nn.functional.scaled_dot_product_attention(
        *qkv.view(5, 8, 3, 2, 8).permute(2, 0, 3, 1, 4), attn_mask=bias == 0
    )
    assert torch.equal(attention(qkv, pattern_of(IDS), 2), as_boolean.transpose(1, 2).flatten(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make_ids", [lambda: IDS, lambda: torch.ones(4, 128, dtype=torch.long)])
@pytest.mark.parametrize("size", [32, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_agrees_with_sdpa(make_ids: Callable[[], Tensor], size: int, causal: bool) -> None:
    """Values and gradients in bf16, for examples and padding."""
    ids = make_ids().cuda()
    qkv = torch.randn(*ids.shape, 3 * 2 * size, device="cuda", dtype=torch.bfloat16)
    results = []
    for path in ("sdpa", "varlen"):
        leaf = qkv.clone().requires_grad_()
        out = attention(leaf, pattern_of(ids, path, causal=causal), 2)
        out.float().square().sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=2e-2)
