"""Regression: targets, their scale, losses and scores, predictions in the units of the data, bad targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from task_models import build_source, outputs_of, random_model, split_of, task_of

from electra_composer.errors import UserError


@pytest.fixture
def source(tmp_path):
    return build_source(tmp_path)


def rows_of(labels):
    return [{"text": f"w{i % 90} w1", "label": label} for i, label in enumerate(labels)]


def learn(labels, **keys):
    task = task_of("regression", **keys)
    task.learn(split_of(rows_of(labels)))
    return task


def encoded(task, labels, source, name="validation"):
    split = split_of(rows_of(labels), name)
    return task.encode(task.tokenize(split, source.tokenizer), source.tokenizer, 16)


def test_targets_are_standardized(source):
    """Also far from 0, where sums of squares would cancel; rows without a number do not count."""
    values = 1e9 + np.random.default_rng(0).normal(size=50)
    task = learn([*values.tolist(), None, ""])
    assert (task.mean[0], task.std[0]) == (pytest.approx(values.mean()), pytest.approx(values.std()))
    labels = encoded(task, [str(value) for value in values], source).per_row["labels"]
    assert (labels.shape, labels.dtype) == ((50, 1), np.float32)
    np.testing.assert_allclose(labels[:, 0], (values - values.mean()) / values.std(), atol=1e-6)
    outputs = torch.randn(50, 1)
    expected = ((outputs.numpy() - labels) ** 2).mean()
    assert float(task.loss(outputs, {"labels": torch.from_numpy(labels)})) == pytest.approx(expected)
    task = learn(values.tolist(), standardize=False)
    assert (task.mean.tolist(), task.std.tolist()) == ([0.0], [1.0])


@pytest.mark.parametrize(
    ("rows", "column", "names"),
    [
        ([{"label": [1, 10.5]}, {"label": [3, 20]}], "label", ["label[0]", "label[1]"]),
        ([{"joy": "1", "fear": "10.5"}, {"joy": 3, "fear": 20}], ["joy", "fear"], ["joy", "fear"]),
    ],
)
def test_several_targets(rows, column, names):
    task, split = task_of("regression"), split_of(rows, label=column)
    task.learn(split)
    assert (task.names, task.mean.tolist(), task.std.tolist()) == (names, [2.0, 15.25], [1.0, 4.75])
    assert [task.label_of(row, split).tolist() for row in split] == [[-1.0, -1.0], [1.0, 1.0]]
    predicted = list(task.predictions(None, [np.array([0.5, 2.0], dtype=np.float32)]))
    assert predicted == [{"labels": dict(zip(names, [2.5, 24.75], strict=True))}]
    again = task_of("regression")
    again.load_state(task.state())
    assert list(again.predictions(None, [np.zeros(2, dtype=np.float32)])) == [
        {"labels": dict(zip(names, [2.0, 15.25], strict=True))}
    ]


def test_scores_are_those_of_numpy(source):
    """Spearman's correlation with ties is Pearson's of mean ranks; MSE is in the units of the data."""
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 6, size=(60, 2)) * 10.0
    predicted = targets + rng.normal(size=(60, 2)) * 8
    task = learn(targets.tolist())
    rows = encoded(task, targets.tolist(), source)
    outputs = list(((predicted - task.mean) / task.std).astype(np.float32))
    found = task.scores(rows, outputs)

    def ranks(values):
        return np.array([(values < value).sum() + (values == value).sum() / 2 for value in values])

    pairs = list(zip(predicted.T, targets.T, strict=True))
    assert found["pearson"] == pytest.approx(np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs]), abs=1e-6)
    expected = np.mean([np.corrcoef(*map(ranks, pair))[0, 1] for pair in pairs])
    assert found["spearman"] == pytest.approx(expected, abs=1e-6)
    assert found["mse"] == pytest.approx(((predicted - targets) ** 2).mean(), rel=1e-5)
    constant = task.scores(rows, [outputs[0]] * 60)
    assert math.isnan(constant["pearson"])
    assert math.isnan(constant["spearman"])
    assert task.collapsed(rows, [outputs[0]] * 60)
    assert not task.collapsed(rows, outputs)


def test_predictions_and_analysis(source):
    task = learn([1.0, 2.0, 6.0])
    rows = encoded(task, [1.0, 2.0, 6.0], source)
    outputs = outputs_of(random_model(task, source), task, rows)
    predicted = np.stack(outputs)[:, 0].astype(float) * task.std[0] + 3.0
    assert [each["label"] for each in task.predictions(rows, outputs)] == pytest.approx(predicted.tolist(), rel=1e-6)
    analysis = task.analysis(rows, outputs)
    np.testing.assert_allclose(analysis.scatter, np.stack([[1.0, 2.0, 6.0], predicted], axis=1), rtol=1e-6)
    assert analysis.per_label[0]["mse"] == pytest.approx(((predicted - [1, 2, 6]) ** 2).mean())
    worst = int(np.abs(predicted - [1, 2, 6]).argmax())
    assert analysis.worst[0]["where"] == f"validation.csv:{worst + 2}"
    assert analysis.worst[0]["predicted"] == pytest.approx(predicted[worst], rel=1e-6)
    assert analysis.worst[0]["expected"] == [1.0, 2.0, 6.0][worst]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, "good"], r"train\.csv:3: label is 'good'; expected a finite number"),
        ([1.0, math.nan], r"train\.csv:3: label is 'nan'; expected a finite number"),
        ([1.0, "-inf"], r"train\.csv:3: label is '-inf'"),
        ([True, 2.0], r"train\.csv:2: label is 'True'"),
        ([1.0, {"a": 1}], r"train\.csv:3: label is \"\{'a': 1\}\""),
        ([[1.0, 2.0], [1.0]], r"train\.csv:3: 1 numbers; expected 2, as in the first row"),
        ([2.5, 2.5], "label is the same number in all rows"),
        ([None, ""], "no numbers in column label"),
    ],
)
def test_targets_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        learn(values)
