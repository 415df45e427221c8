"""Classification: labels of any kind, losses, scores against closed forms, predictions, calibration, bad labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from task_models import build_source, outputs_of, random_model, split_of, task_of
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
    multilabel_auroc,
    multilabel_f1_score,
)

from electra_composer.errors import UserError
from electra_composer.tasks.calibration import fit_temperature
from electra_composer.tasks.classification_scores import multi_label_scores, single_label_scores


@pytest.fixture
def source(tmp_path):
    return build_source(tmp_path)


def rows_of(labels, **more):
    return [{"text": f"w{i % 90} w1", "label": label, **more} for i, label in enumerate(labels)]


def learn(labels, columns=None, **keys):
    """Return a task that has learned from rows with these labels, and the numbers of these rows."""
    task = task_of("classification", **keys)
    split = split_of(rows_of(labels), **(columns or {}))
    task.learn(split)
    return task, task.stack([task.label_of(row, split) for row in split])


@pytest.mark.parametrize(
    ("values", "labels", "numbers"),
    [
        (["neg", "pos", " neg "], ["neg", "pos"], [0, 1, 0]),
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        ([10.0, 9, "2"], ["2", "9", "10"], [2, 1, 0]),
        (["1.5", "-1", "10"], ["-1", "1.5", "10"], [1, 0, 2]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
    ],
)
def test_labels_of_one_column(values, labels, numbers):
    task, found = learn(values)
    assert (task.labels, found.tolist(), task.multi_label, task.metrics[0]) == (labels, numbers, False, "accuracy")
    assert task.label_of(split_of(rows_of([None])).table[0], split_of([])) is None
    assert task.label_of(split_of(rows_of([math.nan])).table[0], split_of([])) is None


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ([["b", "a"], [], ["c", "a", "a"]], {}),
        (["b, a", "", "c,a"], {"label_separator": ","}),
        (["b|a", None, "c|a"], {"label_separator": "|", "multi_label": True}),
    ],
)
def test_several_labels(values, keys):
    task, found = learn([value for value in values if value is not None], **keys)
    assert (task.labels, task.multi_label, task.metrics[0]) == (["a", "b", "c"], True, "micro_f1")
    rows = [[True, True, False], [False] * 3, [True, False, True]]
    assert task.targets(torch.from_numpy(found)).tolist() == [
        row for row, v in zip(rows, values, strict=True) if v is not None
    ]


def test_a_column_per_label():
    split = split_of([{"a": "1", "b": 0}, {"a": "", "b": "True"}, {"a": 1.0, "b": 1}], label=["a", "b"])
    task = task_of("classification")
    task.learn(split)
    found = task.targets(torch.from_numpy(task.stack([task.label_of(row, split) for row in split])))
    assert found.tolist() == [[True, False], [False, True], [True, True]]
    assert task.label_of(split_of([{"a": "", "b": None}]).table[0], split) is None
    with pytest.raises(UserError, match=r"train\.csv:2: a is 'maybe'; expected 0 or 1"):
        task.learn(split_of([{"a": "maybe", "b": "0"}], label=["a", "b"]))
    with pytest.raises(UserError, match="no row has 1 in column b"):
        task.learn(split_of([{"a": "1", "b": "0"}], label=["a", "b"]))


def test_labels_that_cannot_be():
    with pytest.raises(UserError, match="only the label 'a' in column label; expected at least two"):
        learn(["a", "a", None])
    with pytest.raises(UserError, match="no labels in column label"):
        learn([None, ""])
    with pytest.raises(UserError, match=r"has 30 different values for 30 examples, such as 'w0'.*text or numbers"):
        learn([f"w{i}" for i in range(30)])
    with pytest.raises(UserError, match=r"task\.metric is matthews, but examples have several labels; expected one of"):
        learn([["a"], ["b"]], metric="matthews")
    with pytest.raises(UserError, match=r"train\.csv:3: 2 labels; expected one"):
        learn(["a", ["a", "b"], "b"], multi_label=False)
    with pytest.raises(UserError, match=r"train\.csv:2: label is an object"):
        learn([{"a": 1}, {}])
    task, _ = learn(["good", "bad", "bad", "fair"])
    assert task.notes == ["data.train: 2 of the 3 labels have a single example, such as 'good'"]
    dev = split_of(rows_of(["bad", "godo"]), "validation")
    with pytest.raises(UserError, match=r"validation\.csv:3: no training example has .* 'godo'; did you mean 'good'\?"):
        [task.label_of(row, dev) for row in dev]
    many, _ = learn([f"{i}" for i in range(3000)] * 2)
    assert many.labels[10] == "10"
    with pytest.raises(UserError, match=r"one of its 3,000 labels, such as 0, 1, 2"):
        many.label_of(split_of(rows_of(["weather"])).table[0], dev)


def test_keys_of_other_kinds():
    with pytest.raises(
        UserError, match=r"task\.standardize is False, and task\.kind is classification; only regression"
    ):
        task_of("classification", standardize=False)
    with pytest.raises(UserError, match=r"task\.class_weights is 'balanced', .* only classification has this key"):
        task_of("regression", class_weights="balanced")
    with pytest.raises(UserError, match=r"model\.head is joint, which only qa has"):
        task_of("classification", head="joint")


def test_losses_are_those_of_torch_and_of_scikit_learns_weights():
    torch.manual_seed(0)
    logits = torch.randn(6, 3)
    values = ["a", "a", "a", "b", "c", "b"]
    task, numbers = learn(values)
    batch = {"labels": torch.from_numpy(numbers)}
    torch.testing.assert_close(task.loss(logits, batch), F.cross_entropy(logits, batch["labels"]))
    task, _ = learn(values, class_weights="balanced")
    weights = torch.tensor([6 / (3 * 3), 6 / (3 * 2), 6 / (3 * 1)])
    each = F.cross_entropy(logits, batch["labels"], reduction="none") * weights[batch["labels"]]
    torch.testing.assert_close(task.loss(logits, batch), each.mean())
    halves = [task.loss(logits[part], {"labels": batch["labels"][part]}) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(torch.stack(halves).mean(), each.mean())

    task, numbers = learn([["a"], ["a", "b"], [], ["c"], ["b"], ["a"]], class_weights="balanced")
    targets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]).float()
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weights = torch.where(targets == 1, torch.tensor([3 / 3, 4 / 2, 5 / 1]), 1.0)
    torch.testing.assert_close(task.loss(logits, {"labels": torch.from_numpy(numbers)}), (each * weights).mean())


@pytest.mark.filterwarnings("ignore:No positive samples")
def test_scores_are_those_of_torchmetrics():
    torch.manual_seed(0)
    labels = torch.randint(4, (200,))
    logits = torch.randn(200, 5) + 2 * F.one_hot(labels, 5)
    found = single_label_scores(logits, labels)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert found["macro_f1"] == pytest.approx(float(multiclass_f1_score(logits, labels, 5, average="macro")))
    assert found["matthews"] == pytest.approx(float(multiclass_matthews_corrcoef(logits, labels, 5)))
    each = multiclass_auroc(logits.softmax(1), labels, 5, average="none")[:4]  # the fifth does not occur
    assert found["auc"] == pytest.approx(float(each.mean()))
    targets = torch.rand(200, 4) < 0.3
    logits = torch.randn(200, 4) + targets.float()
    found = multi_label_scores(logits, targets)
    options = {"num_labels": 4, "average": "macro"}
    assert found["macro_f1"] == pytest.approx(float(multilabel_f1_score(logits.sigmoid(), targets.int(), **options)))
    options["average"] = "micro"
    assert found["micro_f1"] == pytest.approx(float(multilabel_f1_score(logits.sigmoid(), targets.int(), **options)))
    assert found["auc"] == pytest.approx(float(multilabel_auroc(logits.sigmoid(), targets.int(), 4, average="macro")))
    assert found["accuracy"] == pytest.approx(float(((logits >= 0) == targets).all(1).float().mean()))


def test_scores_where_they_are_undefined():
    """As scikit-learn: a Matthews correlation of 0 for one predicted class, no AUC of one label."""
    logits, labels = torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    found = single_label_scores(logits, labels)
    assert found == {"accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx(0.25), "matthews": 0.0, "auc": 0.5}
    found = single_label_scores(logits, torch.tensor([0, 0, 0]))
    assert math.isnan(found["auc"])
    assert (found["accuracy"], found["macro_f1"], found["matthews"]) == (1.0, 1.0, 0.0)
    sure = torch.tensor([[0.0, 30.0], [0.0, 35.0], [0.0, 32.0]])  # equal probabilities in fp32, not in fp64
    assert single_label_scores(sure, torch.tensor([0, 1, 1]))["auc"] == 1.0
    none = multi_label_scores(torch.full((2, 3), -1.0), torch.zeros(2, 3, dtype=torch.bool))
    assert none["accuracy"] == 1.0
    assert all(math.isnan(none[name]) for name in ("micro_f1", "macro_f1", "auc"))


def test_predictions_and_analysis(source):
    task, _ = learn([f"l{i}" for i in range(25)] * 2)
    dev = split_of(rows_of([f"l{i}" for i in range(10)]), "validation")
    rows = task.encode(task.tokenize(dev, source.tokenizer), source.tokenizer, 16)
    outputs = outputs_of(random_model(task, source), task, rows)
    task.temperature = 2.0
    chances = torch.tensor(np.stack(outputs) / 2).softmax(1)
    for prediction, row in zip(task.predictions(rows, outputs), chances, strict=True):
        assert list(prediction["probabilities"].values()) == pytest.approx(row.sort(descending=True)[0][:20].tolist())
        assert prediction["label"] == next(iter(prediction["probabilities"])) == task.labels[int(row.argmax())]
    analysis = task.analysis(rows, outputs)
    assert sum(count for _, _, count in analysis.confusion) == 10
    assert sum(each["examples"] for each in analysis.per_label) == 10
    losses = F.cross_entropy(
        torch.tensor(np.stack(outputs)), torch.from_numpy(rows.per_row["labels"]), reduction="none"
    )
    assert [each["loss"] for each in analysis.worst] == pytest.approx(losses.sort(descending=True)[0].tolist())
    worst = int(losses.argmax())
    assert analysis.worst[0]["where"] == f"validation.csv:{worst + 2}"
    assert analysis.worst[0]["expected"] == f"l{worst}"
    assert not task.collapsed(rows, outputs)
    assert task.collapsed(rows, [outputs[0] * scale for scale in range(1, 11)])


def test_predictions_and_analysis_of_several_labels(source):
    task, _ = learn([["a"], ["b", "c"], []])
    dev = split_of(rows_of([["a"], [], ["c", "b"]]), "validation")
    rows = task.encode(task.tokenize(dev, source.tokenizer), source.tokenizer, 16)
    outputs = [np.array(each, dtype=np.float32) for each in ([3, -1, -2], [-1, -2, -3], [-4, 2, 1])]
    found = list(task.predictions(rows, outputs))
    assert [each["labels"] for each in found] == [["a"], [], ["b", "c"]]
    assert list(found[2]["probabilities"].items()) == [
        (name, pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)) for name, logit in (("b", 2), ("c", 1), ("a", -4))
    ]
    assert task.scores(rows, outputs) == dict.fromkeys(("micro_f1", "macro_f1", "accuracy", "auc"), 1.0)
    analysis = task.analysis(rows, outputs)
    assert [each["f1"] for each in analysis.per_label] == [1.0] * 3
    assert [each["expected"] for each in analysis.worst] == [each["predicted"] for each in analysis.worst]
    assert analysis.worst[2]["expected"] == ["b", "c"]  # the surest: losses are sums over the labels


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found(source, temperature):
    """Labels are drawn by the probabilities of logits, which are then given `temperature` times as large."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(40_000, 4)
    labels = torch.multinomial(logits.softmax(1), 1).flatten()
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)
    targets = torch.rand(logits.shape) < logits.sigmoid()
    assert fit_temperature(temperature * logits, targets) == pytest.approx(temperature, rel=0.03)


def test_a_temperature_that_labels_do_not_determine():
    """All predictions right, or all wrong."""
    logits, labels = torch.tensor([[3.0, -1.0], [-2.0, 1.0]]), torch.tensor([0, 1])
    assert [fit_temperature(logits, each) for each in (labels, 1 - labels, F.one_hot(labels))] == [1.0] * 3


def test_calibration_minimizes_the_loss(source):
    task, numbers = learn(["a", "b", "c"] * 4)
    rows = task.encode(task.tokenize(split_of(rows_of(["a", "b", "c"] * 4)), source.tokenizer), source.tokenizer, 16)
    outputs = [np.float32(3 * (np.arange(3) == each) + 2 * np.sin(i + np.arange(3))) for i, each in enumerate(numbers)]
    task.calibrate(rows, outputs)
    logits, labels = torch.tensor(np.stack(outputs)).double(), torch.from_numpy(numbers)
    best = F.cross_entropy(logits / task.temperature, labels)
    assert all(F.cross_entropy(logits / (task.temperature * factor), labels) > best for factor in (0.99, 1.01))
    again = task_of("classification")
    again.load_state(task.state())
    assert (again.temperature, again.labels, again.multi_label) == (task.temperature, ["a", "b", "c"], False)
