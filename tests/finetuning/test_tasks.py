"""Tasks, and their metrics compared with definitions in NumPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from electra_composer.errors import UserError
from electra_composer.finetuning.metrics import MatthewsCorrCoef, build_metrics
from electra_composer.finetuning.tasks import TASKS, Task, find_task


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
        ("qqp", "accuracy", {"accuracy", "f1"}, 3, False, 2),
        ("mnli", "accuracy", {"accuracy"}, 3, False, 3),
        ("qnli", "accuracy", {"accuracy"}, 3, False, 2),
        ("rte", "accuracy", {"accuracy"}, 10, False, 2),
        ("wnli", "accuracy", {"accuracy"}, 3, False, 2),
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


def test_the_eight_of_the_average_and_the_three_that_may_start_from_mnli() -> None:
    eight = {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}
    assert {name for name, task in TASKS.items() if task.in_average} == eight
    assert {name for name, task in TASKS.items() if task.intermediate} == {"rte", "mrpc", "stsb"}


def test_the_diagnostics_are_predicted_by_mnli_s_model_alone() -> None:
    ax, mnli = TASKS["ax"], TASKS["mnli"]
    assert ax.trained_by == "mnli"
    assert ax.labels == mnli.labels
    assert ax.num_outputs == mnli.num_outputs
    assert list(ax.splits) == ["test"]
    assert ax.dev_splits == build_metrics(ax) == {}
    assert [task.name for task in TASKS.values() if task.trained_by] == ["ax"]


def test_submission_files_and_labels_are_the_server_s() -> None:
    files = [name for task in TASKS.values() for name in task.submission.values()]
    assert sorted(files) == sorted(
        f"{name}.tsv"
        for name in ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI", "AX")
    )
    for task in TASKS.values():
        assert set(task.submission) == {split for split in task.splits if split.startswith("test")}
    by_name = {"mnli", "ax", "qnli", "rte"}
    assert all(TASKS[name].labels[0] == "entailment" for name in by_name)
    assert all(TASKS[name].labels == ("0", "1") for name in ("cola", "sst2", "mrpc", "qqp", "wnli"))
    assert TASKS["stsb"].labels == ()


def test_mnli_has_two_dev_sets() -> None:
    assert TASKS["mnli"].dev_splits == {"dev": "", "dev_mm": "_mm"}
    assert TASKS["rte"].dev_splits == {"dev": ""}


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
            for part in np.array_split(np.arange(200), 7):  # in batches
                metric.update(torch.tensor(predictions[part]), torch.tensor(labels[part]))
            found[name] = float(metric.compute())
    tp, tn = ((predictions == 1) & (labels == 1)).sum(), ((predictions == 0) & (labels == 0)).sum()
    fp, fn = ((predictions == 1) & (labels == 0)).sum(), ((predictions == 0) & (labels == 1)).sum()
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    # The Matthews correlation is the Pearson correlation of the two binary variables.
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
    # Spearman's correlation is Pearson's of the ranks; the scale of the targets does not matter.
    ranks = np.corrcoef(pd.Series(predictions).rank(), pd.Series(scores).rank())[0, 1]
    assert found["spearman"] == pytest.approx(ranks, abs=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, scores)[0, 1], abs=1e-4)
    assert not any(math.isnan(value) for value in found.values())


def counts_of(predictions: np.ndarray, labels: np.ndarray) -> tuple[float, float, float, float]:
    """Count true and false positives, true and false negatives."""
    positive, truth = predictions == 1, labels == 1
    pairs = ((positive, truth), (positive, ~truth), (~positive, ~truth), (~positive, truth))
    return tuple(float((a & b).sum()) for a, b in pairs)  # type: ignore[return-value]


def by_hand(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute a metric by its definition."""
    if name == "pearson":
        return float(np.corrcoef(predictions, labels)[0, 1])
    if name == "spearman":  # Pearson's of the ranks, ties at their mean rank
        ranks = [pd.Series(values).rank() for values in (predictions, labels)]
        return float(np.corrcoef(*ranks)[0, 1])
    if name == "accuracy":
        return float((predictions == labels).mean())
    tp, fp, tn, fn = counts_of(predictions, labels)
    if name == "f1":
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / margins**0.5 if margins else 0.0


def by_scikit_learn(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute a metric with scikit-learn or SciPy."""
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    if name in ("pearson", "spearman"):
        return float(getattr(stats, f"{name}r")(predictions, labels)[0])
    if name == "f1":
        return float(metrics.f1_score(labels, predictions, zero_division=0.0))
    return float({"accuracy": metrics.accuracy_score, "matthews": metrics.matthews_corrcoef}[name](labels, predictions))


def cases(task: Task) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return predictions and labels: random, tied, constant, perfect, wrong."""
    rng = np.random.default_rng(0)
    if task.is_regression:
        labels = rng.integers(0, 26, 300) / 5.0  # as STS-B: many ties
        noisy = labels / 5 + rng.normal(0, 0.3, 300)
        return {"random": (noisy, labels), "ties": (noisy.round(1), labels), "constant": (0 * noisy + 0.5, labels)}
    labels = rng.integers(0, task.num_outputs, 300)
    guesses = np.where(rng.random(300) < 0.6, labels, rng.integers(0, task.num_outputs, 300))
    constant = {f"constant {k}": (np.full(300, k), labels) for k in range(task.num_outputs)}
    return {"random": (guesses, labels), "perfect": (labels, labels), "wrong": ((labels + 1) % 2, labels), **constant}


@pytest.mark.parametrize("reference", [by_hand, by_scikit_learn])
@pytest.mark.parametrize("name", ["cola", "mrpc", "stsb", "mnli"])  # every metric, two and three classes
def test_metrics_against_their_definitions_and_scikit_learn(name: str, reference: Callable[..., float]) -> None:
    task = TASKS[name]
    for case, (predictions, labels) in cases(task).items():
        for metric_name, metric in build_metrics(task).items():
            for part in np.array_split(np.arange(len(labels)), 7):  # in batches
                dtype = torch.float32 if task.is_regression else torch.int64
                metric.update(torch.tensor(predictions[part], dtype=dtype), torch.tensor(labels[part], dtype=dtype))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the undefined correlation with a constant
                found, expected = float(metric.compute()), reference(metric_name, predictions, labels)
            assert found == pytest.approx(expected, abs=1e-5, nan_ok=True), (case, metric_name)
            assert math.isnan(found) == (case == "constant" and task.is_regression), (case, metric_name)
