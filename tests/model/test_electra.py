"""Joint forward: masking, sampling, labels and losses against their formulas, and compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_inputs import CLOSE, LENGTH, UNEVEN, VOCAB_SIZE, gradients, noise_of

from electra_composer.config import ObjectiveConfig
from electra_composer.model.electra import rtd_loss

Make = Callable[..., Any]


def test_special_tokens_are_no_candidates(make_model: Make) -> None:
    """`[CLS]`, `[SEP]`, a literal `[MASK]` and padding are excluded; `[UNK]` (1) and words are candidates."""
    input_ids = torch.tensor([[2, 1, 7, 4, 3, 8, 3, 0]])
    sequence_ids = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    assert make_model().masker.candidates(input_ids, sequence_ids).nonzero()[:, 1].tolist() == [1, 2, 5]


def test_samples_stand_at_the_masked_positions_and_originals_everywhere_else(
    make_model: Make, make_batch: Make
) -> None:
    """All masked positions are sampled, including those that kept their token."""
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

    # The first token at which the cumulative probability exceeds the slot's noise.
    cumulative = model.mlm_logits(outputs["mlm_features"]).double().softmax(-1).cumsum(-1)
    expected = (cumulative <= noise[:, -model.slots :, None]).sum(-1)
    assert torch.equal(outputs["sampled_ids"][used], expected[used])


def test_a_sample_equal_to_the_original_counts_as_original(make_model: Make, make_batch: Make) -> None:
    """A generator that always predicts one word: label original where it was the original, otherwise replaced."""
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
    """With `disallow_correct` a certain generator is always wrong; with a high temperature it is uncertain."""
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
    """8,000 copies of one row, always masked at the same position, so always with the same logits."""
    model = make_model(vocab_size=12, objective=ObjectiveConfig(sampling=sampling, mask_prob=0.06), seed=4)
    rows = 8000
    batch = {name: tensor.expand(rows, -1) for name, tensor in make_batch([[(8, 0)]], vocab_size=12).items()}
    batch["input_ids"] = torch.tensor([2, 7, 3] + [0] * 29).expand(rows, -1)
    batch["sequence_ids"] = (torch.arange(LENGTH) < 3).long().expand(rows, -1)
    with torch.no_grad():
        outputs = model(**batch)
    assert (outputs["masked_positions"][:, 0] == 1).all()
    # Two kinds of rows, with [MASK] or with the original token as input; each has its own softmax.
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
@pytest.mark.parametrize("style", ["one_sided", "symmetric"])
def test_rtd_label_smoothing(make_model: Make, make_batch: Make, smoothing: float, style: Any) -> None:
    """Targets of original and replaced tokens: s and 1, or s/2 and 1 - s/2."""
    model = make_model(objective=ObjectiveConfig(rtd_label_smoothing=smoothing, rtd_label_smoothing_style=style))
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    present = batch["sequence_ids"] > 0
    logits, replaced = outputs["rtd_logits"][present].double(), outputs["replaced"][present].double()
    low, high = (smoothing, 1.0) if style == "one_sided" else (smoothing / 2, 1 - smoothing / 2)
    targets = torch.where(replaced > 0, high, low)
    expected = -(targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)).sum()
    assert outputs["rtd_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_one_sided_smoothing_is_the_seeds_and_the_default() -> None:
    """The seed's code: the label of an original token is filled with 0.1; BCEWithLogitsLoss, a mean."""
    generator = torch.Generator().manual_seed(0)
    logits, replaced = torch.randn(4, 32, generator=generator), torch.rand(4, 32, generator=generator) < 0.15
    labels = replaced.float().masked_fill(~replaced, 0.1)
    objective = ObjectiveConfig(rtd_label_smoothing=0.1)
    actual = rtd_loss(logits, replaced, torch.ones_like(replaced), objective) / replaced.numel()
    assert actual.item() == pytest.approx(torch.nn.BCEWithLogitsLoss()(logits, labels).item(), rel=1e-6)
    assert ObjectiveConfig().rtd_label_smoothing_style == "one_sided"


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
    """Rows with no candidates (`[CLS] [SEP]`, and empty) give finite losses and gradients."""
    model = make_model()
    batch = make_batch([[(2, 0)], []])
    outputs = model(**batch, noise=noise_of(model, batch))
    assert outputs["mlm_loss"] == 0
    assert outputs["stats"]["masked"] == 0
    (outputs["mlm_loss"] + outputs["rtd_loss"]).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


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
