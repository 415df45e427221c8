"""Saved models give transformers' pipelines the outputs of our model, and load again with the same outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from task_models import build_source, outputs_of, random_model, split_of, task_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ElectraConfig, pipeline
from transformers import ElectraForPreTraining as Discriminator
from transformers import ElectraForSequenceClassification as Classifier

from electra_composer.errors import UserError
from electra_composer.model.head_maps import classifier_of_linear, scaled_classifier
from electra_composer.tasks.saved import KEY, load_model, save_model

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w1 w1 w20"]
PAIRS = ["w9 w8", "w30 w31 w32", "w2", "w40"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def source(tmp_path):
    return build_source(tmp_path)


def learned(kind, labels, head="linear", **keys):
    """Return a task that has learned from the labels."""
    task = task_of(kind, head, **keys)
    task.learn(split_of([{"text": "w1", "label": label} for label in labels]))
    return task


TASKS = {
    "two labels": ("classification", ["no", "yes"], {}),
    "three labels": ("classification", ["a", "b", "c"], {}),
    "more labels than pairs of units": ("classification", 2 * list(range(25)), {}),
    "more labels than units": ("classification", 2 * list(range(40)), {}),
    "several labels": ("classification", [["a", "b"], ["c"]], {}),
    "regression": ("regression", [100.0, 103.0, 107.0], {}),
    "several targets": ("regression", [[1.0, 1e4], [2.0, 3e4]], {}),
    "transformers": ("classification", ["a", "b", "c"], {"head": "transformers"}),
    "regression of transformers": ("regression", [100.0, 103.0], {"head": "transformers"}),
}


def through_pipeline(folder, texts, pairs):
    """Return the scores of all labels, `[texts, labels]`, in the order of the labels."""
    classify = pipeline("text-classification", folder, device="cpu", top_k=None)
    order = classify.model.config.label2id
    found = classify([{"text": a, "text_pair": b} for a, b in zip(texts, pairs, strict=True)])
    return np.array([[each["score"] for each in sorted(row, key=lambda x: order[x["label"]])] for row in found])


@pytest.mark.parametrize("name", TASKS)
def test_the_pipeline_gives_our_outputs(source, tmp_path, name):
    kind, labels, keys = TASKS[name]
    task = learned(kind, labels, **keys)
    if kind == "classification":
        task.temperature = 1.7
    model = random_model(task, source)
    texts = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, PAIRS, strict=True)]
    split = split_of(texts, "input", text_pair="text_pair", label=None)
    rows = task.encode(task.tokenize(split, source.tokenizer), source.tokenizer, 16)
    outputs = outputs_of(model, task, rows)
    save_model(model, task, source, 16, str(tmp_path / "saved"))
    expected = [numbers_of(row) for row in task.predictions(rows, outputs)]
    scores = through_pipeline(str(tmp_path / "saved"), TEXTS, PAIRS)
    if kind == "classification":  # those of the most probable labels, in descending order
        scores = np.sort(scores, axis=1)[:, ::-1][:, :20]
    np.testing.assert_allclose(scores, expected, **CLOSE)

    loaded = load_model(str(tmp_path / "saved"))
    assert (loaded.max_seq_length, loaded.tokenizer.model_max_length) == (16, 16)
    again = outputs_of(loaded.model, loaded.task, rows)
    factor, offset = task.output_scale()
    np.testing.assert_allclose(np.stack(again), np.stack(outputs) * factor + offset, **CLOSE)
    np.testing.assert_allclose([numbers_of(row) for row in loaded.task.predictions(rows, again)], expected, **CLOSE)
    save_model(loaded.model, loaded.task, source, 16, str(tmp_path / "again"))
    np.testing.assert_allclose(outputs_of(load_model(str(tmp_path / "again")).model, task, rows), again, **CLOSE)


def numbers_of(prediction):
    """Return the probabilities or targets of a prediction."""
    named = prediction.get("probabilities") or prediction.get("labels") or prediction
    return list(named.values())


@pytest.mark.parametrize(
    ("outputs", "hidden", "error"),
    [(3, 256, 3e-6), (128, 256, 3e-6), (129, 256, 1e-5), (256, 256, 1e-5), (3000, 768, 1e-4)],
)
def test_a_linear_head_as_a_classifier(outputs, hidden, error):
    """All forms, for hidden states as large as a LayerNorm gives them."""
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(hidden)
    linear = torch.nn.Linear(hidden, outputs)
    torch.nn.init.xavier_uniform_(linear.weight)
    with torch.no_grad():
        norm.weight.add_(torch.randn(hidden) * 0.2)
        norm.bias.copy_(torch.randn(hidden) * 0.2)
        spikes = torch.randn(64, hidden)
        spikes[range(64), range(64)] += torch.linspace(-300, 300, 64)  # at the bound of the LayerNorm
        x = norm(spikes)
        expected = linear.double()(x.double())
        head = classifier_of_linear(linear.state_dict(), norm.state_dict())
        config = ElectraConfig(hidden_size=hidden, num_labels=outputs)
        with torch.device("meta"):
            classifier = Classifier(config).classifier.eval()
        classifier.load_state_dict(head, assign=True)
        logits = classifier(x[:, None]).double()
        torch.testing.assert_close(logits, expected, rtol=0, atol=error)
        torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=0, atol=1e-5)
        factor, offset = torch.full((outputs,), 2.0).double(), torch.full((outputs,), -1.0).double()
        classifier.load_state_dict(scaled_classifier(head, factor, offset), assign=True)
        torch.testing.assert_close(classifier(x[:, None]).double(), 2 * expected - 1, rtol=0, atol=2 * error)


def test_a_model_that_others_have_finetuned(source, tmp_path):
    """Without our key: labels and the kind of task from their configuration."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2}
    config = ElectraConfig(**sizes, num_attention_heads=4, intermediate_size=64, id2label={0: "bad", 1: "good"})
    theirs = Classifier(config).eval()
    folder = str(tmp_path / "theirs")
    theirs.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    loaded = load_model(folder)
    assert (loaded.task.labels, loaded.task.multi_label, loaded.max_seq_length) == (["bad", "good"], False, 512)
    rows = loaded.task.encode(
        loaded.task.tokenize(split_of([{"text": t} for t in TEXTS], "input", label=None), loaded.tokenizer),
        loaded.tokenizer,
        32,
    )
    batch = source.tokenizer(TEXTS, return_tensors="pt", padding=True)
    torch.testing.assert_close(
        torch.tensor(np.stack(outputs_of(loaded.model, loaded.task, rows))), theirs(**batch).logits, **CLOSE
    )
    theirs.config.problem_type = "regression"
    theirs.save_pretrained(folder)
    assert load_model(folder).task.names == ["bad", "good"]


def test_what_is_no_finetuned_model(source, tmp_path):
    task = learned("classification", ["a", "b"])
    save_model(random_model(task, source), task, source, 16, str(tmp_path / "saved"))
    path = tmp_path / "saved" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, KEY: {**content[KEY], "version": 2}}))
    with pytest.raises(UserError, match="later version of electra_composer"):
        load_model(str(tmp_path / "saved"))
    path.write_text(json.dumps({**content, "model_type": "bert"}))
    with pytest.raises(UserError, match=r"a model of type bert; expected a folder that finetune\.py saved, or one of"):
        load_model(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no finetuned model"):
        load_model(str(tmp_path / "absent"))
    Discriminator(ElectraConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path / "rtd")
    with pytest.raises(UserError, match=r"ElectraForPreTraining in its config\.json; expected"):
        load_model(str(tmp_path / "rtd"))
    (tmp_path / "notes").mkdir()
    with pytest.raises(
        UserError, match=r"notes: no finished run of finetune\.py, and no config\.json; expected a folder"
    ):
        load_model(str(tmp_path / "notes"))
    with pytest.raises(UserError, match="notes exists and is not a saved model"):
        save_model(random_model(task, source), task, source, 16, str(tmp_path / "notes"))


def test_a_saved_model_is_replaced_as_a_whole(source, tmp_path, monkeypatch):
    """An error while it is written leaves the former one."""
    folder = tmp_path / "saved"
    task, other = learned("classification", ["a", "b"]), learned("classification", ["c", "d"])
    save_model(random_model(task, source), task, source, 16, str(folder))
    monkeypatch.setattr(type(source.tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(random_model(other, source), other, source, 16, str(folder), overwrite=True)
    assert load_model(str(folder)).task.labels == ["a", "b"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists already"):
        save_model(random_model(other, source), other, source, 16, str(folder))
    save_model(random_model(other, source), other, source, 16, str(folder), overwrite=True)
    assert load_model(str(folder)).task.labels == ["c", "d"]
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.id2label == {0: "c", 1: "d"}
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 16
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
