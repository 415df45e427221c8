"""Tagging: the model, its loss and scores against transformers and closed forms, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tagging_inputs import INVISIBLE, SENTENCES, encoded, learned, make_split, outputs_of
from torch import Tensor
from transformers import ElectraForTokenClassification, ElectraTokenizerFast

from electra_composer.checkpoints.weights import load_source
from electra_composer.finetune_config import TaskModelConfig
from electra_composer.tasks.encoded import IGNORED, EncodedRows, collate
from electra_composer.tasks.model import TaskModel, build_task_model


def test_the_model_is_transformers_token_classifier(source: Path, tokenizer: ElectraTokenizerFast) -> None:
    task = learned()
    rows = encoded(task, make_split(SENTENCES, "validation"), tokenizer)
    model = build_task_model(load_source(str(source)), task, TaskModelConfig(source=str(source)), rows).eval()
    reference = ElectraForTokenClassification.from_pretrained(source).eval()
    with torch.no_grad():
        model.model.head.weight.copy_(reference.classifier.weight)
        model.model.head.bias.copy_(reference.classifier.bias)
        batch = collate(list(rows), pad_id=0)
        logits = model(batch)
    expected = reference(batch["input_ids"], attention_mask=batch["sequence_ids"], labels=batch["labels"].long())
    is_token = batch["sequence_ids"] == 1
    torch.testing.assert_close(logits[is_token], expected.logits[is_token].detach(), atol=1e-5, rtol=1e-5)
    assert model.loss(logits, batch).item() == pytest.approx(expected.loss.item(), abs=1e-5)
    kept = task.keep(logits, batch)
    for number, (words, _) in enumerate(SENTENCES):
        # The first token of each word, as transformers' word ids say.
        ids = tokenizer(words, is_split_into_words=True).word_ids()
        places = [place for place, word in enumerate(ids) if word is not None and word != ids[place - 1]]
        torch.testing.assert_close(torch.from_numpy(kept[number]), expected.logits[number, places].detach())
        assert kept[number].dtype == np.float32


def test_loss_is_the_mean_over_labelled_tokens() -> None:
    task = learned()
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, requires_grad=True)
    labels = torch.tensor([[IGNORED, 3, IGNORED, 0], [IGNORED, IGNORED, 1, IGNORED]])
    expected = torch.stack([F.cross_entropy(logits[0, 1], labels[0, 1]), F.cross_entropy(logits[0, 3], labels[0, 3])])
    last = F.cross_entropy(logits[1, 2], labels[1, 2])
    torch.testing.assert_close(task.loss(logits, {"labels": labels}), (expected.sum() + last) / 3)
    nothing = task.loss(logits, {"labels": torch.full_like(labels, IGNORED)})
    assert nothing.item() == 0.0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert not gradient.any()


def test_scores_count_all_words(tokenizer: ElectraTokenizerFast) -> None:
    task = learned()
    assert task.metrics[0] == task.score == "f1"
    # The last word has no token: it is predicted as O, and its span is missed.
    rows = encoded(task, make_split([*SENTENCES, (["a", INVISIBLE], ["B-Y", "B-X"])], "validation"), tokenizer)
    right = outputs_of(rows, lambda label: label, 5)
    scores = task.scores(rows, right)
    assert set(scores) == set(task.metrics)
    assert scores["accuracy"] == pytest.approx(9 / 10)
    assert (scores["precision"], scores["recall"]) == (1.0, 3 / 4)
    assert scores["f1"] == scores["conlleval_f1"] == pytest.approx(2 * 3 / 7)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert not task.collapsed(rows, right)
    nothing = outputs_of(rows, lambda label: 0, 5)
    assert task.collapsed(rows, nothing)
    assert task.scores(rows, nothing)["f1"] == 0.0
    # I instead of B: spans for conlleval only.
    inside = outputs_of(rows, lambda label: {1: 3, 2: 4}.get(label, label), 5)
    assert task.scores(rows, inside)["f1"] == 0.0
    assert task.scores(rows, inside)["conlleval_f1"] == scores["f1"]


def test_tags_without_spans_are_scored_by_word(tokenizer: ElectraTokenizerFast) -> None:
    rows = [(["a", INVISIBLE, "c"], ["NOUN", "NOUN", "VERB"]), (["d"], ["X"])]
    task = learned(rows)
    assert task.notes == ["task.scheme: none, guessed from the tags of data.train"]
    assert (task.labels, task.metrics) == (["NOUN", "VERB", "X"], ("accuracy", "macro_f1"))
    encodings = encoded(task, make_split(rows, "validation"), tokenizer)
    outputs = outputs_of(encodings, lambda label: min(label, 1), 3)
    assert task.scores(encodings, outputs) == pytest.approx({"accuracy": 3 / 4, "macro_f1": (1 + 2 / 3 + 0) / 3})
    first, _ = task.predictions(encodings, outputs)
    assert first["tags"] == ["NOUN", "NOUN", "VERB"]  # a word without a token: the most frequent tag
    assert first["scores"] == [pytest.approx(1 / (1 + 2 * math.exp(-9))), None, pytest.approx(first["scores"][0])]
    assert "spans" not in first


def train(model: TaskModel, rows: EncodedRows, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(rows), (16,), generator=generator).tolist()
        batch = collate([rows[number] for number in chosen], pad_id=0)
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()


def evaluate(model: TaskModel, rows: EncodedRows) -> dict[str, float]:
    metrics = model.eval().get_metrics(is_train=False)
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            batch = collate([rows[number] for number in range(start, min(start + 16, len(rows)))], pad_id=0)
            outputs = model(batch)
            for metric in metrics.values():
                model.update_metric(batch, outputs, metric)
    scores: dict[str, Tensor] = {name: metric.compute() for name, metric in metrics.items()}
    return {name: float(score) for name, score in scores.items()}


def test_spans_are_learned(source: Path, tokenizer: ElectraTokenizerFast) -> None:
    """A span is `a`, then all `b`: of label X after a `c`, else Y."""
    rng = np.random.default_rng(0)

    def sentence() -> tuple[list[str], list[str]]:
        words: list[str] = []
        tags: list[str] = []
        for _ in range(3):
            kind, extra = rng.choice(["X", "Y"]), int(rng.integers(3))
            words += ["c" if kind == "X" else "d", "a", *["b"] * extra, "e"]
            tags += ["O", f"B-{kind}", *[f"I-{kind}"] * extra, "O"]
        return words, tags

    data = [sentence() for _ in range(200)]
    task = learned(data)
    torch.manual_seed(0)
    rows = encoded(task, make_split(data), tokenizer, 12)
    validation = encoded(task, make_split([sentence() for _ in range(40)], "validation"), tokenizer, 12)
    config = TaskModelConfig(source=str(source), dropout=0.0, classifier_dropout=0.0)
    model = build_task_model(load_source(str(source)), task, config, validation)
    before = evaluate(model, validation)
    train(model, rows, steps=150)
    after = evaluate(model, validation)
    assert before["f1"] < 0.5
    assert after["f1"] > 0.9
    assert after["collapsed"] == 0.0


def test_the_analysis_shows_labels_confusions_and_the_worst_sentences(tokenizer: ElectraTokenizerFast) -> None:
    task = learned()
    rows = encoded(task, make_split(SENTENCES, "validation"), tokenizer)
    outputs = outputs_of(rows, lambda label: {2: 1}.get(label, label), 5)  # Y is taken for X
    analysis = task.analysis(rows, outputs)
    assert analysis.labels == ["O", "X", "Y"]
    assert analysis.confusion == [[0, 0, 5], [1, 1, 2], [2, 1, 1]]
    assert analysis.per_label == [
        {"label": "X", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "examples": 1},
        {"label": "Y", "precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 1},
    ]
    (worst,) = analysis.worst
    right, wrong = (math.log(math.exp(9) + 4) - logit for logit in (9, 0))
    assert worst == {
        "where": "a.conll:2",
        "text": f"a-b {INVISIBLE} c ",
        "expected": "c (Y)",
        "predicted": "c (X)",
        "loss": pytest.approx(right + wrong, rel=1e-5),
    }
    plain = learned(scheme="none")
    rows = encoded(plain, make_split(SENTENCES, "validation"), tokenizer)
    analysis = plain.analysis(rows, outputs_of(rows, lambda label: 0, 4))
    assert analysis.labels == ["O", "B-X", "B-Y", "I-X"]
    assert analysis.confusion == [[0, 0, 5], [1, 0, 1], [2, 0, 1], [3, 0, 1]]
    assert [each["examples"] for each in analysis.per_label] == [5, 1, 1, 1]
    assert [(each["expected"], each["predicted"]) for each in analysis.worst] == [
        ("abc (B-X), d (I-X)", "abc (O), d (O)"),
        ("c (B-Y)", "c (O)"),
    ]
