"""Masked-LM head against plain PyTorch, and its sampler against NumPy and the softmax."""

from __future__ import annotations

import math

import numpy as np
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

from electra_composer.errors import UserError
from electra_composer.model.kernels import masked_lm as module
from electra_composer.model.kernels import masked_lm_chunked
from electra_composer.model.kernels.masked_lm import masked_lm, resolve_implementation

# ---------------------------------------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize(
    ("count", "width", "vocab_size", "smoothing"), [(70, 16, 99, 0.0), (33, 128, 1000, 0.1), (40, 24, 512, 0.0)]
)
@pytest.mark.parametrize("rows_per_chunk", [16, 1024])
def test_loss_and_gradients_are_those_of_plain_pytorch(
    count: int, width: int, vocab_size: int, smoothing: float, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(count, width, vocab_size)
    monkeypatch.setattr(masked_lm_chunked, "CHUNK_BYTES", rows_per_chunk * 4 * inputs["weight"].shape[0])
    actual = masked_lm(**inputs, vocab_size=vocab_size, label_smoothing=smoothing)
    loss, losses, logits = plain(inputs, vocab_size, smoothing)
    assert distance(actual.loss, loss) < 1e-5
    assert distance(actual.token_losses, losses) < 1e-5
    assert torch.equal(actual.correct, logits.argmax(1) == inputs["targets"])
    for ours, theirs in zip(gradients(actual.loss, inputs), gradients(loss, inputs), strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_autocast_is_plain_pytorch_under_autocast_but_for_rounding(smoothing: float) -> None:
    inputs = make_inputs(70, 128, 1000)
    expected_loss, _, _ = plain(inputs, 1000, smoothing)
    expected = gradients(expected_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = masked_lm(**inputs, vocab_size=1000, label_smoothing=smoothing)
        theirs_loss, _, _ = plain(inputs, 1000, smoothing)
    assert actual.loss.dtype == actual.token_losses.dtype == torch.float32
    theirs = gradients(theirs_loss, inputs)
    for ours, bf16, fp32 in zip(gradients(actual.loss, inputs), theirs, expected, strict=True):
        assert ours.dtype == torch.float32
        # As close to the exact gradient as plain PyTorch in bf16.
        assert distance(ours, fp32) < max(1.5 * distance(bf16, fp32), 2e-3)


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    """Under FSDP2 mixed precision the parameters are bf16."""
    inputs = make_inputs(40, 32, 99, torch.bfloat16)
    expected = gradients(
        plain({k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}, 99)[0], inputs
    )
    low = {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("features", "weight", "bias")}
    actual = gradients(masked_lm(**{**inputs, **low}, vocab_size=99).loss, low)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, theirs) < 2e-2


def test_rows_of_weight_zero_and_padding_rows_of_the_table_get_no_gradient() -> None:
    inputs = make_inputs(70, 16, 99)
    grad_features, grad_weight, grad_bias = gradients(masked_lm(**inputs, vocab_size=99).loss, inputs)
    unused = inputs["row_weights"] == 0
    assert 0 < unused.sum() < 70
    assert grad_features[unused].abs().max() == 0
    assert grad_features[~unused].abs().amin(0).min() > 0
    assert grad_weight[99:].abs().max() == 0
    assert grad_bias[99:].abs().max() == 0


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = make_inputs(40, 16, 99)
    expected = masked_lm(**inputs, vocab_size=99)
    with torch.no_grad():
        actual = masked_lm(**inputs, vocab_size=99)
    assert not actual.loss.requires_grad
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.detach())


def test_only_the_loss_has_a_gradient() -> None:
    outputs = masked_lm(**make_inputs(20, 16, 99), vocab_size=99)
    assert [tensor.requires_grad for tensor in outputs] == [True, False, False, False]


def test_operator_is_registered_as_torch_wants_it() -> None:
    inputs = make_inputs(20, 16, 99)
    arguments = (*inputs.values(), 99, 1.0, False, 0.1, False, True)
    torch.library.opcheck(masked_lm_chunked.masked_lm_chunked, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    inputs = make_inputs(20, 16, 99)
    compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = (call(**inputs, vocab_size=99) for call in (masked_lm, compiled))
    assert torch.equal(actual.sampled, expected.sampled)
    for ours, theirs in zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------- sampling


def test_sample_is_the_inverse_of_the_cumulative_distribution() -> None:
    inputs = make_inputs(4000, 16, 1000)
    sampled = masked_lm(**inputs, vocab_size=1000).sampled.numpy()
    logits = plain(inputs, 1000)[2].detach().double().numpy()
    cumulative = np.cumsum(np.exp(logits - logits.max(1, keepdims=True)), axis=1)
    cumulative /= cumulative[:, -1:]
    noise = inputs["noise"].double().numpy()[:, None]
    expected = (cumulative <= noise).sum(1)
    assert (sampled == expected).mean() >= 0.999
    # They differ only if the number is on the boundary between two tokens, within fp32 rounding.
    clear = np.abs(cumulative - noise).min(1) > 1e-6
    assert clear.sum() > 3500
    assert (sampled == expected)[clear].all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ends_of_the_noise_are_the_first_and_the_last_token_that_is_possible(temperature: float) -> None:
    inputs, _ = one_distribution(4, 99)
    inputs["bias"][[0, 1, 97, 98]] = -1e9  # impossible: their exponential is zero
    inputs["noise"] = torch.tensor([0.0, 1e-30, 1.0 - 2.0**-24, 1.0])
    assert masked_lm(**inputs, vocab_size=99, temperature=temperature).sampled.tolist() == [2, 2, 96, 96]


@pytest.mark.parametrize("gumbel", [False, True])
def test_impossible_tokens_are_never_drawn(gumbel: bool) -> None:
    inputs, _ = one_distribution(20_000, 300)
    possible = torch.zeros(300, dtype=torch.bool)
    possible[[63, 64, 127, 200, 299]] = True
    inputs["bias"][:300][~possible] = -1e9
    sampled = masked_lm(**inputs, vocab_size=300, gumbel=gumbel).sampled
    assert sampled.unique().tolist() == [63, 64, 127, 200, 299]


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize(("temperature", "disallow"), [(1.0, False), (2.0, False), (1.0, True), (2.0, True)])
def test_samples_follow_the_softmax(gumbel: bool, temperature: float, disallow: bool) -> None:
    draws, vocab_size = 100_000, 99
    inputs, logits = one_distribution(draws, vocab_size)
    options = {"temperature": temperature, "disallow_correct": disallow, "gumbel": gumbel}
    sampled = masked_lm(**inputs, vocab_size=vocab_size, **options).sampled
    if disallow:
        logits = logits.clone()
        logits[3] = -math.inf
    assert_distributed(sampled, torch.softmax(logits.double() / temperature, 0))


def test_disallow_correct_never_draws_the_original() -> None:
    inputs = make_inputs(4000, 16, 99)
    with torch.no_grad():
        inputs["bias"][:99] = 0.0
        inputs["weight"].mul_(0.0)
        inputs["bias"][inputs["targets"][0]] = 50.0
    inputs["targets"].fill_(int(inputs["targets"][0]))  # almost certain
    assert (masked_lm(**inputs, vocab_size=99).sampled == inputs["targets"]).all()
    assert (masked_lm(**inputs, vocab_size=99, disallow_correct=True).sampled != inputs["targets"]).all()


def test_temperature_and_disallow_correct_leave_the_loss_alone() -> None:
    inputs = make_inputs(70, 16, 99)
    expected = masked_lm(**inputs, vocab_size=99)
    actual = masked_lm(**inputs, vocab_size=99, temperature=3.0, disallow_correct=True)
    assert not torch.equal(actual.sampled, expected.sampled)
    assert torch.equal(actual.token_losses, expected.token_losses)
    for ours, theirs in zip(gradients(actual.loss, inputs), gradients(expected.loss, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_logits_that_are_not_numbers_give_a_loss_that_is_not_and_ids_that_exist() -> None:
    inputs = make_inputs(40, 16, 99)
    with torch.no_grad():
        inputs["features"][::2] = math.nan
    outputs = masked_lm(**inputs, vocab_size=99)
    assert outputs.loss.isnan()
    assert outputs.sampled.min() >= 0
    assert outputs.sampled.max() < 99


# ----------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_switch() -> None:
    with pytest.raises(UserError, match=r"objective\.masked_lm is 'liger'; expected one of auto, chunked, triton"):
        resolve_implementation("liger", "cpu", 64, 16)
    with pytest.raises(UserError, match=r"2\^31 numbers: set objective\.masked_lm=chunked"):
        resolve_implementation("auto", "cuda", 2**21, 1024)
    with pytest.raises(ValueError, match="100 rows of embeddings for 99 tokens"):
        masked_lm(**{**make_inputs(4, 16, 99), "weight": torch.zeros(100, 16)}, vocab_size=99)


def test_triton_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"needs CUDA: set objective\.masked_lm=chunked"):
        masked_lm(**make_inputs(4, 16, 99), vocab_size=99, implementation="triton")


def test_triton_that_is_not_installed_is_no_silent_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert resolve_implementation("auto", "cpu", 64, 16) == "chunked"
    with pytest.raises(UserError, match=r"package triton is missing; .* objective\.masked_lm=chunked"):
        resolve_implementation("auto", "cuda", 64, 16)


def test_auto_is_triton_on_cuda() -> None:
    assert resolve_implementation("auto", "cuda", 30528, 128) == "triton"
