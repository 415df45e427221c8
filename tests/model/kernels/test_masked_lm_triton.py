"""Triton kernels of the masked-LM head against the plain PyTorch implementation.

Without a GPU, `test_triton_under_the_interpreter` runs them in another process, in Triton's interpreter.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from masked_lm_inputs import (
    OPERATOR_CHECKS,
    assert_distributed,
    distance,
    gradients,
    make_inputs,
    one_distribution,
    plain,
)
from torch import Tensor
from triton_interpreter import DEVICE, INTERPRETED, KERNEL_MARKS, ON_GPU, multiply_bf16, run_interpreted

from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    run_interpreted([__file__, str(Path(__file__).with_name("test_masked_lm_copy.py"))], 22)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _interpreter_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_bf16(monkeypatch)


def _both(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> tuple[MaskedLM, MaskedLM]:
    """Run both implementations, `chunked` in fp32, which multiplies bf16 numbers exactly, as a GPU does."""
    twins = {**inputs, "features": inputs["features"].float()}
    if inputs["features"].dtype != torch.float32:
        twins["weight"] = inputs["weight"].to(inputs["features"].dtype).float()
    return (
        masked_lm(**inputs, vocab_size=vocab_size, implementation="triton", **options),
        masked_lm(**twins, vocab_size=vocab_size, implementation="chunked", **options),
    )


def _assert_twins(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> None:
    low = inputs["features"].dtype != torch.float32
    actual, expected = _both(inputs, vocab_size, **options)
    assert distance(actual.loss, expected.loss) < 1e-5
    assert distance(actual.token_losses, expected.token_losses) < 1e-5
    assert torch.equal(actual.correct, expected.correct)
    # Same uniform numbers: samples differ only within rounding of a boundary between tokens.
    differing = (actual.sampled != expected.sampled).sum()
    assert differing <= max(1, len(actual.sampled) // 500)
    for name, ours, theirs in zip(
        ("features", "weight", "bias"), gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True
    ):
        assert ours.dtype == inputs[name].dtype
        assert distance(ours, theirs) < (1e-2 if low else 1e-5), name


@pytest.mark.usefixtures("_interpreter_multiplies_bf16")
class TestKernel:
    """Tests that the other process runs: names begin with `test_kernel_`."""

    pytestmark = KERNEL_MARKS

    @pytest.mark.parametrize(
        ("count", "width", "vocab_size", "dtype"),
        [
            (70, 16, 99, torch.float32),  # more than one block of rows; less than one tile of tokens
            (12, 100, 512, torch.bfloat16),  # width no power of two; whole tiles
            (12, 128, 513, torch.float32),  # one token in the last tile
            (12, 128, 1000, torch.bfloat16),
            (4, 1024, 99, torch.float32),
            (4, 1024, 99, torch.bfloat16),
        ],
    )
    def test_kernel_is_its_twin(self, count: int, width: int, vocab_size: int, dtype: torch.dtype) -> None:
        _assert_twins(make_inputs(count, width, vocab_size, dtype, device=DEVICE), vocab_size)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 2.0},
            {"disallow_correct": True},
            {"temperature": 0.5, "disallow_correct": True, "label_smoothing": 0.1},
        ],
    )
    def test_kernel_options(self, options: dict[str, float]) -> None:
        _assert_twins(make_inputs(12, 24, 513, device=DEVICE), 513, **options)

    def test_kernel_disallow_correct_with_the_original_alone_in_its_tile(self) -> None:
        inputs = make_inputs(8, 16, 129, device=DEVICE)
        inputs["targets"].fill_(128)
        _assert_twins(inputs, 129, disallow_correct=True)
        assert (_both(inputs, 129, disallow_correct=True)[0].sampled != 128).all()

    def test_kernel_backward_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from electra_composer.model.kernels import masked_lm_triton

        monkeypatch.setattr(masked_lm_triton, "BACKWARD_CHUNK_BYTES", 1)
        inputs = make_inputs(150, 16, 99, device=DEVICE)
        loss = masked_lm(**inputs, vocab_size=99, gumbel=True, implementation="triton").loss
        for ours, theirs in zip(gradients(loss, inputs), gradients(plain(inputs, 99)[0], inputs), strict=True):
            assert distance(ours, theirs) < 1e-5

    def test_kernel_ends_of_the_noise(self) -> None:
        inputs, _ = one_distribution(4, 300)
        inputs["bias"][[0, 1, 298, 299]] = -1e9
        inputs["noise"] = torch.tensor([0.0, 1e-30, 1.0 - 2.0**-24, 1.0])
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        assert masked_lm(**inputs, vocab_size=300, implementation="triton").sampled.tolist() == [2, 2, 297, 297]

    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "disallow_correct": True}])
    def test_kernel_gumbel_follows_the_softmax(self, options: dict[str, float]) -> None:
        # Rows are slow in the interpreter: use few, and few tokens, so that each is expected often enough.
        draws, vocab_size = (250, 15) if INTERPRETED else (100_000, 99)
        inputs, logits = one_distribution(draws, vocab_size, spread=0.5)
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        sampled = _gumbel_samples(inputs, vocab_size, **options)
        if options:
            logits = logits.clone()
            logits[3] = -math.inf
        assert_distributed(sampled, torch.softmax(logits.double() / options.get("temperature", 1.0), 0))

    def test_kernel_gumbel_is_seeded_by_torch(self) -> None:
        inputs = make_inputs(20, 16, 99, device=DEVICE)
        torch.manual_seed(1)
        first, second = _gumbel_samples(inputs, 99), _gumbel_samples(inputs, 99)
        torch.manual_seed(1)
        assert torch.equal(_gumbel_samples(inputs, 99), first)
        assert not torch.equal(first, second)

    def test_kernel_bf16_parameters(self) -> None:
        inputs = make_inputs(12, 24, 99, torch.bfloat16, device=DEVICE)
        for name in ("weight", "bias"):
            inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
        _assert_twins(inputs, 99)

    def test_kernel_logits_that_are_not_numbers(self) -> None:
        triton = pytest.importorskip("triton")
        if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
            pytest.skip("Triton 3.9's interpreter raises at the argmax of NaN alone, for which a GPU returns an index")
        inputs = make_inputs(8, 16, 99, device=DEVICE)
        with torch.no_grad():
            inputs["features"][::2] = math.nan
        for gumbel in (False, True):
            outputs = masked_lm(**inputs, vocab_size=99, gumbel=gumbel, implementation="triton")
            assert outputs.loss.isnan()
            assert outputs.sampled.min() >= 0
            assert outputs.sampled.max() < 99

    def test_kernel_compiles_without_a_graph_break(self) -> None:
        inputs = make_inputs(4, 16, 99, device=DEVICE)
        compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
        actual, expected = (call(**inputs, vocab_size=99, implementation="triton") for call in (compiled, masked_lm))
        assert torch.equal(actual.sampled, expected.sampled)
        for ours, theirs in zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True):
            assert torch.equal(ours, theirs)

    def test_kernel_is_registered_as_torch_wants_it(self) -> None:
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        inputs = make_inputs(4, 16, 99, device=DEVICE)
        arguments = (*inputs.values(), inputs["targets"], 99, 1.0, False, 0.0, False)
        torch.library.opcheck(masked_lm_triton, arguments, test_utils=OPERATOR_CHECKS)


def _gumbel_samples(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> Tensor:
    """Sample with the Triton kernels."""
    return masked_lm(**inputs, vocab_size=vocab_size, gumbel=True, implementation="triton", **options).sampled


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU: true sizes are too many for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "disallow_correct": True, "label_smoothing": 0.1}])
def test_true_size(dtype: torch.dtype, options: dict[str, float]) -> None:
    _assert_twins(make_inputs(2432, 128, 30522, dtype, device="cuda"), 30522, **options)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_no_tensor_of_all_logits_and_no_wait_for_the_device() -> None:
    inputs = make_inputs(2432, 128, 30522, torch.bfloat16, device="cuda")
    gradients(masked_lm(**inputs, vocab_size=30522).loss, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(masked_lm(**inputs, vocab_size=30522).loss, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2432 * 30522 * 2


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_cuda_graph_repeats_the_step() -> None:
    inputs = make_inputs(256, 128, 1000, torch.bfloat16, device="cuda")
    expected = masked_lm(**inputs, vocab_size=1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = masked_lm(**inputs, vocab_size=1000)
    graph.replay()
    assert torch.equal(captured.sampled, expected.sampled)
    assert torch.equal(captured.loss, expected.loss)
