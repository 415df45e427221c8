"""Saved models of tagging and question answering: transformers' pipelines give our outputs, and they load again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from task_models import build_source, outputs_of, random_model, split_of, task_of
from transformers import ElectraConfig, ElectraForQuestionAnswering, ElectraForTokenClassification, pipeline

from electra_composer.errors import UserError
from electra_composer.tasks.inference import check_ensemble
from electra_composer.tasks.saved import load_model, save_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SENTENCES = [["w1", "w2", "w3"], ["w4"], ["w7", "w7", "w8", "w9", "w1"]]
TAGS = [["B-X", "I-X", "O"], ["B-Y"], ["O", "O", "B-X", "B-Y", "I-Y"]]
QUESTIONS = [("w1 w2", "w3 w4 w5 w6 w7 w8 w9"), ("w3", "w20 w21 w22 w23")]
SIZES = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def source(tmp_path):
    return build_source(tmp_path)


def encode(task, tokenizer, rows, **columns):
    split = split_of(rows, "input", **columns)
    return task.encode(task.tokenize(split, tokenizer), tokenizer, 24)


def sentences(task, tokenizer):
    rows = [{"tokens": words} for words in SENTENCES]
    return encode(task, tokenizer, rows, tokens="tokens", tags=None, document=None)


def questions(task, tokenizer):
    rows = [{"question": question, "context": context} for question, context in QUESTIONS]
    absent = dict.fromkeys(("id", "answers", "is_impossible"))
    return encode(task, tokenizer, rows, question="question", context="context", **absent)


def test_tags_of_the_ner_pipeline(source, tmp_path):
    task = task_of("tagging")
    rows = [{"tokens": words, "tags": tags} for words, tags in zip(SENTENCES, TAGS, strict=True)]
    task.learn(split_of(rows, tokens="tokens", tags="tags", document=None))
    model = random_model(task, source)
    encoded = sentences(task, source.tokenizer)
    outputs = outputs_of(model, task, encoded)
    folder = str(tmp_path / "saved")
    save_model(model, task, source, 24, folder)
    tag = pipeline("ner", folder, device="cpu", ignore_labels=[])
    assert [tag.model.config.id2label[i] for i in range(len(task.labels))] == task.labels
    predictions = list(task.predictions(encoded, outputs))
    for words, logits, mine in zip(SENTENCES, outputs, predictions, strict=True):
        theirs = tag(" ".join(words))
        assert [each["word"] for each in theirs] == words
        assert [each["entity"] for each in theirs] == [task.labels[i] for i in logits.argmax(1)] == mine["tags"]
        expected = torch.from_numpy(logits).softmax(1).max(1)[0].numpy()
        np.testing.assert_allclose([each["score"] for each in theirs], expected, **CLOSE)
    loaded = load_model(folder)
    again = outputs_of(loaded.model, loaded.task, sentences(loaded.task, loaded.tokenizer))
    for ours, theirs in zip(outputs, again, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    assert (loaded.task.tags, loaded.max_seq_length) == (task.tags, 24)


def test_answers_of_the_question_answering_pipeline(source, tmp_path):
    """Their score is the product of the probabilities of start and end among `[CLS]` and the context."""
    task = task_of("qa")
    model = random_model(task, source)
    encoded = questions(task, source.tokenizer)
    outputs = outputs_of(model, task, encoded)
    folder = str(tmp_path / "saved")
    save_model(model, task, source, 24, folder)
    answer = pipeline("question-answering", folder, device="cpu")
    predictions = list(task.predictions(encoded, outputs))
    for (question, context), logits, mine in zip(QUESTIONS, outputs, predictions, strict=True):
        theirs = answer(question=question, context=context, max_answer_len=30)
        assert (theirs["answer"], theirs["start"], theirs["end"]) == (mine["answer"], mine["start"], mine["end"])
        words, first = len(context.split()), len(question.split()) + 2
        allowed = torch.full((len(logits), 1), -torch.inf)
        allowed[0] = allowed[first : first + words] = 0.0
        starts, ends = (torch.from_numpy(logits) + allowed).softmax(0)[first:-1].unbind(1)
        spans = torch.triu(starts[:, None] * ends)
        assert theirs["score"] == pytest.approx(float(spans.max()), abs=1e-5)
    loaded = load_model(folder)
    again = outputs_of(loaded.model, loaded.task, questions(loaded.task, loaded.tokenizer))
    for ours, theirs in zip(outputs, again, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_a_head_that_transformers_does_not_have(source, tmp_path):
    """It loads with us; transformers refuses its type, instead of a random head in its place."""
    task = task_of("qa", head="joint", unanswerable=True, n_best=3)
    model = random_model(task, source)
    task.null_threshold = 0.25
    outputs = outputs_of(model, task, questions(task, source.tokenizer))
    folder = str(tmp_path / "saved")
    save_model(model, task, source, 24, folder)
    loaded = load_model(folder)
    assert (loaded.task.null_threshold, loaded.task.model_config.head) == (0.25, "joint")
    again = outputs_of(loaded.model, loaded.task, questions(loaded.task, loaded.tokenizer))
    for ours, theirs in zip(outputs, again, strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    with pytest.raises(ValueError, match="electra_composer"):
        pipeline("question-answering", folder, device="cpu")
    with pytest.raises(UserError, match=r"outputs of model\.head=joint cannot be averaged"):
        check_ensemble([loaded, loaded])
    (tmp_path / "saved/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="a damaged model"):
        load_model(folder)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [(["O", "B-X", "I-X"], "iob2"), (["B-X", "I-X", "S-X", "E-X", "O"], "bioes"), (["N", "V"], "none")],
)
def test_taggers_that_others_have_finetuned(source, tmp_path, labels, scheme):
    torch.manual_seed(0)
    config = ElectraConfig(**SIZES, intermediate_size=64, id2label=dict(enumerate(labels)))
    theirs = ElectraForTokenClassification(config).eval()
    folder = str(tmp_path / "theirs")
    theirs.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    loaded = load_model(folder)
    assert (loaded.task.labels, loaded.task.tags.scheme) == (labels, scheme)
    outputs = outputs_of(loaded.model, loaded.task, sentences(loaded.task, loaded.tokenizer))
    for words, mine in zip(SENTENCES, outputs, strict=True):
        logits = theirs(**loaded.tokenizer(" ".join(words), return_tensors="pt")).logits[0, 1:-1]
        torch.testing.assert_close(torch.from_numpy(mine), logits, **CLOSE)


def test_an_answerer_that_others_have_finetuned(source, tmp_path):
    theirs = ElectraForQuestionAnswering(ElectraConfig(**SIZES, intermediate_size=64))
    folder = str(tmp_path / "theirs")
    theirs.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    loaded = load_model(folder)
    outputs = outputs_of(loaded.model, loaded.task, questions(loaded.task, loaded.tokenizer))
    answer = pipeline("question-answering", folder, device="cpu")
    for (question, context), mine in zip(
        QUESTIONS, loaded.task.predictions(questions(loaded.task, loaded.tokenizer), outputs), strict=True
    ):
        assert answer(question=question, context=context, max_answer_len=30)["answer"] == mine["answer"]
