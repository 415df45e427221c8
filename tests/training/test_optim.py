"""The optimizer against NumPy; parameter groups and layerwise learning rates by parameter name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from electra_composer.training.optim import AdamW, layer_exponents, parameter_groups

# --- the optimizer


def numpy_adamw(param, grads, lrs, weight_decay, bias_correction, beta1=0.9, beta2=0.999, eps=1e-6):
    """AdamW from its formula, in float64."""
    m, v = np.zeros_like(param), np.zeros_like(param)
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        m_hat = m / (1 - beta1**t) if bias_correction else m
        v_hat = v / (1 - beta2**t) if bias_correction else v
        param = param - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * param)
    return param, m, v


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_adamw_agrees_with_numpy_with_and_without_decay_and_a_changing_rate(steps, bias_correction):
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=(3, 4)), rng.normal(size=(4,))]
    decays = [0.01, 0.0]
    params = [torch.nn.Parameter(torch.tensor(start)) for start in starts]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(params, decays, strict=True)]
    optimizer = AdamW(groups, lr=1.0, bias_correction=bias_correction)
    all_grads = [rng.normal(size=(steps, *start.shape)) for start in starts]
    lrs = [0.1 / (1 + step) for step in range(steps)]
    for step in range(steps):
        for group, param, grads in zip(optimizer.param_groups, params, all_grads, strict=True):
            group["lr"] = lrs[step]
            param.grad = torch.tensor(grads[step])
        optimizer.step()
    for param, start, grads, decay in zip(params, starts, all_grads, decays, strict=True):
        expected, m, v = numpy_adamw(start, grads, lrs, decay, bias_correction)
        np.testing.assert_allclose(param.detach().numpy(), expected, rtol=1e-10)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg"].numpy(), m, rtol=1e-10)
        np.testing.assert_allclose(optimizer.state[param]["exp_avg_sq"].numpy(), v, rtol=1e-10)


def test_with_bias_correction_it_is_pytorchs_adamw():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    our_optimizer = AdamW([ours], lr=0.1, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1, bias_correction=True)
    their_optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-5, weight_decay=0.1, foreach=False)
    for _ in range(7):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_gradient_may_come_from_a_closure_and_bfloat16_stays():
    # Composer may pass its forward and backward as a closure; there is no gradient before it runs.
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=0.5, weight_decay=0.0)

    def closure():
        loss = param.sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4
    # m = 0.1, v = 0.001: the first uncorrected step is 0.1 / sqrt(0.001) = 3.16 times the learning rate.
    torch.testing.assert_close(param.float(), torch.full((4,), 1 - 0.5 * 0.1 / math.sqrt(0.001)), rtol=1e-2, atol=0)
    assert param.dtype == torch.bfloat16


def test_a_saved_and_loaded_state_continues_as_if_never_saved():
    rng = torch.Generator().manual_seed(0)
    grads = torch.randn(6, 3, generator=rng)

    def train(param, optimizer, part):
        for grad in part:
            param.grad = grad.clone()
            optimizer.step()

    uninterrupted = torch.nn.Parameter(torch.ones(3))
    train(uninterrupted, AdamW([uninterrupted], lr=0.1), grads)
    first = torch.nn.Parameter(torch.ones(3))
    first_optimizer = AdamW([first], lr=0.1)
    train(first, first_optimizer, grads[:2])
    second = torch.nn.Parameter(first.detach().clone())
    second_optimizer = AdamW([second], lr=0.1)
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    train(second, second_optimizer, grads[2:])
    torch.testing.assert_close(second, uninterrupted, rtol=0, atol=0)


# --- parameter groups

EMBEDDINGS = ["word.weight", "position.weight", "token_type.weight", "norm.weight", "norm.bias"]
LAYER = [
    f"{module}.{kind}"
    for module in ("attention.qkv", "attention.out", "attention_norm", "up", "down", "mlp_norm")
    for kind in ("weight", "bias")
]


def finetuned_names(layers: int) -> list[str]:
    return [
        *(f"embeddings.{name}" for name in EMBEDDINGS),
        "encoder.project.weight",
        "encoder.project.bias",
        *(f"encoder.layers.{i}.{name}" for i in range(layers) for name in LAYER),
        "head.weight",
        "head.bias",
    ]


def pretraining_names(layers: int) -> list[str]:
    return [
        *(f"embeddings.{name}" for name in EMBEDDINGS),
        *(f"generator_embeddings.{name}" for name in EMBEDDINGS),
        *(f"{side}.project.{kind}" for side in ("generator", "discriminator") for kind in ("weight", "bias")),
        *(f"{side}.layers.{i}.{n}" for side in ("generator", "discriminator") for i in range(layers) for n in LAYER),
        *(f"mlm_head.{name}" for name in ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias")),
        *(f"rtd_head.{name}" for name in ("dense.weight", "dense.bias", "out.weight", "out.bias")),
    ]


def parameters(names: list[str]) -> dict[str, torch.nn.Parameter]:
    """Return vectors for biases and LayerNorm, matrices for the rest."""
    return {name: torch.nn.Parameter(torch.ones([2] if "norm" in name or "bias" in name else [2, 2])) for name in names}


@pytest.mark.parametrize(
    ("variant", "powers"),
    [("google", {"head": 0, 1: 2, 0: 3, "below": 4}), ("paper", {"head": 0, 1: 1, 0: 2, "below": 3})],
)
@pytest.mark.parametrize("wrapped", ["{}", "model.{}", "module._orig_mod.{}"])
def test_layer_learning_rates_of_both_variants_by_name(variant, powers, wrapped):
    # Two layers. google-research/electra: lr for the head, lr·d² for the last layer, one more d per layer towards the
    # input, and one more for embeddings and their projection. The paper's text: lr·d for the last layer.
    names = finetuned_names(2)
    exponents = layer_exponents((wrapped.format(name) for name in names), variant)
    for name in names:
        if name.startswith("head"):
            place = "head"
        elif name.startswith("encoder.layers."):
            place = int(name.split(".")[2])
        else:
            place = "below"
        assert exponents[wrapped.format(name)] == powers[place], name


def test_googles_rates_of_a_12_layer_model_are_those_of_get_layer_lrs():
    depths = {"embeddings": 0, "project": 0, "head": 12 + 2} | {f"layers.{i}": i + 1 for i in range(12)}
    exponents = layer_exponents(finetuned_names(12))
    for name, exponent in exponents.items():
        (depth,) = {depths[key] for key in depths if name.startswith((f"{key}.", f"encoder.{key}."))}
        assert exponent == 12 + 2 - depth, name


def test_every_pretraining_name_has_a_place():
    exponents = layer_exponents(pretraining_names(3))
    assert exponents["discriminator.layers.2.up.weight"] == exponents["generator.layers.2.up.weight"] == 2
    assert exponents["discriminator.layers.0.attention.qkv.bias"] == 4
    assert {exponents[name] for name in exponents if "embeddings" in name or "project" in name} == {5}
    assert {exponents[name] for name in exponents if "_head" in name} == {0}


def test_a_name_without_a_place_is_an_error_with_layerwise_decay():
    with pytest.raises(ValueError, match=r"adapter\.weight has no place"):
        layer_exponents(["encoder.layers.0.up.weight", "adapter.weight"])


@pytest.mark.parametrize("names", [finetuned_names(2), pretraining_names(2)], ids=["finetuned", "pretraining"])
def test_weight_decay_is_for_all_but_layernorm_and_biases_by_name(names):
    matrices = (
        "word",
        "position",
        "token_type",
        "project",
        "qkv",
        "attention.out",
        "up",
        "down",
        "dense",
        "head",
        "out",
    )
    named = {
        name: torch.nn.Parameter(torch.ones((2,) if "norm" in name or "bias" in name else (2, 2))) for name in names
    }
    groups = parameter_groups(named.items(), weight_decay=0.01, lr=1e-3)
    decay_of = {id(param): group["weight_decay"] for group in groups for param in group["params"]}
    assert len(decay_of) == len(names)
    for name, param in named.items():
        is_matrix = name.endswith(".weight") and name.removesuffix(".weight").endswith(matrices)
        assert decay_of[id(param)] == (0.01 if is_matrix else 0.0), name
    assert {group["lr"] for group in groups} == {1e-3}


def test_groups_carry_rate_and_decay_together_and_leave_frozen_parameters_out():
    named = parameters(finetuned_names(2))
    named["embeddings.word.weight"].requires_grad_(False)
    groups = parameter_groups(named.items(), weight_decay=0.1, lr=1.0, layerwise_decay=0.8)
    settings = {id(param): (group["lr"], group["weight_decay"]) for group in groups for param in group["params"]}
    assert len(groups) == 2 * 4  # head, two layers, below; each with and without decay
    assert id(named["embeddings.word.weight"]) not in settings
    assert settings[id(named["head.bias"])] == (1.0, 0.0)
    assert settings[id(named["encoder.layers.1.up.weight"])] == (pytest.approx(0.64), 0.1)
    assert settings[id(named["embeddings.position.weight"])] == (pytest.approx(0.8**4), 0.1)
    assert AdamW(groups, lr=1.0).param_groups[0]["eps"] == 1e-6
