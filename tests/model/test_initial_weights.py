"""Initial weights as drawn by google-research/electra and by transformers (`model.init`)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.config import ModelConfig
from electra_composer.model.networks import ElectraNetworks
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)

# Inputs and outputs of what google's code leaves to TensorFlow's default, in ELECTRA-Small: √(2 / (inputs + outputs)).
GLOROT = {
    "discriminator.project.weight": (128, 256, 0.0722),
    "generator.project.weight": (128, 64, 0.1021),
    "rtd_head.out.weight": (256, 1, 0.0882),
}
CUT = 0.8796  # standard deviation of a standard normal cut at ±2


def small(init: str, **changes: Any) -> ModelConfig:
    """The widths of ELECTRA-Small, in one layer."""
    sizes: dict[str, Any] = {"hidden_size": 256, "num_heads": 4, "embedding_size": 128, "generator_size": 0.25}
    return ModelConfig(num_layers=1, init=init, **{**sizes, **changes})  # type: ignore[arg-type]


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = ElectraNetworks(config, 1000).state_dict()
    return {name: tensor[:1000] for name, tensor in state.items() if tensor.ndim > 1}


def assert_spread(weight: Tensor, expected: float, name: str) -> None:
    """The standard error of a standard deviation is at most σ / √(2n) for these distributions; of a mean, σ / √n."""
    assert abs(weight.std().item() - expected) < 4 * expected / math.sqrt(2 * weight.numel()), name
    assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("tied", [False, True])
def test_googles_standard_deviations(tied: bool) -> None:
    changes = {"tie_encoder": True, "generator_size": 1.0} if tied else {}
    weights = weights_of(small("google", **changes))
    drawn = {name: sizes for name, sizes in GLOROT.items() if not (tied and name.startswith("generator"))}
    assert drawn.keys() <= weights.keys()
    for name, weight in weights.items():
        if name in drawn:
            inputs, outputs, expected = drawn[name]
            assert weight.shape == (outputs, inputs)
            assert math.sqrt(2 / (inputs + outputs)) == pytest.approx(expected, abs=1e-4)
            assert_spread(weight, expected, name)
            limit = math.sqrt(6 / (inputs + outputs))  # of a uniform distribution
            assert 0.95 * limit < weight.abs().max() <= limit
        else:
            assert_spread(weight, CUT * 0.02, name)
            assert weight.abs().max() <= 0.04


def test_without_a_projection_only_the_output_is_drawn_otherwise() -> None:
    weights = weights_of(small("google", embedding_size=256, generator_size=1.0))
    assert [name for name, weight in weights.items() if weight.abs().max() > 0.04] == ["rtd_head.out.weight"]


def test_transformers_standard_deviations_are_those_of_its_models() -> None:
    """Normal, not cut; transformers also zeroes the row of `[PAD]` in the embeddings."""
    config = small("transformers")
    state = weights_of(config)
    torch.manual_seed(1)
    ours = ElectraNetworks(config, 1000).state_dict()
    sizes = discriminator_config(config, 1000), generator_config(config, 1000)
    models = [
        kind(transformers_config(size, 0))
        for kind, size in zip((ElectraForPreTraining, ElectraForMaskedLM), sizes, strict=True)
    ]
    mapped = discriminator_to_transformers(ours, sizes[0]), generator_to_transformers(ours, sizes[1])
    compared = 0
    for model, theirs in zip(models, mapped, strict=True):
        for name, weight in model.state_dict().items():
            if weight.ndim > 1 and name in theirs:
                used = weight[1:] if name.endswith("word_embeddings.weight") else weight
                assert_spread(used, 0.02, name)
                assert_spread(theirs[name], 0.02, name)
                compared += weight.numel() > 1000
    assert compared > 15
    assert max(weight.abs().max().item() for weight in state.values()) > 0.06  # three standard deviations


def test_glorot_uniform_weights_are_drawn_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a seed draws the other weights as in earlier versions. All biases are 0."""
    weights = weights_of(small("google"))
    monkeypatch.setattr(ElectraNetworks, "_draw_defaults_of_tensorflow", lambda networks: None)
    earlier = weights_of(small("google"))
    assert {name for name, weight in weights.items() if not torch.equal(weight, earlier[name])} == GLOROT.keys()
    biases = [part.bias for part in ElectraNetworks(small("google"), 99).modules() if isinstance(part, nn.Linear)]
    assert not any(bias.any() for bias in biases)
