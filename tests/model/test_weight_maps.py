"""Weight maps to and from transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.errors import UserError
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    encoder_config_of,
    generator_to_transformers,
    pretraining_from_transformers,
    transformers_config,
)

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        *itertools.product([{}, {"embedding_size": 32}, {"generator_size": 1.0, "embedding_size": 32}], [True, False]),
        ({"tie_encoder": True, "generator_size": 1.0, "num_heads": 1}, True),
    ],
)
def test_maps_fit_transformers_strictly_and_come_back_as_they_went(
    make_model: Make, tiny_model_config: Make, sizes: dict[str, Any], tied: bool
) -> None:
    width = {} if tied else {"generator_embedding_size": sizes.get("embedding_size", 16)}
    config = tiny_model_config(**sizes, **width, sharing="tied" if tied else "untied")
    ours = make_model(config)
    state = ours.state_dict()
    discriminator = ElectraForPreTraining(transformers_config(ours.discriminator.config, pad_id=0))
    generator = ElectraForMaskedLM(transformers_config(ours.encoder_of_generator.config, pad_id=0))
    discriminator.load_state_dict(discriminator_to_transformers(state, ours.discriminator.config), strict=True)
    generator.load_state_dict(generator_to_transformers(state, ours.encoder_of_generator.config), strict=True)
    back = pretraining_from_transformers(discriminator.state_dict(), generator.state_dict(), config, 99)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_disentangled_embeddings_are_mapped_as_their_sums(make_model: Make, tiny_model_config: Make) -> None:
    """There as E_G + E_Δ, without the padding; back as differences, equal up to the rounding of the sums."""
    config = tiny_model_config(sharing="gdes")
    state = make_model(config).state_dict()
    discriminator = discriminator_to_transformers(state, discriminator_config(config, 99))
    generator = generator_to_transformers(state, generator_config(config, 99))
    for table, theirs in (("word", "word_embeddings"), ("position", "position_embeddings")):
        base, found = state[f"generator_embeddings.{table}.weight"], f"electra.embeddings.{theirs}.weight"
        rows = len(discriminator[found])
        assert torch.equal(generator[found], base[:rows])
        assert torch.equal(discriminator[found], (base + state[f"embeddings.{table}_delta"])[:rows])
    back = pretraining_from_transformers(discriminator, generator, config, 99)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6 if name.endswith("_delta") else 0, msg=name)


def test_maps_copy(make_model: Make) -> None:
    """What is exported does not change when training goes on, nor the other way round."""
    model = make_model()
    exported = discriminator_to_transformers(model.state_dict(), model.discriminator.config)
    before = {name: tensor.clone() for name, tensor in exported.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(exported[name], before[name]) for name in before)


def test_exported_embeddings_of_both_sides_are_equal(make_model: Make) -> None:
    """Tying holds in what transformers is given: embeddings of both models, and the generator's output weights."""
    model = make_model()
    state = model.state_dict()
    discriminator = discriminator_to_transformers(state, model.discriminator.config)
    generator = generator_to_transformers(state, model.generator.config)
    shared = [name for name in discriminator if name.startswith("electra.embeddings.")]
    assert len(shared) == 5
    for name in shared:
        assert torch.equal(discriminator[name], generator[name]), name
    words = generator["electra.embeddings.word_embeddings.weight"]
    assert words.shape == (99, 16)  # without the rows that pad ours
    assert torch.equal(generator["generator_lm_head.weight"], words)
    assert generator["generator_lm_head.bias"].shape == (99,)


def test_different_embeddings_are_not_tied_silently(make_model: Make, tiny_model_config: Make) -> None:
    config = tiny_model_config(sharing="untied")
    model = make_model(config)
    parts = (
        discriminator_to_transformers(model.state_dict(), model.discriminator.config),
        generator_to_transformers(model.state_dict(), model.generator.config),
    )
    with pytest.raises(UserError, match=r"set model\.sharing to untied or gdes"):
        pretraining_from_transformers(*parts, tiny_model_config(), 99)
    back = pretraining_from_transformers(*parts, config, 99)
    assert not torch.equal(back["embeddings.word.weight"], back["generator_embeddings.word.weight"])


def test_different_layers_are_not_tied_silently(make_model: Make, tiny_model_config: Make) -> None:
    sizes = {"generator_size": 1.0, "num_heads": 1}
    model = make_model(tiny_model_config(**sizes))
    parts = (
        discriminator_to_transformers(model.state_dict(), model.discriminator.config),
        generator_to_transformers(model.state_dict(), model.encoder_of_generator.config),
    )
    with pytest.raises(UserError, match="tie_encoder=false"):
        pretraining_from_transformers(*parts, tiny_model_config(**sizes, tie_encoder=True), 99)


def test_a_missing_weight_is_named(make_model: Make, tiny_model_config: Make) -> None:
    model = make_model()
    discriminator = discriminator_to_transformers(model.state_dict(), model.discriminator.config)
    generator = generator_to_transformers(model.state_dict(), model.generator.config)
    del discriminator["electra.encoder.layer.1.attention.self.key.bias"]
    with pytest.raises(UserError, match=r"encoder\.layer\.1\.attention\.self\.key\.bias"):
        pretraining_from_transformers(discriminator, generator, tiny_model_config(), 99)


def test_sizes_there_and_back(make_model: Make) -> None:
    sizes = make_model().discriminator.config
    assert encoder_config_of(transformers_config(sizes, pad_id=0)) == sizes


@pytest.mark.parametrize(
    "change", [{"hidden_act": "relu"}, {"position_embedding_type": "relative_key"}, {"hidden_act": "gelu_new"}]
)
def test_what_our_encoder_does_not_compute_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="only"):
        encoder_config_of(ElectraConfig(**change))
