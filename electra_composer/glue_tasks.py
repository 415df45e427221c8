"""One row per GLUE task: where its columns are, what its labels mean, how it is scored and how long it is trained.

Facts: the files of the official GLUE download and the data set `nyu-mll/glue` on the hub; metrics, epochs and the
swapped pairs from google-research/electra (`finetune/classification/`, `configure_finetuning.py`) and the paper, arXiv
2003.10555, section 3.1 and appendix B. Another task is another row in :data:`TASKS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryConfusionMatrix, BinaryF1Score, MulticlassAccuracy

from electra_composer.config import nearest
from electra_composer.errors import UserError


@dataclass(frozen=True)
class Split:
    """Where one part of a task is, in the TSV folder and on the hub.

    Columns of a file with a header are named; those of one without are counted from 0, and `width` says how many there
    are. Test files have no label.
    """

    file: str
    hub: str
    texts: tuple[str, ...] | tuple[int, ...]
    label: str | int | None
    width: int | None = None  # None: the first line is a header

    @property
    def has_header(self) -> bool:
        return self.width is None


@dataclass(frozen=True, eq=False)  # a row is itself: usable as a key
class Task:
    """Everything that sets one task apart from another.

    Attributes:
        name: as in the YAML; also its configuration's name on the hub.
        folder: below the TSV folder; also how the task is written in tables.
        splits: `train`, `dev` and, where there is one, `test`.
        hub_texts: columns of the sentences on the hub, whose label is always called `label`.
        labels: as the files write them, in the order of the classes (the hub's order); empty for regression.
        metrics: keys of :data:`METRICS`; the first is the task's score in the paper.
        epochs: of finetuning.
        swap_augmentation: training pairs are also given with A and B exchanged (`double_unordered` there).
        score_range: lowest and highest label of a regression.
        target_scale: what a regression's labels are multiplied by for training: 0.2 brings STS-B's 0…5 to 0…1
            (google-research/electra); 1.0 keeps 0…5 (richarddwang/electra_pytorch). Both correlations ignore it.
        on_hub: whether `nyu-mll/glue` has it.
    """

    name: str
    folder: str
    splits: Mapping[str, Split]
    hub_texts: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    epochs: int = 3
    swap_augmentation: bool = False
    score_range: tuple[float, float] | None = None
    target_scale: float = 1.0
    on_hub: bool = True

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def num_outputs(self) -> int:
        """Width of the head: one per class, or 1 for regression."""
        return 1 if self.is_regression else len(self.labels)

    @property
    def is_synthetic(self) -> bool:
        """Whether the task is ours (see synthetic.py); its score is no GLUE score and stays out of the average."""
        return self.name.startswith("synthetic")


class MatthewsCorrCoef(BinaryConfusionMatrix):
    """Matthews correlation of two classes, 0 where a row or column of the confusion matrix is empty.

    A model that always says the same has learnt nothing, and CoLA runs that fail do so: 0 is what scikit-learn gives,
    and what GLUE's published scores rest on. torchmetrics' own gives such a model 0.026 on CoLA's dev set.
    """

    def compute(self) -> Tensor:
        (tn, fp), (fn, tp) = super().compute().double()
        margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        if margins == 0:
            return torch.zeros((), device=margins.device)
        return ((tp * tn - fp * fn) / margins.sqrt()).float()


def _spearman() -> Metric:
    """Ranks need all predictions at once; torchmetrics warns of the memory, which a dev set does not notice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
        return SpearmanCorrCoef()


METRICS: dict[str, Callable[[Task], Metric]] = {
    "accuracy": lambda task: MulticlassAccuracy(len(task.labels), average="micro"),
    "f1": lambda task: BinaryF1Score(),
    "matthews": lambda task: MatthewsCorrCoef(),
    "spearman": lambda task: _spearman(),
    "pearson": lambda task: PearsonCorrCoef(),
}
"""Each takes `update(predictions, labels)`: classes as integers, or values of a regression; and gives -1…1 or 0…1."""


def _same_layout(texts: tuple[str, ...], label: str, test_texts: tuple[str, ...]) -> dict[str, Split]:
    """`train.tsv` and `dev.tsv` alike, `test.tsv` without labels; all with headers."""
    return {
        "train": Split("train.tsv", "train", texts, label),
        "dev": Split("dev.tsv", "validation", texts, label),
        "test": Split("test.tsv", "test", test_texts, None),
    }


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="cola",
            folder="CoLA",
            # source, label, the author's mark, sentence: without a header, but for the test file
            splits={
                "train": Split("train.tsv", "train", (3,), 1, width=4),
                "dev": Split("dev.tsv", "validation", (3,), 1, width=4),
                "test": Split("test.tsv", "test", ("sentence",), None),
            },
            hub_texts=("sentence",),
            metrics=("matthews", "accuracy"),
        ),
        Task(
            name="sst2",
            folder="SST-2",
            splits=_same_layout(("sentence",), "label", ("sentence",)),
            hub_texts=("sentence",),
            metrics=("accuracy",),
        ),
        Task(
            name="mrpc",
            folder="MRPC",
            splits=_same_layout(("#1 String", "#2 String"), "Quality", ("#1 String", "#2 String")),
            hub_texts=("sentence1", "sentence2"),
            metrics=("accuracy", "f1"),
            swap_augmentation=True,
        ),
        Task(
            name="stsb",
            folder="STS-B",
            splits=_same_layout(("sentence1", "sentence2"), "score", ("sentence1", "sentence2")),
            hub_texts=("sentence1", "sentence2"),
            metrics=("spearman", "pearson"),
            labels=(),
            epochs=10,
            swap_augmentation=True,
            score_range=(0.0, 5.0),
            target_scale=0.2,
        ),
        Task(
            name="synthetic-words",
            folder="synthetic-words",
            # whole (1) against corrupted (0) sentences, written by synthetic.py in the layout of SST-2
            splits={
                "train": Split("train.tsv", "train", ("sentence",), "label"),
                "dev": Split("dev.tsv", "validation", ("sentence",), "label"),
            },
            hub_texts=("sentence",),
            metrics=("accuracy", "matthews"),
            on_hub=False,
        ),
    )
}


def find_task(name: str) -> Task:
    """The row of a task, by its name (`sst2`) or its folder's (`SST-2`), whatever the case.

    Raises:
        UserError: no such task; the message has the nearest.
    """
    for task in TASKS.values():
        if name.casefold() in (task.name, task.folder.casefold()):
            return task
    raise UserError(f"tasks: no task called {name!r}; {nearest(name.casefold(), list(TASKS))}")


def build_metrics(task: Task) -> dict[str, Metric]:
    """Fresh metrics of a task, by name; the first is its score."""
    return {name: METRICS[name](task) for name in task.metrics}
