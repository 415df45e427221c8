"""Tied modules, padding rows of the vocabulary, sizes and initialisation of the pretraining model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from electra_inputs import CLOSE, UNEVEN, VOCAB_SIZE, noise_of

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.sizes import count_parameters, discriminator_config, generator_config

Make = Callable[..., Any]


def test_tied_there_is_one_set_of_embeddings(make_model: Make) -> None:
    model = make_model(perturbed=False)
    tables = [name for name, _ in model.named_parameters() if name.endswith(("word.weight", "position.weight"))]
    assert tables == ["embeddings.word.weight", "embeddings.position.weight"]
    assert model.embeddings_of_generator is model.embeddings
    assert model.generator.project is not None or model.generator.config.hidden_size == 16
    assert model.discriminator.project is not None


@pytest.mark.parametrize("part", ["word", "position", "token_type", "norm"])
def test_changing_the_embeddings_changes_both_sides(make_model: Make, make_batch: Make, part: str) -> None:
    """After construction and after load_state_dict."""
    batch = make_batch(UNEVEN)
    for loaded in (False, True):
        model = make_model()
        if loaded:
            model.load_state_dict({name: tensor.clone() for name, tensor in make_model(seed=9).state_dict().items()})
        noise = noise_of(model, batch)
        before = model(**batch, noise=noise)
        before_logits = model.mlm_logits(before["mlm_features"])
        with torch.no_grad():
            getattr(model.embeddings, part).weight.add_(torch.randn_like(getattr(model.embeddings, part).weight) * 0.3)
        after = model(**batch, noise=noise)
        assert not torch.allclose(before_logits, model.mlm_logits(after["mlm_features"]))
        assert not torch.allclose(before["rtd_logits"], after["rtd_logits"])


def test_the_output_layer_of_the_generator_is_the_word_embeddings(make_model: Make, make_batch: Make) -> None:
    """Scaling the embedding of a word absent from the input scales its logit and no other."""
    model = make_model()
    batch = make_batch(UNEVEN)
    batch["input_ids"][batch["input_ids"] == 50] = 51
    noise = noise_of(model, batch)
    before = model.mlm_logits(model(**batch, noise=noise)["mlm_features"])
    bias = model.mlm_head.bias[50].item()
    with torch.no_grad():
        model.embeddings.word.weight[50] *= 2
    after = model.mlm_logits(model(**batch, noise=noise)["mlm_features"])
    torch.testing.assert_close(after[..., 50] - bias, 2 * (before[..., 50] - bias), **CLOSE)
    others = torch.arange(VOCAB_SIZE) != 50
    assert torch.equal(after[..., others], before[..., others])


def test_all_weights_tied_there_is_one_encoder(make_model: Make, make_batch: Make, tiny_model_config: Make) -> None:
    model = make_model(tiny_model_config(tie_encoder=True, generator_size=1.0, num_heads=1))
    assert not [name for name in model.state_dict() if name.startswith("generator")]
    batch = make_batch(UNEVEN)
    noise = noise_of(model, batch)
    before = model(**batch, noise=noise)
    with torch.no_grad():
        model.discriminator.layers[0].up.weight.mul_(2.0)
    after = model(**batch, noise=noise)
    for name in ("mlm_features", "rtd_logits"):
        assert not torch.allclose(before[name], after[name]), name


def test_untied_each_side_has_its_own(make_model: Make, make_batch: Make, tiny_model_config: Make) -> None:
    model = make_model(tiny_model_config(sharing="untied"))
    assert model.generator_embeddings is not None
    batch = make_batch(UNEVEN)
    noise = noise_of(model, batch)
    before = model(**batch, noise=noise)
    before_logits = model.mlm_logits(before["mlm_features"])
    with torch.no_grad():
        model.embeddings.word.weight.add_(torch.randn_like(model.embeddings.word.weight))
    after = model(**batch, noise=noise)
    after_logits = model.mlm_logits(after["mlm_features"])
    assert torch.equal(before_logits, after_logits)
    assert not torch.allclose(before["rtd_logits"], after["rtd_logits"])
    with torch.no_grad():
        model.generator_embeddings.word.weight.add_(torch.randn_like(model.generator_embeddings.word.weight))
    assert not torch.allclose(after_logits, model.mlm_logits(model(**batch, noise=noise)["mlm_features"]))


@pytest.mark.parametrize("sharing", ["tied", "untied", "gdes"])
def test_padded_rows_are_never_predicted_and_get_no_gradient(
    make_model: Make, make_batch: Make, tiny_model_config: Make, sharing: str
) -> None:
    """99 words in a table of 128: logits are 99 wide, rows 99 to 127 are zero and have zero gradient."""
    model = make_model(tiny_model_config(sharing=sharing), perturbed=False)
    batch = make_batch(UNEVEN * 4)
    outputs = model(**batch, noise=noise_of(model, batch))
    assert model.mlm_logits(outputs["mlm_features"]).shape == (16, model.slots, VOCAB_SIZE)
    assert outputs["corrupted_ids"].max() < VOCAB_SIZE
    (outputs["mlm_loss"] + outputs["rtd_loss"]).backward()
    tables = [p for name, p in model.named_parameters() if name.endswith(("word.weight", "word_delta"))] + [
        model.mlm_head.bias
    ]
    assert len(tables) == (2 if sharing == "tied" else 3)
    for table in tables:
        assert table.shape[0] == 128
        assert (table[VOCAB_SIZE:] == 0).all()
        assert table.grad is not None
        assert (table.grad[VOCAB_SIZE:] == 0).all()
        assert table.grad[:VOCAB_SIZE].any()


PAPER = {  # layers, hidden, heads, embedding, generator size (table 6); the generator's hidden size and heads
    "small": ((12, 256, 4, 128, 0.25), (64, 1)),
    "base": ((12, 768, 12, 768, 1 / 3), (256, 4)),
    "large": ((24, 1024, 16, 1024, 0.25), (256, 4)),
}


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name: str) -> None:
    (layers, hidden, heads, embedding, fraction), (generator_hidden, generator_heads) = PAPER[name]
    config = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_heads=heads, embedding_size=embedding, generator_size=fraction
    )
    discriminator, generator = discriminator_config(config, 30522), generator_config(config, 30522)
    assert (discriminator.num_layers, discriminator.hidden_size, discriminator.num_heads) == (layers, hidden, heads)
    assert discriminator.intermediate_size == 4 * hidden
    assert (generator.hidden_size, generator.num_heads) == (generator_hidden, generator_heads)
    assert generator.intermediate_size == 4 * generator_hidden
    assert generator.num_layers == layers
    assert generator.embedding_size == discriminator.embedding_size == embedding
    assert (generator.dropout, generator.attention_dropout, generator.layer_norm_eps) == (0.1, 0.1, 1e-12)


@pytest.mark.parametrize("written", [0.33333, 0.3333333333])
def test_a_third_may_be_written_as_a_decimal(written: float) -> None:
    config = ModelConfig(num_layers=12, hidden_size=768, num_heads=12, embedding_size=768, generator_size=written)
    assert generator_config(config, 30522).hidden_size == 256


def test_heads_and_layers_of_the_generator_can_be_told(tiny_model_config: Make, make_model: Make) -> None:
    config = tiny_model_config(num_layers=3, generator_layers=1)
    assert len(make_model(config).generator.layers) == 1
    assert len(make_model(config).discriminator.layers) == 3


def test_small_has_the_parameters_of_the_papers(special: SpecialIds) -> None:
    """ELECTRA-small has 14M parameters without the generator (table 1)."""
    config = ModelConfig(num_layers=12, hidden_size=256, num_heads=4, embedding_size=128, generator_size=0.25)
    with torch.device("meta"):
        model = ElectraForPretraining(config, ObjectiveConfig(), 30522, special, 128)
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("generator", "mlm_head")))
    assert round(count / 1e6) in (13, 14)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"sharing": "untied"},
        {"sharing": "untied", "generator_embedding_size": 24},
        {"sharing": "gdes"},
        {"tie_encoder": True, "generator_size": 1.0, "num_heads": 1},
        {"embedding_size": 32, "num_layers": 3, "generator_layers": 1},
    ],
)
def test_parameters_are_counted_without_building_them(
    make_model: Make, tiny_model_config: Make, sizes: dict[str, Any]
) -> None:
    config = tiny_model_config(**sizes)
    assert count_parameters(config, VOCAB_SIZE) == sum(p.numel() for p in make_model(config).parameters())


def test_initial_weights(make_model: Make, tiny_model_config: Make) -> None:
    """Every matrix within its limit, every bias zero, every LayerNorm the identity; test_initial_weights.py has more.

    The limit is two standard deviations of 0.02, or √(6 / (inputs + outputs)) of a Glorot-uniform matrix.
    """
    model = make_model(tiny_model_config(hidden_size=128, embedding_size=64), perturbed=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            glorot = name.endswith(("project.weight", "rtd_head.out.weight"))
            limit = math.sqrt(6 / sum(parameter.shape)) if glorot else 0.04
            assert parameter.abs().max() <= limit + 1e-8, name
            if parameter.numel() > 4000 and "word" not in name:
                expected = limit / math.sqrt(3) if glorot else 0.02 * 0.8796
                assert parameter.std().item() == pytest.approx(expected, rel=0.06), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        else:
            assert (parameter == 0).all(), name


@pytest.mark.parametrize(
    ("sizes", "objective", "length", "message"),
    [
        ({"hidden_size": 30}, {}, 32, "hidden_size 30 is not a multiple of its 4 heads"),
        ({"num_heads": 0}, {}, 32, "num_heads is 0"),
        ({"num_layers": 0}, {}, 32, "num_layers is 0"),
        ({"generator_size": 0.01}, {}, 32, r"generator \(model\.generator_size.*\): hidden_size is 0"),
        ({"generator_layers": 0}, {}, 32, r"model\.generator_layers is 0"),
        ({"embedding_size": 0}, {}, 32, "embedding_size is 0"),
        ({"tie_encoder": True}, {}, 32, r"differ in hidden_size.*generator_size=1\.0.*num_heads=1"),
        ({"tie_encoder": True, "sharing": "untied"}, {}, 32, r"model\.sharing is untied; set model\.sharing=tied"),
        ({"tie_encoder": True, "sharing": "gdes"}, {}, 32, r"model\.sharing is gdes; set model\.sharing=tied"),
        ({"generator_embedding_size": 24}, {}, 32, r"generator_embedding_size is 24, but with model\.sharing=tied"),
        ({"generator_embedding_size": 8, "sharing": "gdes"}, {}, 32, r"is 8, but .*=gdes .*embedding_size \(16\)"),
        ({"dropout": 1.5}, {}, 32, r"model\.dropout is 1\.5; expected a number in \[0, 0\.99\]"),
        ({"attention_dropout": -0.1}, {}, 32, r"model\.attention_dropout is -0\.1"),
        ({}, {"temperature": 0.0}, 32, r"objective\.temperature is 0\.0"),
        ({}, {"temperature": math.nan}, 32, r"objective\.temperature is nan"),
        ({}, {"disc_weight": -50.0}, 32, r"objective\.disc_weight is -50\.0"),
        ({}, {"gen_weight": -1.0}, 32, r"objective\.gen_weight is -1\.0"),
        ({}, {"mlm_label_smoothing": 2.0}, 32, r"objective\.mlm_label_smoothing is 2\.0"),
        ({}, {"rtd_label_smoothing": -0.1}, 32, r"objective\.rtd_label_smoothing is -0\.1"),
        ({}, {"mask_prob": 0.0}, 32, "mask_prob is 0.0"),
        ({}, {"mask_prob": 1.5}, 32, "mask_prob is 1.5"),
        ({}, {"mask_prob": -0.5}, 32, "mask_prob is -0.5"),
        ({}, {}, 64, "max_seq_length 64 is more than model.max_positions 40"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    make_model: Make,
    tiny_model_config: Make,
    sizes: dict[str, Any],
    objective: dict[str, Any],
    length: int,
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        make_model(tiny_model_config(**sizes), ObjectiveConfig(**objective), max_seq_length=length)
