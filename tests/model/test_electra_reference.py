"""Joint forward against transformers' two ELECTRA models, and packed rows against one example per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_inputs import CLOSE, LENGTH, UNEVEN, Batch, gradients, noise_of
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)

Make = Callable[..., Any]


def tied_by_hand(model: ElectraForPretraining) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    """Build transformers' generator and discriminator with our weights, and tie by assignment what ours tie."""
    state = model.state_dict()
    config = model.encoder_of_generator.config
    generator = ElectraForMaskedLM(transformers_config(config, pad_id=0))
    discriminator = ElectraForPreTraining(transformers_config(model.discriminator.config, pad_id=0))
    generator.load_state_dict(generator_to_transformers(state, config))
    discriminator.load_state_dict(discriminator_to_transformers(state, model.discriminator.config))
    ours, theirs = generator.electra.embeddings, discriminator.electra.embeddings
    if model.generator_embeddings is None:
        for part in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
            setattr(ours, part, getattr(theirs, part))
    generator.generator_lm_head.weight = ours.word_embeddings.weight
    if model.generator is None:
        generator.electra.encoder = discriminator.electra.encoder
        generator.electra.embeddings_project = discriminator.electra.embeddings_project
    return generator.train(), discriminator.train()  # dropout is 0


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"embedding_size": 32},  # the discriminator has no projection
        {"embedding_size": 16, "generator_size": 0.5, "num_layers": 3, "generator_layers": 1},
        {"embedding_size": 32, "generator_size": 1.0},  # neither has one
        {"tie_encoder": True, "generator_size": 1.0, "num_heads": 1},
        {"sharing": "untied"},
        {"sharing": "untied", "generator_embedding_size": 24},
        {"sharing": "gdes"},
    ],
)
def test_logits_losses_and_gradients_agree_with_transformers(
    make_model: Make, make_batch: Make, tiny_model_config: Make, sizes: dict[str, Any]
) -> None:
    model_config = tiny_model_config(**sizes)
    model = make_model(model_config).train()
    with torch.no_grad():
        model.mlm_head.bias[5:9] += 4.0  # the only words of the batch: some samples hit the original
    batch = make_batch(UNEVEN, vocab_size=9)
    present = batch["sequence_ids"] > 0
    noise = noise_of(model, batch)
    outputs = model(**batch, noise=noise)
    used = outputs["masked_weights"] > 0
    positions = outputs["masked_positions"]
    rows = torch.arange(len(positions))[:, None].expand_as(positions)[used], positions[used]
    masked, tokens = int(used.sum()), int(present.sum())
    ours_mlm, ours_rtd = outputs["mlm_loss"] / masked, outputs["rtd_loss"] / tokens
    (ours_mlm + 50.0 * ours_rtd).backward()

    # Input of the generator, derived from the noise: [MASK] where the slot's number is below 0.85.
    masked_ids = batch["input_ids"].clone()
    replace = noise[:, LENGTH : LENGTH + model.slots]
    masked_ids[rows] = torch.where(replace[used] < 0.85, 4, masked_ids[rows])
    assert 0 < (masked_ids != batch["input_ids"]).sum() < masked  # some kept their token
    labels = torch.full_like(masked_ids, -100)
    labels[rows] = batch["input_ids"][rows]

    generator, discriminator = tied_by_hand(model)
    shared = {"attention_mask": present.long(), "token_type_ids": batch["token_type_ids"]}
    theirs_generator = generator(masked_ids, labels=labels, **shared)
    replaced = (outputs["corrupted_ids"] != batch["input_ids"]).long()
    theirs_discriminator = discriminator(outputs["corrupted_ids"], labels=replaced, **shared)
    (theirs_generator.loss + 50.0 * theirs_discriminator.loss).backward()

    torch.testing.assert_close(model.mlm_logits(outputs["mlm_features"])[used], theirs_generator.logits[rows], **CLOSE)
    torch.testing.assert_close(outputs["rtd_logits"][present], theirs_discriminator.logits[present], **CLOSE)
    torch.testing.assert_close(ours_mlm, theirs_generator.loss, **CLOSE)
    torch.testing.assert_close(ours_rtd, theirs_discriminator.loss, **CLOSE)
    assert 0 < replaced.sum() < masked

    ours = gradients(model)
    if model_config.sharing == "gdes":
        # Theirs are two models with separate tables. The derivative of a sum by what is added is that by the sum.
        ours = {name.replace("_delta", ".weight"): gradient for name, gradient in ours.items()}
    theirs = gradients(discriminator)
    assert_same_gradients(discriminator_to_transformers(ours, model.discriminator.config), theirs)
    theirs = gradients(generator)
    theirs["generator_lm_head.weight"] = theirs["electra.embeddings.word_embeddings.weight"]
    assert_same_gradients(generator_to_transformers(ours, model.encoder_of_generator.config), theirs)


def assert_same_gradients(ours: Batch, theirs: Batch) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = max(1.0, expected.abs().max().item())
        assert (ours[name] - expected).abs().max() <= 1e-5 * largest, name
        # A key's bias shifts all scores of a softmax equally: its gradient is zero except for rounding.
        if not name.endswith("key.bias"):
            assert expected.abs().max() > 1e-4, f"{name}: a comparison of zeros"


def test_the_embeddings_gradient_is_the_sum_of_both_sides(make_model: Make, make_batch: Make) -> None:
    """Tied against untied with equal weights: one gradient against the sum of two."""
    tied = make_model()
    untied = make_model(ModelConfig(**{**_config(tied), "sharing": "untied"}))
    state = tied.state_dict()
    state |= {f"generator_{name}": tensor for name, tensor in state.items() if name.startswith("embeddings.")}
    untied.load_state_dict(state)
    batch = make_batch(UNEVEN)
    noise = noise_of(tied, batch)
    for model in (tied, untied):
        outputs = model(**batch, noise=noise)
        (outputs["mlm_loss"] / 10 + outputs["rtd_loss"]).backward()
    one, two = gradients(tied), gradients(untied)
    for name in [name for name in one if name.startswith("embeddings.")]:
        generators, discriminators = two[f"generator_{name}"], two[name]
        assert generators.abs().max() > 1e-3
        assert discriminators.abs().max() > 1e-3
        torch.testing.assert_close(one[name], generators + discriminators, rtol=1e-5, atol=2e-5)


def _config(model: ElectraForPretraining) -> dict[str, Any]:
    sizes = model.discriminator.config
    return {
        "num_layers": sizes.num_layers,
        "hidden_size": sizes.hidden_size,
        "num_heads": sizes.num_heads,
        "embedding_size": sizes.embedding_size,
        "generator_size": model.generator.config.hidden_size / sizes.hidden_size,
        "max_positions": sizes.max_positions,
        "dropout": sizes.dropout,
        "attention_dropout": sizes.attention_dropout,
    }


EXAMPLES = [(6, 4), (5, 0), (8, 7), (10, 0), (5, 5), (3, 2), (10, 5), (15, 0)]
PACKED = [[0, 1, 2], [3, 4, 5], [6, 7]]  # 30, 25 and 30 tokens; at 20% exactly a fifth of every example is masked


def per_token_noise(batch: Batch, chosen: Batch, slots: int) -> torch.Tensor:
    """Build noise that masks the `chosen` positions and gives each token its replacement and sampling numbers.

    `chosen`: `position`, `replace`, `sample`, `[rows, length]`; positions above 0.5 are masked; all are distinct.
    """
    order = chosen["position"].topk(slots, dim=1).indices
    return torch.cat(
        [
            chosen["position"],
            chosen["replace"].gather(1, order),
            torch.zeros(len(order), slots),
            chosen["sample"].gather(1, order),
        ],
        dim=1,
    )


def packed_and_alone(make_batch: Make) -> tuple[Batch, Batch, Batch, Batch, torch.Tensor]:
    """Build packed rows, the same examples one per row, their per-token numbers, and the indices of the latter's tokens
    in `packed`."""
    packed = make_batch([[EXAMPLES[index] for index in row] for row in PACKED])
    numbers = torch.Generator().manual_seed(11)
    shape = packed["input_ids"].shape
    chosen = {name: torch.rand(shape, generator=numbers) for name in ("replace", "sample")}
    chosen["position"] = torch.rand(shape, generator=numbers) * 0.5
    alone_rows, alone_chosen, origin = [], [], []
    for row in range(shape[0]):
        for example in range(1, int(packed["sequence_ids"][row].max()) + 1):
            here = (packed["sequence_ids"][row] == example).nonzero().squeeze(1)
            words = here[packed["input_ids"][row, here] > 4]
            masked = words[torch.randperm(len(words), generator=numbers)[: len(here) // 5]]
            chosen["position"][row, masked] += 0.5
            alone_rows.append({name: _padded(tensor[row, here]) for name, tensor in packed.items()})
            alone_chosen.append({name: _padded(tensor[row, here]) for name, tensor in chosen.items()})
            alone_rows[-1]["sequence_ids"].clamp_(max=1)
            origin.append(_padded(here + row * shape[1], -1))
    alone = {name: torch.stack([row[name] for row in alone_rows]) for name in packed}
    stacked = {name: torch.stack([row[name] for row in alone_chosen]) for name in chosen}
    return packed, chosen, alone, stacked, torch.stack(origin)


def _padded(tensor: torch.Tensor, value: float = 0) -> torch.Tensor:
    return F.pad(tensor, (0, LENGTH - len(tensor)), value=value)


def test_packed_rows_give_the_losses_and_gradients_of_one_example_per_row(make_model: Make, make_batch: Make) -> None:
    model = make_model(objective=ObjectiveConfig(mask_prob=0.2))
    packed, chosen, alone, alone_chosen, origin = packed_and_alone(make_batch)
    first = model(**packed, noise=per_token_noise(packed, chosen, model.slots))
    (first["mlm_loss"] / 10 + first["rtd_loss"]).backward()
    packed_gradients = gradients(model)
    model.zero_grad()
    second = model(**alone, noise=per_token_noise(alone, alone_chosen, model.slots))
    (second["mlm_loss"] / 10 + second["rtd_loss"]).backward()

    tokens = sum(first + second for first, second in EXAMPLES)
    assert first["masked_weights"].sum() == second["masked_weights"].sum() == tokens / 5
    there = origin[origin >= 0]
    assert torch.equal(first["corrupted_ids"].flatten()[there], second["corrupted_ids"][origin >= 0])
    assert first["replaced"].sum() > 5
    assert torch.equal(first["replaced"].flatten()[there], second["replaced"][origin >= 0])
    torch.testing.assert_close(first["rtd_logits"].flatten()[there], second["rtd_logits"][origin >= 0], **CLOSE)
    torch.testing.assert_close(first["mlm_loss"], second["mlm_loss"], **CLOSE)
    torch.testing.assert_close(first["rtd_loss"], second["rtd_loss"], **CLOSE)
    assert_same_gradients_of_ours(packed_gradients, gradients(model))


def assert_same_gradients_of_ours(found: Batch, expected: Batch) -> None:
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * max(1.0, tensor.abs().max().item()), name


def test_packed_logits_agree_with_transformers_one_example_at_a_time(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    packed = make_batch([[EXAMPLES[index] for index in row] for row in PACKED])
    with torch.no_grad():
        outputs = model(**packed, noise=noise_of(model, packed))
        _, discriminator = tied_by_hand(model)
        for row in range(len(PACKED)):
            for example in range(1, len(PACKED[row]) + 1):
                here = packed["sequence_ids"][row] == example
                expected = discriminator(
                    outputs["corrupted_ids"][row, here][None], token_type_ids=packed["token_type_ids"][row, here][None]
                ).logits[0]
                torch.testing.assert_close(outputs["rtd_logits"][row, here], expected, **CLOSE)


def test_a_changed_token_changes_no_logit_of_another_example(make_model: Make, make_batch: Make) -> None:
    """Bit for bit, through generator, sampling and discriminator."""
    model = make_model()
    batch = make_batch([[(6, 5), (8, 0), (4, 7)]])
    noise = noise_of(model, batch)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 2] = 5 + (changed["input_ids"][0, 2] - 4) % 90
    before, after = model(**batch, noise=noise), model(**changed, noise=noise)
    others = batch["sequence_ids"] > 1
    assert torch.equal(before["rtd_logits"][others], after["rtd_logits"][others])
    in_others = others.gather(1, before["masked_positions"]) & (before["masked_weights"] > 0)
    assert in_others.any()
    before_logits, after_logits = (model.mlm_logits(side["mlm_features"]) for side in (before, after))
    assert torch.equal(before_logits[in_others], after_logits[in_others])
    first = batch["sequence_ids"] == 1
    assert not torch.equal(before["rtd_logits"][first], after["rtd_logits"][first])
