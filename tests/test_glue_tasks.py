"""The rows of the tasks, and their metrics against definitions written out here."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from electra_composer.errors import UserError
from electra_composer.glue_tasks import TASKS, MatthewsCorrCoef, build_metrics, find_task


def test_names_folders_and_cases_find_a_task() -> None:
    assert find_task("cola") is find_task("CoLA") is TASKS["cola"]
    assert find_task("SST-2").name == find_task("sst2").name == "sst2"
    assert find_task("sts-b").name == "stsb"


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no task called 'mprc'; did you mean mrpc\?"):
        find_task("mprc")


@pytest.mark.parametrize(
    ("name", "score", "metrics", "epochs", "swapped", "outputs"),
    [  # paper, section 3.1 and appendix B; G: double_unordered; STS-B is a regression
        ("cola", "matthews", {"matthews", "accuracy"}, 3, False, 2),
        ("sst2", "accuracy", {"accuracy"}, 3, False, 2),
        ("mrpc", "accuracy", {"accuracy", "f1"}, 3, True, 2),
        ("stsb", "spearman", {"spearman", "pearson"}, 10, True, 1),
    ],
)
def test_recipe_of_each_task(
    name: str, score: str, metrics: set[str], epochs: int, swapped: bool, outputs: int
) -> None:
    task = TASKS[name]
    assert task.metrics[0] == score
    assert set(build_metrics(task)) == metrics
    assert task.epochs == epochs
    assert task.swap_augmentation == swapped
    assert task.num_outputs == outputs


def test_synthetic_tasks_say_so() -> None:
    assert [task.name for task in TASKS.values() if task.is_synthetic] == ["synthetic-words"]
    assert "synthetic" in TASKS["synthetic-words"].folder


def test_classification_metrics_are_their_definitions() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 200)
    predictions = np.where(generator.random(200) < 0.7, labels, 1 - labels)
    found = {}
    for task in (TASKS["cola"], TASKS["mrpc"]):
        for name, metric in build_metrics(task).items():
            for part in np.array_split(np.arange(200), 7):  # as batches
                metric.update(torch.tensor(predictions[part]), torch.tensor(labels[part]))
            found[name] = float(metric.compute())
    tp, tn = ((predictions == 1) & (labels == 1)).sum(), ((predictions == 0) & (labels == 0)).sum()
    fp, fn = ((predictions == 1) & (labels == 0)).sum(), ((predictions == 0) & (labels == 1)).sum()
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    # Matthews' coefficient is Pearson's of the two indicator variables.
    assert found["matthews"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-6)


@pytest.mark.parametrize("says", [0, 1])
def test_matthews_is_zero_for_a_model_that_always_says_the_same(says: int) -> None:
    labels = (torch.arange(1043) < 721).long()  # CoLA's dev set
    metric = MatthewsCorrCoef()
    metric.update(torch.full_like(labels, says), labels)
    assert float(metric.compute()) == 0.0


@pytest.mark.parametrize(("predictions", "expected"), [([1, 0, 1, 0], 1.0), ([0, 1, 0, 1], -1.0)])
def test_matthews_at_its_ends(predictions: list[int], expected: float) -> None:
    metric = MatthewsCorrCoef()
    metric.update(torch.tensor(predictions), torch.tensor([1, 0, 1, 0]))
    assert float(metric.compute()) == pytest.approx(expected)


def test_matthews_of_counts_whose_product_is_beyond_fp32_integers() -> None:
    labels, flips = torch.arange(60_000) % 2, torch.arange(60_000) % 10 == 0
    metric = MatthewsCorrCoef()
    metric.update(torch.where(flips, 1 - labels, labels), labels)
    expected = np.corrcoef(torch.where(flips, 1 - labels, labels).numpy(), labels.numpy())[0, 1]
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def test_correlations_against_pandas_ties_included() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 26, 300) / 5.0  # as STS-B: many ties
    predictions = scores / 5 + generator.normal(0, 0.2, 300)
    found = {}
    for name, metric in build_metrics(TASKS["stsb"]).items():
        for part in np.array_split(np.arange(300), 4):
            metric.update(torch.tensor(predictions[part]).float(), torch.tensor(scores[part] * 0.2).float())
        found[name] = float(metric.compute())
    # Spearman's coefficient is Pearson's of the ranks; the targets' scale does not matter.
    ranks = np.corrcoef(pd.Series(predictions).rank(), pd.Series(scores).rank())[0, 1]
    assert found["spearman"] == pytest.approx(ranks, abs=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, scores)[0, 1], abs=1e-4)
    assert not any(math.isnan(value) for value in found.values())
