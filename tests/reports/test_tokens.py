"""Tokens of rows: masks, samples and the verdicts of every kind of objective, against a direct computation."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from electra_composer.batches.collation import COLUMNS, collate_rows
from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import read_meta
from electra_composer.config import ObjectiveConfig
from electra_composer.reports import tokens as module
from electra_composer.reports.tokens import LEGEND_WITHOUT_MODEL, LEGENDS, Token, annotate_tokens, legend_of
from electra_composer.vocabulary import load_tokenizer

KINDS = get_args(get_type_hints(ObjectiveConfig)["kind"])
SEED = 5


@pytest.fixture
def meta(shards):
    return read_meta(str(shards))


@pytest.fixture
def tokenizer(meta):
    return load_tokenizer(meta.tokenizer_folder)


@pytest.fixture
def rows(shards):
    return reader_of_split(str(shards), "train").read(np.arange(24))


@pytest.fixture
def shown_by(make_model, tiny_model_config, rows, meta, tokenizer):
    """`shown_by(kind, …)`: the tokens of all rows in one list, the model, its batch and its outputs."""

    def show(kind, sharing="tied", **objective):
        model = make_model(
            tiny_model_config(sharing=sharing), ObjectiveConfig(kind=kind, **objective), vocab_size=len(tokenizer)
        ).eval()
        packed = collate_rows(rows, meta.max_seq_length, meta.tokenizer.special_ids["pad"])
        batch = dict(zip(COLUMNS, torch.from_numpy(packed), strict=True))
        noise = model.draw_noise(batch["input_ids"], torch.Generator().manual_seed(SEED))
        with torch.no_grad():
            vary_verdicts(model, batch, model(**batch, noise=noise))
            outputs = model(**batch, noise=noise)
        shown = annotate_tokens(rows, tokenizer, meta, model, SEED)
        assert [len(row) for row in shown] == rows.row_lengths.tolist()
        return [token for row in shown for token in row], model, batch, outputs

    return show


def vary_verdicts(model, batch, outputs):
    """Change biases so that about half of the tokens are flagged or copied, and a word is often predicted."""
    tokens = batch["sequence_ids"] > 0
    if model.rtd_head is not None:
        model.rtd_head.out.bias -= outputs["rtd_logits"][tokens].median() + 1e-3
    if model.copy_head is not None:
        model.copy_head.bias -= outputs["copy_logits"][tokens].median() + 1e-3
    if model.lm_head is not None:
        masked = batch["input_ids"].gather(1, outputs["masked_positions"])[outputs["masked_weights"] > 0]
        word, logits = masked.mode().values, model.lm_logits(outputs["lm_features"])
        model.lm_head.bias[word] += (logits.amax(-1) - logits[..., word]).median() + 1e-3  # no tie


def texts(tokenizer, ids, batch):
    return tokenizer.convert_ids_to_tokens(ids[batch["sequence_ids"] > 0].tolist())


def test_without_a_model(rows, meta, tokenizer):
    shown = annotate_tokens(rows, tokenizer, meta, None, seed=0)
    ids = np.concatenate([tokenizer.convert_tokens_to_ids([token.text for token in row]) for row in shown])
    assert ids.tolist() == rows.input_ids.tolist()
    masked = [token for row in shown for token in row if token.masked]
    assert 0.1 < len(masked) / len(ids) < 0.2
    assert not {"[CLS]", "[SEP]"} & {token.text for token in masked}
    assert [sum(token.example == 1 and token.segment == 0 for token in row) for row in shown] == [
        int(lengths[0]) for lengths in np.split(rows.segment_lengths, np.cumsum(2 * rows.examples_per_row)[:-1])
    ]
    assert {token.verdict for row in shown for token in row} == {None}
    assert {token.render(color=False) for token in masked} == {f"[{token.text}]" for token in masked}


@pytest.mark.parametrize("draw", ["exact", "with_replacement", "bernoulli"])
def test_replaced_tokens(shown_by, tokenizer, draw):
    shown, _, batch, outputs = shown_by("electra", mask_draw=draw)
    masked = [token for token in shown if token.masked]
    assert 0.08 < len(masked) / len(shown) < 0.2
    assert all(token.replaced == (token.sample != token.text) for token in masked)
    assert not any(token.replaced for token in shown if not token.masked)
    assert [token.sample for token in shown] == texts(tokenizer, outputs["corrupted_ids"], batch)
    logits = outputs["rtd_logits"][batch["sequence_ids"] > 0]
    assert [token.flagged for token in shown] == (logits > 0).tolist()
    assert len({(token.flagged, token.replaced) for token in shown}) == 4  # every case occurs


def test_replaced_tokens_of_masked_positions_alone(shown_by):
    shown, _, batch, outputs = shown_by("electra_15")
    tokens = batch["sequence_ids"] > 0
    assert (outputs["rtd_logits"] > 0)[tokens].sum() > sum(token.flagged for token in shown) > 0
    assert not any(token.flagged for token in shown if not token.masked)
    flagged = (outputs["rtd_logits"] > 0)[tokens].tolist()
    assert [token.flagged for token in shown if token.masked] == [
        flag for flag, token in zip(flagged, shown, strict=True) if token.masked
    ]


@pytest.mark.parametrize("generator", ["two_tower", "unigram"])
def test_noise_and_energies(shown_by, generator):
    """Also a sample that equals the original is noise; it is flagged where its posterior is above 1/2."""
    shown, model, batch, outputs = shown_by("electric", "tied", generator=generator, mask_prob=0.3)
    tokens = batch["sequence_ids"] > 0
    assert [token.replaced for token in shown] == [token.masked for token in shown]
    energies = outputs["energies"][tokens]
    assert [token.energy for token in shown] == energies.tolist()
    posteriors = torch.sigmoid(outputs["rtd_logits"][tokens])
    assert [token.flagged for token in shown] == (posteriors > 0.5).tolist()
    if generator == "unigram":  # posterior by Bayes: k q / (k q + n exp(-E))
        q = model.distribution.probabilities[outputs["corrupted_ids"][tokens]]
        expected = 0.3 * q / (0.3 * q + 0.7 * torch.exp(-energies))
        torch.testing.assert_close(posteriors, expected)
    one = next(token for token in shown if token.masked and token.flagged)
    assert one.render(color=False).endswith(f"]{{{one.energy:.1f}}}")
    assert one.verdict == "right"


@pytest.mark.parametrize(("kind", "draw"), [("mlm", "exact"), ("mlm", "with_replacement"), ("replace_mlm", "exact")])
def test_predictions_at_masked_positions(shown_by, tokenizer, monkeypatch, kind, draw):
    """Computed here for each position by itself, there for seven at a time."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * len(tokenizer))
    shown, model, batch, outputs = shown_by(kind, mask_draw=draw)
    expected = {}
    for row, slots in enumerate(outputs["lm_positions"].tolist()):
        for slot, place in enumerate(slots):
            if outputs["masked_weights"][row, slot]:
                logits = model.lm_logits(outputs["lm_features"][row, slot][None])[0]
                expected[row, place] = tokenizer.convert_ids_to_tokens(int(logits.argmax()))
    places = (batch["sequence_ids"] > 0).nonzero().tolist()
    assert [token.prediction for token in shown] == [expected.get((row, place)) for row, place in places]
    verdicts = [("right" if token.prediction == token.text else "wrong") if token.masked else None for token in shown]
    assert [token.verdict for token in shown] == verdicts
    correct = outputs["stats"]["mlm_correct" if kind == "mlm" else "lm_correct"]
    if draw == "exact":
        assert verdicts.count("right") == int(correct)
    if kind == "mlm":
        assert {token.sample for token in shown} == {None}
    else:
        assert [token.sample for token in shown] == texts(tokenizer, outputs["corrupted_ids"], batch)


@pytest.mark.parametrize(("sharing", "generator"), [("tied", "trained"), ("untied", "frozen"), ("tied", "uniform")])
def test_predictions_of_all_tokens(shown_by, tokenizer, sharing, generator):
    shown, model, batch, outputs = shown_by("all_tokens_mlm", sharing, generator=generator)
    best = model.lm_logits(outputs["lm_features"]).argmax(-1)
    expected = torch.where(outputs["copy_logits"] > 0, outputs["corrupted_ids"], best)
    assert [token.prediction for token in shown] == texts(tokenizer, expected, batch)
    right = sum(token.prediction == token.text for token in shown)
    assert right == int(outputs["stats"]["lm_correct"])
    changed = [token for token in shown if not token.masked and token.prediction != token.text]
    assert changed
    assert {token.verdict for token in changed} == {"wrong"}
    assert changed[0].render(color=False) == f"{changed[0].text}⇒{changed[0].prediction}"
    left = next(token for token in shown if not token.masked and token.prediction == token.text)
    assert left.render(color=False) == left.text


def test_the_same_seed_gives_the_same_tokens(shown_by):
    assert shown_by("replace_mlm")[0] == shown_by("replace_mlm")[0]


GREEN, RED, YELLOW = "\x1b[32m", "\x1b[31m", "\x1b[33m"


@pytest.mark.parametrize(
    ("fields", "text", "color"),
    [
        ({}, "film", ""),
        ({"text": "[CLS]"}, "[CLS]", "\x1b[2m"),
        ({"flagged": True}, "!film", RED),
        ({"masked": True, "sample": "film"}, "[film]", ""),
        ({"masked": True, "sample": "film", "flagged": True}, "![film]", RED),
        ({"masked": True, "sample": "movie", "replaced": True, "flagged": True}, "![film→movie]", GREEN),
        ({"masked": True, "sample": "movie", "replaced": True}, "[film→movie]", YELLOW),
        ({"masked": True, "sample": "film", "replaced": True, "flagged": True, "energy": 2.46}, "![film]{2.5}", GREEN),
        ({"flagged": True, "energy": -0.1}, "!film{-0.1}", RED),
        ({"energy": 3.0}, "film", ""),
        ({"masked": True, "prediction": "film"}, "[film✓]", GREEN),
        ({"masked": True, "prediction": "movie"}, "[film⇒movie]", RED),
        ({"masked": True, "sample": "movie", "replaced": True, "prediction": "film"}, "[film→movie✓]", GREEN),
        ({"masked": True, "sample": "movie", "replaced": True, "prediction": "it"}, "[film→movie⇒it]", RED),
        ({"prediction": "film"}, "film", ""),
        ({"prediction": "movie"}, "film⇒movie", RED),
    ],
)
def test_marks(fields, text, color):
    token = Token(**{"text": "film", "segment": 0, "example": 1, **fields})
    assert token.render(color=False) == text
    assert token.render(color=True) == (f"{color}{text}\x1b[0m" if color else text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_legend_explains_every_mark_of_its_kind(shown_by, kind):
    shown, model, *_ = shown_by(kind)
    legend = legend_of(model)
    assert legend == LEGENDS[kind]
    assert legend != LEGEND_WITHOUT_MODEL
    for mark in "[→!✓⇒{":
        is_used = any(mark in re.sub(r"\[(CLS|SEP|UNK)\]", "", token.render(color=False)) for token in shown)
        assert is_used == (mark in legend.replace("without !", "")), mark
    assert set(LEGENDS) == set(KINDS)
