"""Electric: the optimum of its loss, and its energies as scores. The formula itself is in test_objectives.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from electra_inputs import UNEVEN

from electra_composer.config import ObjectiveConfig
from electra_composer.model.generators import Inputs, Samples
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.masker import Masked

Make = Callable[..., Any]


def test_the_optimum_is_the_probability_of_the_data(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of energies, and a batch in which text and noise have exactly their expected counts.

    Of 50 tokens 40 are text with p = (0.4, 0.3, 0.2, 0.1) and 10 are noise with q = (0.1, 0.2, 0.3, 0.4), half of it
    equal to the original. The loss is smallest at -E = log p, normalised although nothing normalises it.
    """
    text, noise = torch.tensor([16, 12, 8, 4]), torch.tensor([1, 2, 3, 4])
    words = torch.arange(5, 9)
    samples = words.repeat_interleave(noise)[None]
    originals = torch.where(torch.arange(10) % 2 == 0, samples, 13 - samples)  # the same or another word
    ids = torch.cat([words.repeat_interleave(text)[None], originals], dim=1)
    positions = torch.arange(40, 50)[None]
    corrupted = ids.scatter(1, positions, samples)
    log_q = (noise / 10).log()[corrupted - 5]
    model = make_model(objective=ObjectiveConfig(kind="electric", mask_prob=0.2))
    energies = torch.zeros(4, requires_grad=True)
    monkeypatch.setattr(model, "discriminate", lambda corrupted_ids, *_: energies[corrupted_ids - 5])
    ones = torch.ones_like(ids)
    inputs = Inputs(ids, 0 * ones, ones.cumsum(1) - 1, ones, pattern_of(ones, "sdpa"), ones > 0)
    masked = Masked(ids, positions, torch.ones(1, 10), originals, None)
    optimizer = torch.optim.LBFGS([energies], max_iter=100, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        outputs, _ = model.train_on(corrupted, Samples(samples, {}, {}, log_q), inputs, masked)
        outputs["rtd_loss"].backward()
        return outputs["rtd_loss"]

    optimizer.step(loss)
    torch.testing.assert_close((-energies).exp().detach(), text / 40, rtol=1e-3, atol=1e-4)


def test_scores_are_negative_energies_of_the_unmasked_text(make_model: Make, make_batch: Make) -> None:
    model = make_model(objective=ObjectiveConfig(kind="electric")).eval()
    batch = make_batch(UNEVEN)
    scores = model.log_likelihoods(**batch)
    present = batch["sequence_ids"] > 0
    assert (scores[~present] == 0).all()
    assert not scores.requires_grad
    noise = model.draw_noise(batch["input_ids"])
    noise[:, :] = 0.5
    outputs = model(**batch, noise=noise)
    kept = (outputs["corrupted_ids"] == batch["input_ids"]).all(1)
    pattern = pattern_of(batch["sequence_ids"], "sdpa")
    of_corrupted = model.discriminate(outputs["corrupted_ids"], batch["token_type_ids"], batch["position_ids"], pattern)
    torch.testing.assert_close(outputs["energies"], of_corrupted.detach())
    assert not kept.all()
    corrupted = {**batch, "input_ids": outputs["corrupted_ids"]}
    torch.testing.assert_close(model.log_likelihoods(**corrupted)[present], -outputs["energies"][present])
