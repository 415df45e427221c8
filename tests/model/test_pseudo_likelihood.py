"""Pseudo-log-likelihoods against transformers' networks: one sentence at a time, unpadded, masked token by token."""

from __future__ import annotations

import pytest
import torch
from shared_fixtures import SPECIAL, VOCAB_SIZE
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer.config import ObjectiveConfig
from electra_composer.model.pseudo_likelihood import pseudo_log_likelihoods
from electra_composer.model.sizes import discriminator_config
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)

LENGTHS = [7, 1, 0, 12, 7, 3, 30, 2]
CLOSE = {"rel": 1e-4, "abs": 1e-4}


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def energies_of(model, config, texts):
    """-E(x)_t, the negative output of transformers' discriminator."""
    theirs = ElectraForPreTraining(transformers_config(config, SPECIAL.pad)).eval()
    theirs.load_state_dict(discriminator_to_transformers(model.state_dict(), config))
    result = []
    for text in texts:
        ids = torch.tensor([[SPECIAL.cls, *text, SPECIAL.sep]])
        result.append((-theirs(ids).logits[0, 1:-1]).tolist())
    return result


def masked_one_by_one(model, config, texts):
    """log p(x_t | x without t) of transformers' masked LM."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head.")}
    state |= {f"mlm_head.{name}": tensor for name, tensor in model.lm_head.state_dict().items()}
    theirs = ElectraForMaskedLM(transformers_config(config, SPECIAL.pad)).eval()
    theirs.load_state_dict(generator_to_transformers(state, config))
    theirs.tie_weights()
    result = []
    for text in texts:
        scores = []
        for place, original in enumerate(text):
            masked = [*text[:place], SPECIAL.mask, *text[place + 1 :]]
            logits = theirs(torch.tensor([[SPECIAL.cls, *masked, SPECIAL.sep]])).logits[0, place + 1]
            scores.append(float(logits[original] - logits.logsumexp(0)))
        result.append(scores)
    return result


@pytest.fixture(params=["electric", "mlm"])
def scored(request, make_model, tiny_model_config, texts):
    """The model, and the twin's numbers of the texts."""
    sizes = tiny_model_config()
    model = make_model(sizes, ObjectiveConfig(kind=request.param)).eval()
    twin = energies_of if request.param == "electric" else masked_one_by_one
    with torch.no_grad():
        return model, twin(model, discriminator_config(sizes, VOCAB_SIZE), texts)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_token_has_the_number_of_the_twin(scored, texts, batch_size):
    model, expected = scored
    found = pseudo_log_likelihoods(model, texts, batch_size)
    assert [len(each) for each in found] == LENGTHS
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, **CLOSE)


def test_the_order_of_the_texts_does_not_matter(scored, texts):
    model, expected = scored
    order = torch.randperm(len(texts)).tolist()
    found = pseudo_log_likelihoods(model, [texts[index] for index in order], 4)
    for mine, index in zip(found, order, strict=True):
        assert mine == pytest.approx(expected[index], **CLOSE)


def test_log_probabilities_of_a_masked_token_add_up_to_one(make_model):
    """Over all tokens that could be at a place of a text."""
    model = make_model(objective=ObjectiveConfig(kind="mlm")).eval()
    found = pseudo_log_likelihoods(model, [[17, token, 23] for token in range(VOCAB_SIZE)], 50)
    assert sum(torch.tensor(each)[1].exp() for each in found) == pytest.approx(1.0, abs=1e-5)
    assert all(each[0] < 0 for each in found)


@pytest.mark.parametrize("kind", ["electric", "mlm"])
def test_no_texts(make_model, kind):
    model = make_model(objective=ObjectiveConfig(kind=kind)).eval()
    assert pseudo_log_likelihoods(model, [], 4) == []
    assert pseudo_log_likelihoods(model, [[], []], 4) == [[], []]
