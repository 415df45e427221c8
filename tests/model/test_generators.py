"""Generators: distributions of the samples, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from masked_lm_inputs import assert_distributed
from objective_cases import FROZEN

from electra_composer.config import ObjectiveConfig, OptimizerConfig
from electra_composer.model.generators import FixedDistribution
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.builders import build_optimizer
from electra_composer.training.parallelism import use_flat_parameters

Make = Callable[..., Any]
COUNTS = [0, 5, 0, 40, 1, 9, 25, 16, 4, 0, 30, 12, 8, 50, 2, 7, 0]
SIZE = len(COUNTS)


def expected_probabilities(temperature: float, left_out: int | None) -> np.ndarray:
    weights = np.array(COUNTS, dtype=np.float64) ** (1 / temperature)
    if left_out is not None:
        weights[left_out] = 0.0
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("disallow_correct", [False, True])
def test_samples_are_the_inverse_cdf_and_follow_the_counts(temperature: float, disallow_correct: bool) -> None:
    """Each original, frequent, rare, absent, first and last; numbers up to the largest fp32 below 1."""
    objective = ObjectiveConfig(generator="unigram", temperature=temperature, disallow_correct=disallow_correct)
    distribution = FixedDistribution(SIZE, objective)
    distribution.set_counts(torch.tensor(COUNTS))
    edges = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    noise = torch.cat([torch.rand(20_000, generator=torch.Generator().manual_seed(2)), edges])
    for original in range(SIZE):
        sampled = distribution.sample(torch.full((1, len(noise)), original), noise[None])[0]
        p = expected_probabilities(temperature, original if disallow_correct else None)
        ends = np.cumsum(p)
        numbers = noise.double().numpy()
        clear = np.abs(numbers[:, None] - ends).min(1) > 1e-6  # the probabilities are fp32
        expected = np.searchsorted(ends, numbers, side="right")
        np.testing.assert_array_equal(sampled.numpy()[clear], expected[clear])
        assert clear.mean() > 0.99
        assert (p[sampled.numpy()] > 0).all()  # also at the edges: neither absent words nor the original
    assert_distributed(sampled, torch.from_numpy(p))


def test_uniform_samples_have_the_same_chance_and_log_q(make_model: Make, make_batch: Make) -> None:
    model = make_model(objective=ObjectiveConfig(generator="uniform"))
    rows = [[(32, 0)]] * 1024
    outputs = model(**make_batch(rows))
    assert_distributed(outputs["sampled_ids"].flatten(), torch.full((99,), 1 / 99, dtype=torch.float64))
    torch.testing.assert_close(model.distribution.probabilities.log(), torch.full((99,), -np.log(99)).float())
    assert "mlm_loss" not in outputs


def test_the_distribution_is_part_of_the_state(make_model: Make) -> None:
    model, other = (make_model(objective=ObjectiveConfig(generator="unigram"), seed=seed) for seed in (0, 1))
    model.distribution.set_counts(torch.arange(99))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.distribution.probabilities, model.distribution.probabilities)
    assert other.distribution.probabilities[0] == 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("sharing", ["untied", "gdes"])
def test_a_frozen_generator_stays_what_it_is(
    make_model: Make, make_batch: Make, tiny_model_config: Make, sharing: str, flat: bool
) -> None:
    """To the bit, with AdamW and weight decay; without dropout, also before :meth:`train`; everything else moves."""
    config = tiny_model_config(sharing=sharing, dropout=0.5, attention_dropout=0.5, num_layers=1, **FROZEN)
    model = ElectraPretraining(make_model(config, ObjectiveConfig(generator="frozen")))
    batch = model.count_batch(make_batch([[(12, 20)], [(20, 0)]]))
    batch["noise"] = model.model.draw_noise(batch["input_ids"])
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), model)
    if flat:
        use_flat_parameters(model, optimizer, "fp32")
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(batch)
        model.loss(outputs, batch)["total"].backward()
        optimizer.step()
        seen.append((outputs["mlm_features"], outputs["rtd_logits"]))
        model.train()
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[1][0], seen[2][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    for name, tensor in model.model.state_dict().items():
        frozen = name.startswith(("generator", "mlm_head"))
        if frozen or not name.endswith("key.bias"):
            assert torch.equal(tensor, before[name]) == frozen, name
    assert model.model.generator.training is False
    assert model.model.discriminator.training is True


def test_gumbel_samples_of_two_towers_follow_their_softmax(make_model: Make, make_batch: Make) -> None:
    """One example in many rows: at one position, the samples of the rows in which it is masked."""
    model = make_model(objective=ObjectiveConfig(generator="two_tower", sampling="gumbel", temperature=2.0))
    row = make_batch([[(8, 0)]], length=8, vocab_size=20)
    batch = {name: tensor.expand(12_000, -1) for name, tensor in row.items()}
    with torch.no_grad():
        outputs = model(**batch)
        embeddings = model.embeddings_of_generator
        hidden = model.towers(embeddings, *row.values())
        logits = model.mlm_logits(model.mlm_head(hidden))[0, 3]
    masked = (outputs["masked_positions"] == 3) & (outputs["masked_weights"] > 0)
    assert 1000 < masked.sum() < 3000
    assert_distributed(outputs["sampled_ids"][masked], (logits / 2.0).softmax(-1).double())
