"""Copy mechanism of the masked-LM head against the mixture of its distributions, stored in float64.

Without a GPU, `test_triton_under_the_interpreter` of test_masked_lm_triton.py runs the tests of the Triton kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from masked_lm_inputs import OPERATOR_CHECKS, distance, make_inputs
from torch import Tensor
from triton_interpreter import DEVICE, KERNEL_MARKS, ON_GPU, multiply_bf16

from electra_composer.model.kernels import masked_lm_chunked
from electra_composer.model.kernels.copy_mechanism import log_odds_of_copies
from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm

DIFFERENTIABLE = ("features", "weight", "bias", "copy_logits")


def with_copies(inputs: dict[str, Tensor], vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """Add copy logits, and draw the input tokens `[M]`, half of which are the target."""
    generator = torch.Generator().manual_seed(1)
    targets = inputs["targets"].cpu()
    copied = torch.rand(len(targets), generator=generator) < 0.5
    others = (targets + torch.randint(1, vocab_size, targets.shape, generator=generator)) % vocab_size
    copy_logits = 2.0 * torch.randn(len(targets), generator=generator)
    device = inputs["targets"].device
    added = {"copy_logits": copy_logits.to(device).requires_grad_(), "copied": copied.to(device)}
    return {**inputs, **added}, torch.where(copied, targets, others).to(device)


class Mixture(NamedTuple):
    loss: Tensor
    losses: Tensor
    correct: Tensor
    gradients: list[Tensor]


def mixture(inputs: dict[str, Tensor], input_ids: Tensor, vocab_size: int) -> Mixture:
    """Compute D × one-hot(input token) + (1 - D) × softmax for all rows, and its losses and gradients, in float64."""
    features, weight, bias, copy_logits = (inputs[name].detach().double().requires_grad_() for name in DIFFERENTIABLE)
    logits = F.linear(features, weight[:vocab_size], bias[:vocab_size])
    copy, no_copy = torch.sigmoid(copy_logits)[:, None], torch.sigmoid(-copy_logits)[:, None]
    distribution = copy * F.one_hot(input_ids, vocab_size) + no_copy * logits.softmax(1)
    losses = -distribution.gather(1, inputs["targets"][:, None]).squeeze(1).log()
    loss = (losses * inputs["row_weights"].double()).sum()
    predicted = torch.where(copy.squeeze(1) > 0.5, input_ids, logits.argmax(1))
    gradients = torch.autograd.grad(loss * 3.7, (features, weight, bias, copy_logits))
    return Mixture(loss.detach(), losses.detach(), predicted == inputs["targets"], list(gradients))


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Compute the four gradients of 3.7 × `loss`, so that the incoming gradient is not 1."""
    return list(torch.autograd.grad(loss * 3.7, [inputs[name] for name in DIFFERENTIABLE]))


def assert_mixture(
    actual: MaskedLM,
    inputs: dict[str, Tensor],
    expected: Mixture,
    tolerance: float = 1e-5,
    gradient_tolerance: float = 1e-5,
) -> None:
    assert actual.loss.dtype == actual.token_losses.dtype == torch.float32
    assert distance(actual.loss, expected.loss) < tolerance
    assert distance(actual.token_losses, expected.losses) < tolerance
    for name, ours, theirs in zip(DIFFERENTIABLE, gradients(actual.loss, inputs), expected.gradients, strict=True):
        assert ours.dtype == inputs[name].dtype
        assert distance(ours, theirs) < gradient_tolerance, name


# ---------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize(("count", "width", "vocab_size"), [(70, 16, 99), (33, 128, 1000), (40, 24, 512)])
@pytest.mark.parametrize("rows_per_chunk", [16, 1024])
def test_values_and_gradients_are_those_of_the_mixture(
    count: int, width: int, vocab_size: int, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, input_ids = with_copies(make_inputs(count, width, vocab_size), vocab_size)
    monkeypatch.setattr(masked_lm_chunked, "CHUNK_BYTES", rows_per_chunk * 4 * inputs["weight"].shape[0])
    actual, expected = masked_lm(**inputs, vocab_size=vocab_size), mixture(inputs, input_ids, vocab_size)
    assert_mixture(actual, inputs, expected)
    assert torch.equal(actual.correct, expected.correct)
    assert 0 < actual.correct.sum() < inputs["copied"].sum()


def test_rows_of_weight_zero_and_padding_rows_of_the_table_get_no_gradient() -> None:
    inputs, _ = with_copies(make_inputs(70, 16, 99), 99)
    grad_features, grad_weight, grad_bias, grad_copy = gradients(masked_lm(**inputs, vocab_size=99).loss, inputs)
    unused = inputs["row_weights"] == 0
    assert 0 < unused.sum() < 70
    for gradient in (grad_features, grad_copy[:, None]):
        assert gradient[unused].abs().max() == 0
        assert gradient[~unused].abs().amin() > 0
    assert grad_weight[99:].abs().max() == grad_bias[99:].abs().max() == 0


def test_bf16_autocast_is_the_mixture_but_for_rounding() -> None:
    inputs, input_ids = with_copies(make_inputs(70, 128, 1000), 1000)
    inputs["copy_logits"] = inputs["copy_logits"].detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = masked_lm(**inputs, vocab_size=1000)
    assert_mixture(actual, inputs, mixture(inputs, input_ids, 1000), 5e-3, 2e-2)


@pytest.mark.parametrize("likely", [False, True])
def test_extreme_copy_logits_and_probabilities(likely: bool) -> None:
    """D and the softmax's probability round to 0 or 1."""
    inputs, input_ids = with_copies(make_inputs(70, 16, 99), 99)
    inputs["targets"].fill_(7)
    input_ids = torch.where(inputs["copied"], 7, 8)
    with torch.no_grad():
        inputs["bias"][7] = 200.0 if likely else -200.0
        inputs["copy_logits"].copy_(torch.tensor([-200.0, -90.0, -50.0, -20.0, 0.0, 20.0, 50.0]).repeat(10))
    actual, expected = masked_lm(**inputs, vocab_size=99), mixture(inputs, input_ids, 99)
    assert actual.token_losses.isfinite().all()
    torch.testing.assert_close(actual.token_losses.double(), expected.losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(actual.loss, inputs), expected.gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_gradient_of_copy_logits_is_that_of_finite_differences() -> None:
    inputs, _ = with_copies(make_inputs(70, 16, 99), 99)
    inputs["row_weights"] = torch.rand(70, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(masked_lm(**inputs, vocab_size=99).loss, inputs["copy_logits"])
    step, center = 2.0**-6, inputs["copy_logits"].detach()
    above, below = (
        masked_lm(**{**inputs, "copy_logits": center + change}, vocab_size=99).token_losses for change in (step, -step)
    )
    differences = inputs["row_weights"] * (above - below) / (2 * step)
    torch.testing.assert_close(gradient, differences, rtol=0, atol=2e-4)
    assert gradient.abs().max() > 0.5


def test_a_mechanism_that_never_copies_is_the_plain_loss() -> None:
    inputs, _ = with_copies(make_inputs(40, 16, 99), 99)
    inputs["copy_logits"] = torch.full((40,), -200.0)
    inputs["copied"] = torch.zeros(40, dtype=torch.bool)
    names = ("features", "weight", "bias")
    actual = masked_lm(**inputs, vocab_size=99)
    expected = masked_lm(**{**inputs, "copy_logits": None, "copied": None}, vocab_size=99)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        *(torch.autograd.grad(outputs.loss, [inputs[name] for name in names]) for outputs in (actual, expected)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_prediction_is_the_input_token_where_the_copy_probability_exceeds_one_half() -> None:
    inputs = make_inputs(6, 16, 99)
    best = torch.full((6,), 5)
    with torch.no_grad():
        inputs["bias"][5] = 100.0
    inputs["targets"] = torch.tensor([5, 5, 9, 9, 5, 9])
    copied = torch.tensor([True, False, True, False, False, True])
    copy_logits = torch.tensor([1e-3, 1e-3, 1e-3, 1e-3, 0.0, -1e-3])
    actual = masked_lm(**inputs, vocab_size=99, copy_logits=copy_logits, copied=copied)
    assert torch.equal(masked_lm(**inputs, vocab_size=99).correct, best == inputs["targets"])
    assert actual.correct.tolist() == [True, False, True, False, True, False]


def test_samples_are_those_of_the_softmax_and_only_the_loss_has_a_gradient() -> None:
    inputs, _ = with_copies(make_inputs(70, 16, 99), 99)
    options = {"vocab_size": 99, "temperature": 2.0, "disallow_correct": True}
    actual = masked_lm(**inputs, **options)
    assert torch.equal(actual.sampled, masked_lm(**{**inputs, "copy_logits": None, "copied": None}, **options).sampled)
    assert [tensor.requires_grad for tensor in actual] == [True, False, False, False]
    with torch.no_grad():
        for ours, theirs in zip(masked_lm(**inputs, **options), actual, strict=True):
            assert torch.equal(ours, theirs.detach())


def test_gradient_of_copy_logits_alone() -> None:
    inputs, input_ids = with_copies(make_inputs(40, 16, 99), 99)
    frozen = {name: tensor.detach() for name, tensor in inputs.items()} | {"copy_logits": inputs["copy_logits"]}
    (actual,) = torch.autograd.grad(masked_lm(**frozen, vocab_size=99).loss * 3.7, inputs["copy_logits"])
    assert distance(actual, mixture(inputs, input_ids, 99).gradients[3]) < 1e-5


# ------------------------------------------------------------------------------------------ the operator, and errors


def test_operator_is_registered_as_torch_wants_it() -> None:
    inputs = make_inputs(20, 16, 99)
    copies, _ = with_copies(inputs, 99)
    log_odds = log_odds_of_copies(copies["copy_logits"], copies["copied"])
    arguments = (*inputs.values(), 99, 1.0, False, 0.0, False, True, log_odds)
    torch.library.opcheck(masked_lm_chunked.masked_lm_chunked, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    inputs, _ = with_copies(make_inputs(20, 16, 99), 99)
    compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = (call(**inputs, vocab_size=99) for call in (masked_lm, compiled))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_errors() -> None:
    inputs, _ = with_copies(make_inputs(4, 16, 99), 99)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 with copy_logits; expected 0"):
        masked_lm(**inputs, vocab_size=99, label_smoothing=0.1)
    for name in ("copy_logits", "copied"):
        with pytest.raises(ValueError, match="one of copy_logits and copied; expected both or neither"):
            masked_lm(**{**inputs, name: None}, vocab_size=99)


# --------------------------------------------------------------------------------------------------- Triton kernels


class TestKernel:
    """Tests that the other process runs: names begin with `test_kernel_`."""

    pytestmark = KERNEL_MARKS

    @pytest.mark.parametrize(
        ("count", "width", "vocab_size", "dtype"),
        [(70, 16, 99, torch.float32), (12, 128, 513, torch.float32), (12, 100, 512, torch.bfloat16)],
    )
    def test_kernel_is_the_mixture(
        self, count: int, width: int, vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        multiply_bf16(monkeypatch)
        inputs, input_ids = with_copies(make_inputs(count, width, vocab_size, dtype, device=DEVICE), vocab_size)
        actual = masked_lm(**inputs, vocab_size=vocab_size, implementation="triton")
        twins = {**inputs, "weight": inputs["weight"].to(dtype)}
        expected = mixture(twins, input_ids, vocab_size)
        assert_mixture(actual, inputs, expected, 1e-5, 1e-5 if dtype == torch.float32 else 1e-2)
        assert torch.equal(actual.correct, expected.correct)

    def test_kernel_backward_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from electra_composer.model.kernels import masked_lm_triton

        monkeypatch.setattr(masked_lm_triton, "BACKWARD_CHUNK_BYTES", 1)
        inputs, input_ids = with_copies(make_inputs(150, 16, 99, device=DEVICE), 99)
        actual = masked_lm(**inputs, vocab_size=99, implementation="triton")
        assert_mixture(actual, inputs, mixture(inputs, input_ids, 99))

    def test_kernel_compiles_without_a_graph_break(self) -> None:
        inputs, _ = with_copies(make_inputs(4, 16, 99, device=DEVICE), 99)
        compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
        actual, expected = (call(**inputs, vocab_size=99, implementation="triton") for call in (compiled, masked_lm))
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_kernel_is_registered_as_torch_wants_it(self) -> None:
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        inputs = make_inputs(4, 16, 99, device=DEVICE)
        copies, _ = with_copies(inputs, 99)
        log_odds = log_odds_of_copies(copies["copy_logits"], copies["copied"])
        arguments = (*inputs.values(), inputs["targets"], 99, 1.0, False, 0.0, False, log_odds)
        torch.library.opcheck(masked_lm_triton, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_cuda_graph_repeats_the_step() -> None:
    inputs, _ = with_copies(make_inputs(256, 128, 1000, torch.bfloat16, device="cuda"), 1000)

    def step() -> tuple[Tensor, ...]:
        outputs = masked_lm(**inputs, vocab_size=1000)
        return outputs.loss.detach(), outputs.token_losses, outputs.correct, *gradients(outputs.loss, inputs)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # refuses to wait for the device
        captured = step()
    graph.replay()
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)
