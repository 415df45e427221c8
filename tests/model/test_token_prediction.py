"""Objectives that predict tokens: limits of the copy mechanism, and which networks exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from electra_inputs import UNEVEN, noise_of

from electra_composer.config import ObjectiveConfig

Make = Callable[..., Any]


@pytest.mark.parametrize("logit", [60.0, -60.0])
def test_limits_of_the_copy_probability(make_model: Make, make_batch: Make, logit: float) -> None:
    """D near 1: nothing to learn where the token is the original, 60 + its cross entropy elsewhere, and all is copied.
    D near 0: the cross entropy everywhere."""
    model = make_model(objective=ObjectiveConfig(kind="all_tokens_mlm")).eval()
    with torch.no_grad():
        model.copy_head.weight.zero_()
        model.copy_head.bias.fill_(logit)
    batch = make_batch(UNEVEN)
    outputs = model(**batch, noise=noise_of(model, batch))
    ids, present = batch["input_ids"], batch["sequence_ids"] > 0
    logits = model.lm_logits(outputs["lm_features"])
    plain = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    replaced = outputs["corrupted_ids"] != ids
    expected = torch.where(replaced, plain + 60.0, 0.0) if logit > 0 else plain
    torch.testing.assert_close(outputs["lm_loss"], expected[present].sum(), rtol=1e-5, atol=1e-4)
    stats = outputs["stats"]
    assert stats["copied"] == (present.sum() if logit > 0 else 0)
    right = ~replaced if logit > 0 else logits.argmax(-1) == ids
    assert stats["lm_correct"] == right[present].sum()
    assert torch.equal(outputs["lm_positions"][1], torch.arange(32))


@pytest.mark.parametrize(
    ("objective", "absent", "present"),
    [
        ({"kind": "mlm"}, {"generator", "towers", "mlm_head", "rtd_head", "copy_head"}, {"lm_head"}),
        ({"kind": "replace_mlm"}, {"towers", "rtd_head", "copy_head"}, {"lm_head", "mlm_head", "generator"}),
        ({"kind": "all_tokens_mlm"}, {"towers", "rtd_head"}, {"lm_head", "copy_head", "mlm_head", "generator"}),
        ({"kind": "electra_15"}, {"towers", "lm_head", "copy_head"}, {"rtd_head", "mlm_head", "generator"}),
        ({"kind": "electric"}, {"generator", "lm_head", "copy_head"}, {"rtd_head", "mlm_head", "towers"}),
        ({"generator": "uniform"}, {"generator", "towers", "mlm_head", "lm_head"}, {"rtd_head", "distribution"}),
    ],
)
def test_networks_of_an_objective(
    make_model: Make, objective: dict[str, Any], absent: set[str], present: set[str]
) -> None:
    model = make_model(objective=ObjectiveConfig(**objective))
    for name in absent:
        assert getattr(model, name) is None, name
        assert not any(key.startswith(f"{name}.") for key in model.state_dict())
    for name in present:
        assert getattr(model, name) is not None, name


def test_masked_lm_reads_what_bert_reads(make_model: Make, make_batch: Make) -> None:
    """80% [MASK], 10% any token, 10% the original; the loss is of all of them."""
    model = make_model(objective=ObjectiveConfig(kind="mlm"))
    batch = make_batch([[(32, 0)]] * 500)
    outputs = model(**batch)
    originals = batch["input_ids"].gather(1, outputs["masked_positions"])
    read = outputs["corrupted_ids"].gather(1, outputs["masked_positions"])
    assert (read == 4).float().mean().item() == pytest.approx(0.8 + 0.1 / 99, abs=0.03)
    assert (read == originals).float().mean().item() == pytest.approx(0.1 + 0.1 / 99, abs=0.03)
    assert outputs["stats"]["masked"] == originals.numel()
