"""`model.sharing`: gradients, initial values, widths and numbers of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_inputs import UNEVEN, VOCAB_SIZE, gradients, noise_of

from electra_composer.config import ModelConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.networks import ElectraNetworks
from electra_composer.model.sizes import count_parameters, generator_config
from electra_composer.training.optim import AdamW, decays, parameter_groups

Make = Callable[..., Any]
TABLES = ("word", "position", "token_type")
DELTAS = [f"embeddings.{table}_delta" for table in TABLES]
GENERATORS = [f"generator_embeddings.{table}.weight" for table in TABLES]


@pytest.fixture
def gdes(make_model: Make, tiny_model_config: Make) -> ElectraForPretraining:
    return make_model(tiny_model_config(sharing="gdes"))


def test_disentangled_embeddings_are_their_formula(gdes: ElectraForPretraining, make_batch: Make) -> None:
    """A twin from the paper: two tables, the generator's detached; output, and gradients of all that takes part."""
    ids = [make_batch(UNEVEN)[name] for name in ("input_ids", "position_ids", "token_type_ids")]
    state = {name: tensor.clone().requires_grad_() for name, tensor in gdes.state_dict().items() if "embed" in name}
    summed = torch.zeros(())
    for index, base, delta in zip(ids, GENERATORS, DELTAS, strict=True):
        summed = summed + (state[base].detach() + state[delta])[index]
    centred = summed - summed.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    expected = normed * state["embeddings.norm.weight"] + state["embeddings.norm.bias"]
    found = gdes.embeddings(ids[0], ids[2], ids[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    for name, gradient in gradients(gdes).items():
        if name in state and name.startswith("embeddings."):
            torch.testing.assert_close(gradient, state[name].grad, rtol=1e-4, atol=1e-4)
            assert gradient.any(), name
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize(
    ("loss", "trained", "untouched"), [("mlm_loss", GENERATORS, DELTAS), ("rtd_loss", DELTAS, GENERATORS)]
)
def test_each_loss_trains_its_own_tables(
    gdes: ElectraForPretraining, make_batch: Make, loss: str, trained: list[str], untouched: list[str]
) -> None:
    batch = make_batch(UNEVEN)
    gdes(**batch, noise=noise_of(gdes, batch))[loss].backward()
    found = gradients(gdes)
    assert all(found[name].any() for name in trained)
    assert not any(found[name].any() for name in untouched)
    norms = [
        f"{'embeddings' if loss == 'rtd_loss' else 'generator_embeddings'}.norm.{kind}" for kind in ("weight", "bias")
    ]
    assert all(found[name].any() == (name in norms) for name in found if "embeddings.norm" in name)


@pytest.mark.parametrize("init", ["google", "transformers"])
def test_differences_are_zero_at_first(make_model: Make, tiny_model_config: Make, init: str) -> None:
    model = make_model(tiny_model_config(sharing="gdes", init=init, initializer_range=0.5), perturbed=False)
    state = model.state_dict()
    assert not any(state[name].any() for name in DELTAS)
    assert all(state[name][:2].any() for name in GENERATORS)
    assert not state["generator_embeddings.word.weight"][VOCAB_SIZE:].any()
    for table, base in zip(model.embeddings.tables(), GENERATORS, strict=True):
        assert torch.equal(table, state[base])


def test_padding_rows_stay_zero_and_weight_decay_draws_to_the_generator(
    make_model: Make, make_batch: Make, tiny_model_config: Make
) -> None:
    """After steps of AdamW; and without gradients, decay alone shrinks the differences."""
    model, batch = make_model(tiny_model_config(sharing="gdes"), perturbed=False), make_batch(UNEVEN)
    assert all(decays(name, dict(model.named_parameters())[name]) for name in (*DELTAS, *GENERATORS))
    optimizer = AdamW(parameter_groups(model.named_parameters(), 0.1, 1e-2), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(**batch, noise=noise_of(model, batch))
        (outputs["mlm_loss"] + 50 * outputs["rtd_loss"]).backward()
        optimizer.step()
    for table in (model.embeddings.word_delta, *model.embeddings.tables()[:1], model.generator_embeddings.word.weight):
        assert table[:VOCAB_SIZE].any()
        assert not table[VOCAB_SIZE:].any()
    base, before = model.generator_embeddings.word.weight.clone(), model.embeddings.tables()[0].clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter is model.embeddings.word_delta else None
    decayed = AdamW([model.embeddings.word_delta], lr=1.0, weight_decay=0.5)
    decayed.step()
    torch.testing.assert_close(model.embeddings.tables()[0], base + 0.5 * (before - base))


def test_a_copy_has_the_embeddings_of_its_own_generator(gdes: ElectraForPretraining, make_batch: Make) -> None:
    """Its embeddings hold a reference to the generator's that is no submodule."""
    assert not [name for name in gdes.state_dict() if "base" in name]
    clone, batch = copy.deepcopy(gdes), make_batch(UNEVEN)
    with torch.no_grad():
        clone.generator_embeddings.word.weight.mul_(2.0)  # type: ignore[union-attr]
        assert not torch.equal(clone.embeddings.tables()[0], gdes.embeddings.tables()[0])
    before, after = (one(**batch, noise=noise_of(one, batch))["rtd_logits"] for one in (gdes, clone))
    assert not torch.allclose(before, after)


def small(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"num_layers": 12, "hidden_size": 256, "num_heads": 4, "embedding_size": 128}
    return ModelConfig(**sizes, generator_size=0.25, **changes)


def test_untied_small_has_the_parameters_of_googles() -> None:
    """Generator of ELECTRA-Small with `untied_generator_embeddings`, by hand: everything in it is 64 wide."""
    width, vocabulary, padded = 64, 30522, 30528
    layer = 4 * (width * width + width) + (width * 4 * width + 4 * width) + (4 * width * width + width) + 4 * width
    embeddings = vocabulary * width + 512 * width + 2 * width + 2 * width
    head = (width * width + width) + 2 * width + vocabulary
    expected = embeddings + 12 * layer + head
    assert (embeddings, layer, head) == (1_986_432, 49_984, 34_810)
    with torch.device("meta"):
        model = ElectraNetworks(small(sharing="untied"), vocabulary)
    parts = {"generator", "generator_embeddings", "mlm_head"}
    found = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in parts)
    assert found - (padded - vocabulary) * (width + 1) == expected
    assert model.generator is not None
    assert model.generator.project is None
    assert model.discriminator.project is not None
    tied = count_parameters(small(), vocabulary)
    added = (padded + 512 + 2 + 2) * width - 128 * width - width - (128 - 64) * (width + 3)
    assert count_parameters(small(sharing="untied"), vocabulary) == tied + added
    assert count_parameters(small(sharing="gdes"), vocabulary) == tied + (padded + 512 + 2 + 2) * 128


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 128),
        ({"sharing": "gdes"}, 128),
        ({"sharing": "tied", "generator_embedding_size": 128}, 128),
        ({"sharing": "untied"}, 64),
        ({"sharing": "untied", "generator_embedding_size": 128}, 128),
    ],
)
def test_widths_of_the_generators_embeddings(changes: dict[str, Any], width: int) -> None:
    assert generator_config(small(**changes), 30522).embedding_size == width


def test_the_generators_own_width_reaches_its_logits(
    make_model: Make, make_batch: Make, tiny_model_config: Make
) -> None:
    """Features and tables are as wide as the generator's embeddings: 24 and not 16."""
    model, batch = make_model(tiny_model_config(sharing="untied", generator_embedding_size=24)), make_batch(UNEVEN)
    features = model(**batch, noise=noise_of(model, batch))["mlm_features"]
    assert features.shape[-1] == 24
    logits = F.linear(features, model.generator_embeddings.word.weight, model.mlm_head.bias)[..., :VOCAB_SIZE]
    torch.testing.assert_close(model.mlm_logits(features), logits, rtol=1e-5, atol=1e-5)
