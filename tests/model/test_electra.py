"""The joint forward against transformers' two ELECTRA models, against itself unpacked, and against its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)

Batch = dict[str, torch.Tensor]
Make = Callable[..., Any]
VOCAB_SIZE, LENGTH = 99, 32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

UNEVEN = [[(10, 12)], [(20, 0)], [(3, 29)], [(5, 0)]]  # two segments, padding, a full row, a short one


def noise_of(model: ElectraForPretraining, batch: Batch, seed: int = 3) -> torch.Tensor:
    return model.draw_noise(batch["input_ids"], torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> Batch:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


# The same weights in transformers


def tied_by_hand(model: ElectraForPretraining) -> tuple[ElectraForMaskedLM, ElectraForPreTraining]:
    """transformers' generator and discriminator with our weights; what is tied made one by assignment."""
    state = model.state_dict()
    config = model.encoder_of_generator.config
    generator = ElectraForMaskedLM(transformers_config(config, pad_id=0))
    discriminator = ElectraForPreTraining(transformers_config(model.discriminator.config, pad_id=0))
    generator.load_state_dict(generator_to_transformers(state, config))
    discriminator.load_state_dict(discriminator_to_transformers(state, model.discriminator.config))
    ours, theirs = generator.electra.embeddings, discriminator.electra.embeddings
    for part in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        setattr(ours, part, getattr(theirs, part))
    generator.generator_lm_head.weight = theirs.word_embeddings.weight
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
    ],
)
def test_logits_losses_and_gradients_agree_with_transformers(
    make_model: Make, make_batch: Make, tiny_model_config: Make, sizes: dict[str, Any]
) -> None:
    model = make_model(tiny_model_config(**sizes)).train()
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

    # What the generator saw, from the noise by the rule: [MASK] where the slot's number is below 0.85.
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
        # A key's bias moves every score of a softmax alike: its gradient is zero but for rounding.
        if not name.endswith("key.bias"):
            assert expected.abs().max() > 1e-4, f"{name}: a comparison of zeros"


def test_the_embeddings_gradient_is_the_sum_of_both_sides(make_model: Make, make_batch: Make) -> None:
    """Tied against untied with equal weights: one gradient against the sum of two."""
    tied = make_model()
    untied = make_model(ModelConfig(**{**_config(tied), "tie_embeddings": False}))
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


# Packed rows against the same examples one per row

EXAMPLES = [(6, 4), (5, 0), (8, 7), (10, 0), (5, 5), (3, 2), (10, 5), (15, 0)]
PACKED = [[0, 1, 2], [3, 4, 5], [6, 7]]  # 30, 25 and 30 tokens; at 20% every example masks a fifth of itself exactly


def per_token_noise(batch: Batch, chosen: Batch, slots: int) -> torch.Tensor:
    """The noise that masks `chosen` positions and gives each the replacement and sampling numbers of its own.

    `chosen`: `position`, `replace`, `sample`, `[rows, length]`; position numbers above 0.5 are masked, all different.
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
    """The batch packed and one per row, their per-token numbers, and where in `packed` the tokens of `alone` are."""
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


# Masking, sampling and labels in the forward


def test_special_tokens_are_no_candidates(make_model: Make) -> None:
    """`[CLS]`, `[SEP]`, a literal `[MASK]` and padding are not; `[UNK]` (1) and words are."""
    input_ids = torch.tensor([[2, 1, 7, 4, 3, 8, 3, 0]])
    sequence_ids = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    assert make_model().candidates(input_ids, sequence_ids).nonzero()[:, 1].tolist() == [1, 2, 5]


def test_samples_stand_at_the_masked_positions_and_originals_everywhere_else(
    make_model: Make, make_batch: Make
) -> None:
    """All masked positions get their sample, also those that had kept their token."""
    model = make_model(objective=ObjectiveConfig(mask_prob=0.3))
    batch = make_batch(UNEVEN * 8)
    noise = noise_of(model, batch)
    outputs = model(**batch, noise=noise)
    used = outputs["masked_weights"] > 0
    kept = (noise[:, LENGTH : LENGTH + model.slots] >= 0.85) & used
    originals = batch["input_ids"].gather(1, outputs["masked_positions"])
    assert kept.sum() > 10
    assert (outputs["sampled_ids"] != originals)[kept].any()
    standing = outputs["corrupted_ids"].gather(1, outputs["masked_positions"])
    assert torch.equal(standing[used], outputs["sampled_ids"][used])
    elsewhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    for row in range(len(used)):
        elsewhere[row, outputs["masked_positions"][row, used[row]]] = False
    assert torch.equal(outputs["corrupted_ids"][elsewhere], batch["input_ids"][elsewhere])
    assert not outputs["replaced"][elsewhere].any()

    # The first token whose cumulative probability passes the slot's own number.
    cumulative = model.mlm_logits(outputs["mlm_features"]).double().softmax(-1).cumsum(-1)
    expected = (cumulative <= noise[:, -model.slots :, None]).sum(-1)
    assert torch.equal(outputs["sampled_ids"][used], expected[used])


def test_a_sample_equal_to_the_original_counts_as_original(make_model: Make, make_batch: Make) -> None:
    """A generator that is certain of one word: where it stood, the label is original; elsewhere, replaced."""
    model = make_model()
    with torch.no_grad():
        model.mlm_head.bias[7] = 1e4
    batch = make_batch(UNEVEN)
    words = batch["input_ids"] > 4
    half = words & (torch.arange(LENGTH) % 2 == 0)
    batch["input_ids"][half] = 7
    batch["input_ids"][words & ~half] = 8
    outputs = model(**batch, noise=noise_of(model, batch))
    used = outputs["masked_weights"] > 0
    positions = outputs["masked_positions"]
    assert (outputs["sampled_ids"][used] == 7).all()
    was_seven = batch["input_ids"].gather(1, positions) == 7
    assert (was_seven & used).any()
    assert (~was_seven & used).any()
    assert torch.equal(outputs["replaced"].gather(1, positions)[used], ~was_seven[used])
    assert outputs["replaced"].sum() == (~was_seven & used).sum()


def test_disallow_correct_and_temperature_reach_the_sampling(make_model: Make, make_batch: Make) -> None:
    """A certain generator that may not be right is always wrong; a hot one is not certain any more."""
    batch = make_batch(UNEVEN)
    batch["input_ids"][batch["input_ids"] > 4] = 7

    def sampled(**objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model = make_model(objective=ObjectiveConfig(**objective))
        with torch.no_grad():
            model.mlm_head.bias[7] = 50.0
        outputs = model(**batch, noise=noise_of(model, batch))
        return outputs["sampled_ids"][outputs["masked_weights"] > 0], outputs["replaced"]

    assert (sampled()[0] == 7).all()
    ids, replaced = sampled(disallow_correct=True)
    assert (ids != 7).all()
    assert replaced.sum() == ids.numel()
    assert (sampled(temperature=1000.0)[0] != 7).float().mean() > 0.5


@pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
def test_without_noise_every_forward_draws_anew(make_model: Make, make_batch: Make, sampling: str) -> None:
    model = make_model(objective=ObjectiveConfig(sampling=sampling))
    batch = make_batch(UNEVEN * 4)
    torch.manual_seed(5)
    first, second = model(**batch), model(**batch)
    torch.manual_seed(5)
    again = model(**batch)
    used = first["masked_weights"] > 0
    assert not torch.equal(first["masked_positions"][used], second["masked_positions"][used])
    for name in ("masked_positions", "corrupted_ids", "mlm_loss", "rtd_loss"):
        assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
def test_samples_of_the_forward_follow_the_generators_softmax(
    make_model: Make, make_batch: Make, sampling: str
) -> None:
    """One row, 8,000 forwards in one batch; masked always at the same positions, so always with the same logits."""
    model = make_model(vocab_size=12, objective=ObjectiveConfig(sampling=sampling, mask_prob=0.06), seed=4)
    rows = 8000
    batch = {name: tensor.expand(rows, -1) for name, tensor in make_batch([[(8, 0)]], vocab_size=12).items()}
    batch["input_ids"] = torch.tensor([2, 7, 3] + [0] * 29).expand(rows, -1)
    batch["sequence_ids"] = (torch.arange(LENGTH) < 3).long().expand(rows, -1)
    with torch.no_grad():
        outputs = model(**batch)
    assert (outputs["masked_positions"][:, 0] == 1).all()
    # Two kinds of rows: [MASK] or the kept token stood there. Each has its own softmax.
    logits = model.mlm_logits(outputs["mlm_features"])[:, 0]
    kind = (logits[:, 0] - logits[0, 0]).abs() < 1e-4
    assert 0 < kind.sum() < rows
    for these in (kind, ~kind):
        expected = logits[these][0].double().softmax(-1)
        found = torch.bincount(outputs["sampled_ids"][these, 0], minlength=12) / these.sum()
        tolerance = 5 * (expected * (1 - expected) / these.sum()).sqrt()
        assert ((found - expected).abs() <= tolerance).all()


def test_no_gradient_passes_through_the_sampling(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = make_batch(UNEVEN)
    model(**batch, noise=noise_of(model, batch))["rtd_loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("generator.", "mlm_head.")):
            assert parameter.grad is None or not parameter.grad.any(), name
        elif not name.endswith("qkv.bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_the_generators_loss_leaves_the_discriminator_alone(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = make_batch(UNEVEN)
    model(**batch, noise=noise_of(model, batch))["mlm_loss"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("discriminator.", "rtd_head.")):
            assert parameter.grad is None or not parameter.grad.any(), name


# Losses


def test_rtd_is_over_every_token_that_is_not_padding(make_model: Make, make_batch: Make) -> None:
    """`[CLS]` and `[SEP]` included: the sum of -log σ(±logit), written out."""
    model = make_model()
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    total, tokens = 0.0, 0
    for row in range(4):
        for place in range(LENGTH):
            if batch["sequence_ids"][row, place]:
                logit = outputs["rtd_logits"][row, place].item()
                is_replaced = outputs["corrupted_ids"][row, place] != batch["input_ids"][row, place]
                total += math.log1p(math.exp(-logit if is_replaced else logit))
                tokens += 1
    assert tokens == 22 + 20 + 32 + 5
    assert outputs["stats"]["tokens"] == tokens
    assert outputs["rtd_loss"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_mlm_loss_and_its_label_smoothing(make_model: Make, make_batch: Make, smoothing: float) -> None:
    """-Σ q log p with q = (1 - s) at the original plus s / V everywhere (Szegedy et al. 2016), over masked tokens."""
    model = make_model(objective=ObjectiveConfig(mlm_label_smoothing=smoothing))
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    used = outputs["masked_weights"] > 0
    logs = model.mlm_logits(outputs["mlm_features"])[used].double().log_softmax(-1)
    originals = batch["input_ids"].gather(1, outputs["masked_positions"])[used]
    targets = torch.full_like(logs, smoothing / VOCAB_SIZE)
    targets[torch.arange(len(targets)), originals] += 1 - smoothing
    assert outputs["mlm_loss"].item() == pytest.approx(-(targets * logs).sum().item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_rtd_label_smoothing(make_model: Make, make_batch: Make, smoothing: float) -> None:
    """Two classes: q = 1 - s/2 for the right one, s/2 for the other."""
    model = make_model(objective=ObjectiveConfig(rtd_label_smoothing=smoothing))
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    present = batch["sequence_ids"] > 0
    logits, replaced = outputs["rtd_logits"][present].double(), outputs["replaced"][present].double()
    right = torch.where(replaced > 0, logits, -logits)
    expected = -((1 - smoothing / 2) * F.logsigmoid(right) + smoothing / 2 * F.logsigmoid(-right)).sum()
    assert outputs["rtd_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_statistics_are_counts(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    stats = {name: value.item() for name, value in outputs["stats"].items()}
    assert stats["masked"] == round(0.15 * 22) + round(0.15 * 20) + min(4, round(0.15 * 32)) + 1
    assert stats["tokens"] == 79
    counts = dict.fromkeys(("true_positive", "false_positive", "false_negative", "true_negative"), 0)
    for row in range(4):
        for place in range(int((batch["sequence_ids"][row] > 0).sum())):
            says, truth = outputs["rtd_logits"][row, place] > 0, outputs["replaced"][row, place]
            counts[f"{'true' if says == truth else 'false'}_{'positive' if says else 'negative'}"] += 1
    assert counts == {name: stats[name] for name in counts}
    assert stats["replaced"] == counts["true_positive"] + counts["false_negative"]
    assert stats["sampled_correct"] == stats["masked"] - stats["replaced"]
    used = outputs["masked_weights"] > 0
    originals = batch["input_ids"].gather(1, outputs["masked_positions"])
    assert stats["mlm_correct"] == (model.mlm_logits(outputs["mlm_features"]).argmax(-1)[used] == originals[used]).sum()


def test_rows_without_a_word_are_harmless(make_model: Make, make_batch: Make) -> None:
    """`[CLS] [SEP]` has nothing to mask, an empty row not even that: finite losses, finite gradients."""
    model = make_model()
    batch = make_batch([[(2, 0)], []])
    outputs = model(**batch, noise=noise_of(model, batch))
    assert outputs["mlm_loss"] == 0
    assert outputs["stats"]["masked"] == 0
    (outputs["mlm_loss"] + outputs["rtd_loss"]).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


# Tying and the padded rows of the vocabulary


def test_tied_there_is_one_set_of_embeddings(make_model: Make) -> None:
    model = make_model(perturbed=False)
    tables = [name for name, _ in model.named_parameters() if name.endswith(("word.weight", "position.weight"))]
    assert tables == ["embeddings.word.weight", "embeddings.position.weight"]
    assert model.embeddings_of_generator is model.embeddings
    assert model.generator.project is not None or model.generator.config.hidden_size == 16
    assert model.discriminator.project is not None


@pytest.mark.parametrize("part", ["word", "position", "token_type", "norm"])
def test_changing_the_embeddings_changes_both_sides(make_model: Make, make_batch: Make, part: str) -> None:
    """After construction and after load_state_dict, of a state that went through a file or not."""
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
    """A word that stands nowhere: scaling its embedding scales its logit, and nothing else of the generator's."""
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
    model = make_model(tiny_model_config(tie_embeddings=False))
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


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_are_never_predicted_and_get_no_gradient(
    make_model: Make, make_batch: Make, tiny_model_config: Make, tied: bool
) -> None:
    """99 words in a table of 128: logits are 99 wide, rows 99 to 127 are zero and stay without gradient."""
    model = make_model(tiny_model_config(tie_embeddings=tied), perturbed=False)
    batch = make_batch(UNEVEN * 4)
    outputs = model(**batch, noise=noise_of(model, batch))
    assert model.mlm_logits(outputs["mlm_features"]).shape == (16, model.slots, VOCAB_SIZE)
    assert outputs["corrupted_ids"].max() < VOCAB_SIZE
    (outputs["mlm_loss"] + outputs["rtd_loss"]).backward()
    tables = [p for name, p in model.named_parameters() if name.endswith("word.weight")] + [model.mlm_head.bias]
    assert len(tables) == (2 if tied else 3)
    for table in tables:
        assert table.shape[0] == 128
        assert (table[VOCAB_SIZE:] == 0).all()
        assert table.grad is not None
        assert (table.grad[VOCAB_SIZE:] == 0).all()
        assert table.grad[:VOCAB_SIZE].any()


# Sizes and initialisation

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


def test_initial_weights(make_model: Make, tiny_model_config: Make) -> None:
    """Every matrix within two standard deviations of 0.02, every bias zero, every LayerNorm the identity."""
    model = make_model(tiny_model_config(hidden_size=128, embedding_size=64), perturbed=False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.abs().max() <= 0.04 + 1e-8, name
            if parameter.numel() > 4000 and "word" not in name:
                assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.06), name
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
        ({"generator_size": 0.0}, {}, 32, r"generator \(model\.generator_size.*\): hidden_size is 0"),
        ({"generator_layers": 0}, {}, 32, r"generator \(.*model\.generator_layers\): num_layers is 0"),
        ({"embedding_size": 0}, {}, 32, "embedding_size is 0"),
        ({"tie_encoder": True}, {}, 32, r"differ in hidden_size.*generator_size=1\.0.*num_heads=1"),
        ({"tie_encoder": True, "tie_embeddings": False}, {}, 32, r"model\.tie_embeddings is false"),
        ({"dropout": 1.5}, {}, 32, r"model\.dropout is 1\.5; expected a number from 0\.0 to 1\.0"),
        ({"attention_dropout": -0.1}, {}, 32, r"model\.attention_dropout is -0\.1"),
        ({}, {"temperature": 0.0}, 32, r"objective\.temperature is 0\.0"),
        ({}, {"temperature": math.nan}, 32, r"objective\.temperature is nan"),
        ({}, {"disc_weight": -50.0}, 32, r"objective\.disc_weight is -50\.0"),
        ({}, {"gen_weight": -1.0}, 32, r"objective\.gen_weight is -1\.0"),
        ({}, {"mlm_label_smoothing": 2.0}, 32, r"objective\.mlm_label_smoothing is 2\.0"),
        ({}, {"rtd_label_smoothing": -0.1}, 32, r"objective\.rtd_label_smoothing is -0\.1"),
        ({}, {"mask_prob": 0.0}, 32, "mask_prob 0.0"),
        ({}, {"mask_prob": 1.5}, 32, "mask_prob 1.5"),
        ({}, {"mask_prob": -0.5}, 32, "mask_prob -0.5"),
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


# Compilation


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
def test_the_forward_compiles_without_a_graph_break(
    make_model: Make, make_batch: Make, given: bool, sampling: str
) -> None:
    torch.compiler.reset()
    model = make_model(objective=ObjectiveConfig(sampling=sampling))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch = make_batch(UNEVEN)
    noise = noise_of(model, batch) if given else None
    torch.manual_seed(1)
    found = compiled(**batch, noise=noise)
    torch.manual_seed(1)
    expected = model(**batch, noise=noise)
    assert torch.equal(found["corrupted_ids"], expected["corrupted_ids"])
    torch.testing.assert_close(found["mlm_loss"], expected["mlm_loss"], **CLOSE)
    torch.testing.assert_close(found["rtd_loss"], expected["rtd_loss"], **CLOSE)
