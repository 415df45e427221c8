"""Encoder against transformers' `ElectraModel`, initialisation, attention within examples, classification head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ElectraModel

from electra_composer.config import ModelConfig
from electra_composer.model.electra import SpecialIds
from electra_composer.model.encoder import Embeddings, Encoder, init_weights
from electra_composer.model.finetuning import ElectraForClassification
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.sizes import discriminator_config
from electra_composer.model.weight_maps import encoder_to_transformers, transformers_config

Batch = dict[str, torch.Tensor]


def body(config: ModelConfig, perturbed: bool = True) -> tuple[Embeddings, Encoder]:
    sizes = discriminator_config(config, 99)
    embeddings, encoder = Embeddings(sizes), Encoder(sizes)
    if perturbed:
        for parameter in (*embeddings.parameters(), *encoder.parameters()):
            nn.init.normal_(parameter, mean=0.1, std=0.3)
    return embeddings, encoder


def run(embeddings: Embeddings, encoder: Encoder, batch: Batch) -> torch.Tensor:
    embedded = embeddings(batch["input_ids"], batch["token_type_ids"], batch["position_ids"])
    return encoder(embedded, pattern_of(batch["sequence_ids"]))


@pytest.mark.parametrize("embedding_size", [16, 32])
def test_hidden_states_agree_with_transformers(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch], embedding_size: int
) -> None:
    """Embedding size different from and equal to the hidden size (no projection), two segments, padding."""
    embeddings, encoder = body(tiny_model_config(embedding_size=embedding_size))
    theirs = ElectraModel(transformers_config(encoder.config, pad_id=0)).eval()
    assert (encoder.project is None) == (embedding_size == 32)
    theirs.load_state_dict(encoder_to_transformers(embeddings.state_dict(), encoder.state_dict(), encoder.config))
    batch = make_batch([[(10, 12)], [(20, 0)], [(3, 29)]])
    present = batch["sequence_ids"] > 0
    with torch.no_grad():
        expected = theirs(batch["input_ids"], present.long(), batch["token_type_ids"]).last_hidden_state
        found = run(embeddings, encoder, batch)
    torch.testing.assert_close(found[present], expected[present], rtol=1e-5, atol=1e-5)


def test_positions_restart_and_packing_changes_nothing(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch]
) -> None:
    """Hidden states in a packed row equal those of the example alone in a row."""
    embeddings, encoder = body(tiny_model_config())
    packed = make_batch([[(6, 5), (8, 0), (4, 7)]])
    hidden = run(embeddings, encoder, packed)
    for number, length in ((1, 11), (2, 8), (3, 11)):
        here = packed["sequence_ids"] == number
        alone = {name: tensor[here][None] for name, tensor in packed.items()}
        assert alone["position_ids"].tolist() == [list(range(length))]
        torch.testing.assert_close(hidden[here], run(embeddings, encoder, alone)[0], rtol=1e-5, atol=1e-5)


def test_a_token_changes_nothing_in_another_example(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch]
) -> None:
    """Hidden states are bitwise identical, and the gradient is exactly zero."""
    embeddings, encoder = body(tiny_model_config())
    batch = make_batch([[(6, 5), (8, 0), (4, 7)]])
    example = batch["sequence_ids"]
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 3] += 1
    before, after = run(embeddings, encoder, batch), run(embeddings, encoder, changed)
    assert torch.equal(before[example > 1], after[example > 1])
    assert (before[example == 1] != after[example == 1]).any(dim=-1).all()

    embedded = torch.randn(1, 32, 16, requires_grad=True)
    hidden = encoder(embedded, pattern_of(example))
    hidden[example == 2].sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad[example != 2] == 0).all()
    assert (embedded.grad[example == 2] != 0).all()


def test_attention_mask() -> None:
    """Examples 1 1 2 and one padding: blocks on the diagonal, and no empty row."""
    bias = pattern_of(torch.tensor([[1, 1, 2, 0]])).bias
    assert bias is not None
    assert bias.shape == (1, 1, 4, 4)
    assert bias[0, 0].exp().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_rows_of_padding_alone_are_finite(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch]
) -> None:
    embeddings, encoder = body(tiny_model_config())
    assert torch.isfinite(run(embeddings, encoder, make_batch([[], [(5, 0)]]))).all()


def test_dropout_is_off_in_evaluation_and_on_in_training(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch]
) -> None:
    batch = make_batch([[(10, 12)]])
    for which in ("dropout", "attention_dropout"):
        embeddings, encoder = body(tiny_model_config(**{which: 0.1}))
        assert not torch.equal(run(embeddings, encoder, batch), run(embeddings, encoder, batch)), which
        embeddings.eval(), encoder.eval()
        assert torch.equal(run(embeddings, encoder, batch), run(embeddings, encoder, batch)), which


def truncated_std(std: float) -> float:
    """Standard deviation of a normal truncated at two standard deviations: σ √(1 - 2·2φ(2)/(2Φ(2)-1)) ≈ 0.8796 σ."""
    density = math.exp(-2.0) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 4 * density / math.erf(2 / math.sqrt(2)))


def initialised(config: ModelConfig) -> list[tuple[str, nn.Module]]:
    embeddings, encoder = body(config, perturbed=False)
    both = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})
    init_weights(both, config.initializer_range)
    return [(name, module) for name, module in both.named_modules()]


def test_weights_are_a_normal_truncated_at_two_standard_deviations(
    tiny_model_config: Callable[..., ModelConfig],
) -> None:
    config = tiny_model_config(hidden_size=128, embedding_size=64, max_positions=512)
    seen = 0
    for name, module in initialised(config):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            assert weight.abs().max() <= 0.04 + 1e-8, name
            if weight.numel() > 4000:
                seen += 1
                # Standard error of a standard deviation is at most σ / √(2n); of the mean σ / √n.
                expected = truncated_std(0.02)
                assert abs(weight.std().item() - expected) < 5 * expected / math.sqrt(2 * weight.numel()), name
                assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
                assert weight.abs().max() > 0.038, name  # cut, not squeezed
    assert seen == 2 + 1 + 2 * 4  # words and positions; projection; qkv, out, up, down of two layers


def test_biases_are_zero_and_norms_the_identity(tiny_model_config: Callable[..., ModelConfig]) -> None:
    for name, module in initialised(tiny_model_config()):
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            assert module.eps == 1e-12, name


def test_embedding_table_is_padded_to_a_multiple_of_64(tiny_model_config: Callable[..., ModelConfig]) -> None:
    for vocab_size, rows in ((1, 64), (64, 64), (65, 128), (30522, 30528)):
        assert discriminator_config(tiny_model_config(), vocab_size).padded_vocab_size == rows


def classifier(config: ModelConfig, num_labels: int = 3, **changes: Any) -> ElectraForClassification:
    return ElectraForClassification(discriminator_config(config, 99), num_labels, **changes)


def test_classification_head_is_xavier_uniform_without_bias(tiny_model_config: Callable[..., ModelConfig]) -> None:
    """Uniform within ±√(6 / (in + out)): its standard deviation is the bound / √3."""
    head = classifier(tiny_model_config(hidden_size=256)).head
    bound = math.sqrt(6 / (256 + 3))
    assert head.weight.abs().max() <= bound
    assert head.weight.abs().max() > 0.95 * bound
    assert abs(head.weight.std().item() - bound / math.sqrt(3)) < 0.05 * bound
    assert (head.bias == 0).all()


def test_classification_reads_the_last_hidden_state_of_cls_alone(
    tiny_model_config: Callable[..., ModelConfig], make_batch: Callable[..., Batch], special: SpecialIds
) -> None:
    """One linear layer, no tanh or further layers: compared with an explicit product."""
    model = classifier(tiny_model_config()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = make_batch([[(10, 12)], [(7, 0)]])
    assert (batch["input_ids"][:, 0] == special.cls).all()
    hidden = run(model.embeddings, model.encoder, batch)[:, 0]
    expected = torch.einsum("rh,lh->rl", hidden, model.head.weight) + model.head.bias
    torch.testing.assert_close(model(**batch), expected, rtol=1e-5, atol=1e-5)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"embeddings", "encoder", "head"}


def test_classifier_dropout_is_of_the_given_probability(tiny_model_config: Callable[..., ModelConfig]) -> None:
    assert classifier(tiny_model_config()).dropout.p == 0.1
    assert classifier(tiny_model_config(), classifier_dropout=0.3).dropout.p == 0.3
