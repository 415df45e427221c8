"""Attention in Triton against the path `sdpa`.

Without a GPU, `test_attention_under_the_interpreter` runs the kernels of this module, and of
test_attention_triton_dropout.py, in another process, in Triton's interpreter.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from attention_inputs import fewer_on_a_gpu, make_ids, make_qkv, usual_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_lm_inputs import OPERATOR_CHECKS
from torch import Tensor
from triton_interpreter import DEVICE, KERNEL_MARKS, ON_GPU, multiply_bf16, run_interpreted

from electra_composer.model.encoder import Encoder, EncoderConfig
from electra_composer.model.kernels.attention import AttentionPattern, attention, pattern_of

pytest.importorskip("triton")

from electra_composer.model.kernels import attention_triton as module
from electra_composer.model.kernels.attention_triton import attention_triton


@pytest.mark.slow
def test_attention_under_the_interpreter() -> None:
    run_interpreted([__file__, str(Path(__file__).with_name("test_attention_triton_dropout.py"))], 30)


def compare(qkv: Tensor, ids: Tensor, heads: int, tolerance: float) -> None:
    """Values and gradients of the kernels, and of `sdpa` in fp32 on the same numbers."""
    out, _ = attention_triton(qkv, ids, ids, heads, 0.0)
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    exact = qkv.detach().float().requires_grad_()
    expected = attention(exact, pattern_of(ids), heads)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.float())
    assert out.dtype == gradient.dtype == qkv.dtype
    tolerance *= 10 if ON_GPU and qkv.dtype == torch.float32 else 1  # torch's sums are in another order there
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.float(), expected_gradient, atol=tolerance, rtol=tolerance)


@pytest.fixture
def _bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bf16(monkeypatch)


def use_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Launch the backward as on a card of this compute capability."""
    choose = module.backward_launch
    monkeypatch.setattr(
        module, "backward_launch", lambda length, size, dtype, _: choose(length, size, dtype, capability)
    )


class TestKernels:
    pytestmark = KERNEL_MARKS

    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        torch.manual_seed(0)

    @pytest.mark.parametrize("size", fewer_on_a_gpu([1, 16, 21, 64, 65, 127], [7, 65]))
    def test_kernel_head_sizes(self, size: int) -> None:
        """64 in all YAMLs; `generator_size` gives sizes from 1 to 127."""
        ids = make_ids(11, [[5, 4]])
        compare(make_qkv(ids, 2, size), ids, 2, 1e-5)

    @pytest.mark.parametrize("length", fewer_on_a_gpu([1, 2, 31, 32, 33], [1, 33]))
    def test_kernel_lengths(self, length: int) -> None:
        ids = usual_ids(length)
        compare(make_qkv(ids, 1, 8), ids, 1, 1e-5)

    @pytest.mark.parametrize(
        ("length", "size", "capability"),
        fewer_on_a_gpu(
            [
                (20, 64, (8, 0)),
                (50, 32, (9, 0)),
                (100, 32, (8, 0)),
                (100, 32, (9, 0)),
                (128, 96, (8, 0)),
                (128, 96, (9, 0)),
                (200, 64, (9, 0)),
                (300, 16, (8, 0)),
            ],
            [(50, 32, (8, 0)), (100, 32, (8, 0)), (128, 96, (8, 0))],
        ),
    )
    @pytest.mark.usefixtures("_bf16")
    def test_kernel_bf16(
        self, length: int, size: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every way to launch them."""
        use_capability(monkeypatch, capability)
        ids = make_ids(length, [[length // 2, length // 3]])
        compare(make_qkv(ids, 1, size, torch.bfloat16), ids, 1, 3e-2)

    def test_kernel_fp16(self) -> None:
        ids = usual_ids(20)
        compare(make_qkv(ids, 2, 16, torch.float16), ids, 2, 5e-3)

    @pytest.mark.parametrize("dtype", fewer_on_a_gpu([torch.int32, torch.int16, torch.uint8], [torch.uint8]))
    def test_kernel_ids_of_any_integer_type_and_in_any_order(self, dtype: torch.dtype) -> None:
        ids = torch.randint(0, 5, (1, 40), device=DEVICE).to(dtype)
        compare(make_qkv(ids, 1, 8), ids, 1, 1e-5)

    @pytest.mark.skipif(ON_GPU, reason="each example is compiled")
    @given(data=st.data())
    @settings(max_examples=5, deadline=None, derandomize=True)
    def test_kernel_any_shape(self, data: st.DataObject) -> None:
        length, heads, size = (data.draw(st.integers(1, most)) for most in (64, 3, 24))
        lengths = data.draw(st.lists(st.lists(st.integers(1, length), max_size=5), min_size=1, max_size=2))
        ids = make_ids(length, lengths)
        compare(make_qkv(ids, heads, size), ids, heads, 1e-5)

    def test_kernel_does_not_read_keys_of_other_blocks(self) -> None:
        """Values that are not numbers spread to their own block of keys, no further."""
        ids = make_ids(96, [[32, 64]])
        qkv = make_qkv(ids, 1, 8).detach()
        qkv[0, :32] = math.nan
        out, _ = attention_triton(qkv, ids, ids, 1, 0.0)
        assert out[0, :32].isnan().all()
        assert out[0, 32:].isfinite().all()

    def test_kernel_in_an_encoder(self) -> None:
        """Values and gradients of two layers without dropout; with dropout, a seed says everything."""
        encoder = Encoder(EncoderConfig(99, 16, 16, 2, 2, 32, 40, 0.0, 0.2, 0.02, 1e-12)).to(DEVICE)
        ids, embedded = make_ids(12, [[7, 3]]), torch.randn(1, 12, 16, device=DEVICE, requires_grad=True)

        def results(path: str) -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
            out = encoder(embedded, pattern_of(ids, path))
            return out, torch.autograd.grad(out.square().sum(), embedded)[0]

        encoder.eval()
        torch.testing.assert_close(results("triton"), results("sdpa"))
        encoder.train()
        first, second = results("triton"), results("triton")
        assert all(map(torch.equal, first, second))

    @pytest.mark.usefixtures("_bf16")
    def test_kernel_gets_the_dtype_of_autocast(self) -> None:
        ids = usual_ids(9)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert attention(make_qkv(ids, 1, 8), pattern_of(ids, "triton"), 1).dtype == torch.bfloat16

    def test_kernel_rows_that_are_too_long(self) -> None:
        ids = torch.ones(1, 513, dtype=torch.long, device=DEVICE)
        with pytest.raises(ValueError, match="rows of 513 tokens; expected at most 512"):
            attention_triton(make_qkv(ids, 1, 8), ids, ids, 1, 0.0)

    def test_kernel_compiles_without_a_graph_break(self) -> None:
        ids = make_ids(9, [[5, 3]])
        qkv = make_qkv(ids, 1, 8)

        def run(qkv: Tensor, seed: Tensor) -> Tensor:
            return attention(qkv, AttentionPattern(sequence_ids=ids, seed=seed), 1, 0.1).square().sum()

        seed = torch.tensor([5], device=DEVICE)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(*(torch.autograd.grad(call(qkv, seed), qkv) for call in (compiled, run)), strict=True):
            assert torch.equal(ours, theirs)

    def test_kernel_is_registered_as_torch_wants_it(self) -> None:
        ids = make_ids(9, [[5, 3]])
        arguments = (make_qkv(ids, 1, 8), ids, torch.tensor([5], device=DEVICE), 1, 0.1)
        torch.library.opcheck(attention_triton, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU: true sizes are too many for the interpreter")
@pytest.mark.parametrize(
    ("rows", "length", "heads", "dtype"),
    [
        (128, 128, 4, torch.bfloat16),
        (128, 128, 1, torch.bfloat16),
        (128, 128, 4, torch.float16),
        (128, 128, 4, torch.float32),
        (16, 512, 12, torch.bfloat16),
    ],
)
def test_true_size(rows: int, length: int, heads: int, dtype: torch.dtype) -> None:
    ids = usual_ids(length).repeat(rows // 4, 1)
    compare(make_qkv(ids, heads, 64, dtype), ids, heads, 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize(
    ("capability", "one_tile"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
)
def test_tile_of_128_tokens_needs_hopper(capability: tuple[int, int], one_tile: bool) -> None:
    launch = module.backward_launch(128, 64, torch.bfloat16, capability)
    assert (launch.block == launch.step) == one_tile
