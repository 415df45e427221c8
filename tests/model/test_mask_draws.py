"""`objective.mask_draw`: draws with replacement and by Bernoulli against closed forms, and what follows from them.

Statistical tolerances are five standard errors; see test_masking.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from electra_inputs import LENGTH, UNEVEN, noise_of

from electra_composer.config import ObjectiveConfig
from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.pretraining import ElectraPretraining

Make = Callable[..., Any]
DRAWS = ["with_replacement", "bernoulli"]
ROWS, TOKENS, CANDIDATES, SLOTS = 20_000, 128, 125, 19  # `[CLS] A [SEP] B [SEP]`


@pytest.fixture(scope="module")
def candidates() -> torch.Tensor:
    """Booleans `[20000, 128]`: 125 candidates in every row."""
    one = torch.ones(1, TOKENS, dtype=torch.bool)
    one[0, [0, 60, 127]] = False
    return one.expand(ROWS, -1)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(8))


def marks_of(positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """How often each position was drawn, `[rows, length]`."""
    return torch.zeros(len(positions), TOKENS).scatter_add(1, positions, weights)


@pytest.mark.parametrize(
    ("mask_prob", "length", "slots"), [(0.15, 128, 44), (0.15, 512, 126), (0.25, 512, 187), (0.9, 16, 16)]
)
def test_slots_of_bernoulli(mask_prob: float, length: int, slots: int) -> None:
    """The mean plus six standard deviations, at most the row: 19.2 + 6 × 4.04 = 43.4, 76.8 + 6 × 8.08 = 125.3, …"""
    assert masking.num_slots(mask_prob, length, "bernoulli") == slots
    assert masking.num_slots(mask_prob, length, "with_replacement") == masking.num_slots(mask_prob, length)
    if slots < length:
        above = sum(
            math.comb(length, n) * mask_prob**n * (1 - mask_prob) ** (length - n) for n in range(slots + 1, length + 1)
        )
        assert above < 5e-8


def test_with_replacement_has_as_many_distinct_positions_as_balls_fill_bins(candidates: torch.Tensor) -> None:
    """19 draws of 125: n (1 - (1 - 1/n)^K) = 17.69 distinct, 13.8% of the tokens; its variance is the occupancy's."""
    counts = masking.mask_counts(candidates, torch.ones(ROWS, TOKENS), 0.15, SLOTS, with_replacement=True)
    assert (counts == SLOTS).all()
    positions, weights = masking.choose_with_replacement(candidates, counts, SLOTS, uniform(ROWS, TOKENS))
    assert weights.sum() == SLOTS * ROWS
    drawn = marks_of(positions, weights)
    distinct, n, k = (drawn > 0).sum(1).double(), CANDIDATES, SLOTS
    mean = n * (1 - (1 - 1 / n) ** k)
    variance = n * (n - 1) * (1 - 2 / n) ** k + n * (1 - 1 / n) ** k - n**2 * (1 - 1 / n) ** (2 * k)
    assert mean / TOKENS == pytest.approx(0.1382, abs=5e-5)
    assert abs(distinct.mean().item() - mean) < 5 * math.sqrt(variance / ROWS)
    assert abs(distinct.var().item() / variance - 1) < 5 * math.sqrt(2 / ROWS)
    assert drawn[:, [0, 60, 127]].sum() == 0
    often = drawn.mean(0)[candidates[0]] - k / n
    assert often.abs().max() < 5 * math.sqrt(k / n * (1 - 1 / n) / ROWS)


def test_with_replacement_at_the_edges() -> None:
    """The largest uniform number, few candidates, and none: unused slots are at position 0."""
    candidates = torch.tensor([[False, True, False, True], [False, True, False, False], [False] * 4])
    counts = masking.mask_counts(candidates, torch.ones(3, 4), 0.6, 3, with_replacement=True)
    assert counts.tolist() == [2, 2, 0]  # more draws than candidates; none without candidates
    for noise, expected in ((0.0, 1), (1 - 2.0**-24, 3)):
        positions, weights = masking.choose_with_replacement(candidates, counts, 3, torch.full((3, 4), noise))
        assert positions.tolist() == [[expected, expected, 0], [1, 1, 0], [0, 0, 0]]
        assert weights.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    many = torch.ones(1, 65535, dtype=torch.bool)
    positions, _ = masking.choose_with_replacement(many, torch.tensor([1]), 1, torch.full((1, 65535), 1 - 2.0**-24))
    assert 0 <= positions.item() < 65535


def test_slots_of_one_position_agree() -> None:
    positions = torch.tensor([[5, 7, 5, 9, 7, 5, 0, 0]])
    replace = torch.tensor([[0.9, 0.5, 0.8, 0.95, 0.1, 0.99, 0.2, 0.3]])
    first, smallest = masking.merge_repeats(positions, replace)
    assert first.tolist() == [[0, 1, 0, 3, 1, 0, 6, 6]]
    assert torch.equal(smallest, torch.tensor([[0.8, 0.1, 0.8, 0.95, 0.1, 0.8, 0.2, 0.2]]))


def test_a_repeated_position_keeps_its_token_only_if_all_draws_keep_it(candidates: torch.Tensor) -> None:
    """Positions that were drawn and keep their token: n ((1 - 0.85/n)^K - (1 - 1/n)^K) of a row, not 15% of those."""
    counts = torch.full((ROWS,), SLOTS)
    positions, weights = masking.choose_with_replacement(candidates, counts, SLOTS, uniform(ROWS, TOKENS))
    replace = torch.rand(ROWS, SLOTS, generator=torch.Generator().manual_seed(9))
    _, replace = masking.merge_repeats(positions, replace)
    originals = torch.full_like(positions, 9)
    tokens = masking.mask_tokens(originals, weights, "electra", 4, 99, replace, torch.zeros(ROWS, SLOTS))
    kept = (torch.full((ROWS, TOKENS), 4).scatter(1, positions, tokens) == 9).sum(1).double()
    expected = CANDIDATES * ((1 - 0.85 / CANDIDATES) ** SLOTS - (1 - 1 / CANDIDATES) ** SLOTS)
    assert expected < 0.95 * 0.15 * CANDIDATES * (1 - (1 - 1 / CANDIDATES) ** SLOTS)
    assert abs(kept.mean().item() - expected) < 5 * math.sqrt(expected / ROWS)


def assert_binomial(counts: torch.Tensor) -> None:
    """Mean 18.75 and standard deviation 4.0, and the frequency of every number, of 125 trials."""
    mean, variance = CANDIDATES * 0.15, CANDIDATES * 0.15 * 0.85
    assert abs(counts.double().mean().item() - mean) < 5 * math.sqrt(variance / ROWS)
    assert abs(counts.double().var().item() / variance - 1) < 5 * math.sqrt(2 / ROWS)
    found = torch.bincount(counts, minlength=45).double() / ROWS
    for number in range(45):
        share = math.comb(CANDIDATES, number) * 0.15**number * 0.85 ** (CANDIDATES - number)
        assert abs(found[number].item() - share) < 5 * math.sqrt(share / ROWS) + 1 / ROWS


def test_bernoulli_masks_each_token_by_itself(candidates: torch.Tensor) -> None:
    """By the noise: exactly the positions where it is at least 0.85; two positions are masked independently."""
    noise = uniform(ROWS, TOKENS)
    counts = masking.bernoulli_counts_of(noise, candidates, 0.15, 44)
    assert_binomial(counts)
    masked = marks_of(*masking.choose_positions(candidates, counts, 44, noise)) > 0
    assert torch.equal(masked, candidates & (noise >= 0.85))
    both = (masked[:, 1] & masked[:, 2]).double().mean().item()
    assert abs(both - 0.15**2) < 5 * math.sqrt(0.15**2 * (1 - 0.15**2) / ROWS)


def test_bernoulli_with_counts_that_were_drawn_before(candidates: torch.Tensor) -> None:
    """A binomial number of positions without replacement: each with probability 0.15, two independently."""
    counts = masking.bernoulli_counts(candidates, 0.15, 44, torch.Generator().manual_seed(7))
    assert_binomial(counts)
    masked = marks_of(*masking.choose_positions(candidates, counts, 44, uniform(ROWS, TOKENS))) > 0
    assert torch.equal(masked.sum(1), counts)
    shares = masked.double().mean(0)
    assert (shares[candidates[0]] - 0.15).abs().max() < 5 * math.sqrt(0.15 * 0.85 / ROWS)
    both = (masked[:, 1] & masked[:, 2]).double().mean().item()
    assert abs(both - 0.15**2) < 5 * math.sqrt(0.15**2 * (1 - 0.15**2) / ROWS)


def test_bernoulli_drops_what_has_no_slot() -> None:
    candidates = torch.ones(2, TOKENS, dtype=torch.bool)
    noise = torch.ones(2, TOKENS) - 2.0**-24
    assert masking.bernoulli_counts_of(noise, candidates, 0.15, 44).tolist() == [44, 44]
    assert masking.bernoulli_counts(candidates, 1.0, 44, torch.Generator()).tolist() == [44, 44]


def test_unk_is_masked_except_by_bernoulli(special: Any, tiny_model_config: Make) -> None:
    ids, sequence_ids = torch.tensor([[2, 1, 7, 4, 3, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])
    special = type(special)(**{**vars(special), "unk": 1})
    for draw, expected in (("exact", [1, 2]), ("with_replacement", [1, 2]), ("bernoulli", [2])):
        objective = ObjectiveConfig(mask_draw=draw, mask_prob=0.3)  # type: ignore[arg-type]
        model = ElectraForPretraining(tiny_model_config(), objective, 99, special, LENGTH)
        assert model.masker.candidates(ids, sequence_ids).nonzero()[:, 1].tolist() == expected


def test_repeated_positions_in_the_forward(make_model: Make, make_batch: Make) -> None:
    """One sample for each, which stands in the discriminator's input; the MLM loss counts each draw."""
    model = make_model(objective=ObjectiveConfig(mask_draw="with_replacement", mask_prob=0.5))
    batch = make_batch(UNEVEN * 4)
    outputs = model(**batch, noise=noise_of(model, batch))
    positions, weights, used = outputs["masked_positions"], outputs["masked_weights"], outputs["masked_weights"] > 0
    assert torch.equal(weights.sum(1).long(), model.mask_counts(batch["input_ids"], batch["sequence_ids"]))
    ordered = positions.masked_fill(~used, -1).sort(1).values
    assert ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).sum() > 20  # repeats
    assert torch.equal(outputs["corrupted_ids"].gather(1, positions)[used], outputs["sampled_ids"][used])
    untouched = torch.zeros_like(batch["input_ids"]).scatter_add(1, positions, used.long()) == 0
    assert torch.equal(outputs["corrupted_ids"][untouched], batch["input_ids"][untouched])
    assert outputs["replaced"].sum() > 0
    logs = model.mlm_logits(outputs["mlm_features"]).double().log_softmax(-1)
    of_slots = -logs.gather(2, batch["input_ids"].gather(1, positions)[..., None])[..., 0]
    assert outputs["mlm_loss"].item() == pytest.approx(of_slots[used].sum().item(), rel=1e-5)


def test_counts_of_bernoulli_depend_on_the_batch_only(make_model: Make, make_batch: Make) -> None:
    """Neither on torch's random state nor changing it, as a thread may count the next batch during a step."""
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(mask_draw="bernoulli")))
    batch = make_batch(UNEVEN * 8)
    state = torch.get_rng_state()
    counted = model.count_batch(batch)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(model.count_batch(batch)["mask_counts"], counted["mask_counts"])
    other = {name: tensor.flip(0) for name, tensor in batch.items()}
    assert not torch.equal(model.count_batch(other)["mask_counts"].flip(0), counted["mask_counts"])
    masked = model(counted)["masked_weights"].sum(1)
    assert torch.equal(masked.long(), counted["mask_counts"])
    assert counted["loss_scale"][0, 0].item() == pytest.approx(len(masked) / masked.sum().item())


@pytest.mark.parametrize("draw", DRAWS)
def test_evaluation_masks_are_repeatable(make_model: Make, make_batch: Make, draw: Any) -> None:
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(mask_draw=draw)))
    batch = make_batch(UNEVEN * 2)
    first, second = model.eval_forward(batch), model.eval_forward(batch)
    assert first["masked_weights"].sum() > 0
    for name in ("masked_positions", "masked_weights", "corrupted_ids"):
        assert torch.equal(first[name], second[name]), name
