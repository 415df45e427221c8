"""One row per GLUE task: where its columns are, what its labels mean, how it is scored and how long it is trained.

Facts: the files of the official GLUE download and the data set `nyu-mll/glue` on the hub; metrics, epochs and the
swapped pairs from google-research/electra (`finetune/classification/`, `configure_finetuning.py`) and the paper, arXiv
2003.10555, section 3.1 and appendix B. Another task is another row in :data:`TASKS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryConfusionMatrix, BinaryF1Score, MulticlassAccuracy
from torchmetrics.utilities.data import dim_zero_cat

from electra_composer.config_loading import nearest
from electra_composer.errors import UserError


@dataclass(frozen=True)
class Split:
    """Where one part of a task is, in the TSV folder and on the hub.

    Columns of a file with a header are named; those of one without are counted from 0, and `width` says how many there
    are. Test files have no label.

    Attributes:
        file: below the task's folder.
        hub: the split of `nyu-mll/glue`.
        texts: columns of the sentences, A before B.
        label: column of the label; None in test files.
        width: columns of a file without a header; None: the first line is one.
        index: column of the number by which the server knows an example; None: its place in the file, from 0.
        skip_short_rows: leave out rows that lack columns. QQP's questions hold some line ends that nothing escapes;
            google-research/electra and the hub's script leave both halves of such a row out, too.
        alternatives: read in place of `file` where that is missing.
    """

    file: str
    hub: str
    texts: tuple[str, ...] | tuple[int, ...]
    label: str | int | None
    width: int | None = None
    index: str | None = None
    skip_short_rows: bool = False
    alternatives: tuple[Split, ...] = ()

    @property
    def has_header(self) -> bool:
        return self.width is None


@dataclass(frozen=True, eq=False)  # a row is itself: usable as a key
class Task:
    """Everything that sets one task apart from another.

    Attributes:
        name: as in the YAML; also its configuration's name on the hub.
        folder: below the TSV folder; also how the task is written in tables.
        splits: some of `train`, `dev`, `dev_mm`, `test`, `test_mm` (mm: MNLI's mismatched genres).
        hub_texts: columns of the sentences on the hub, whose label is always called `label`.
        metrics: keys of :data:`METRICS`; the first is the task's score in the paper. None for AX, whose labels only
            the server has.
        labels: as the files write them, in the order of the classes (the hub's order); empty for regression.
        epochs: of finetuning.
        swap_augmentation: training pairs are also given with A and B exchanged (`double_unordered` there).
        intermediate: may start from a model finetuned on MNLI (intermediate-task training, arXiv 1811.01088).
        trained_by: the task whose model predicts this one, which is never trained itself.
        submission: test split → name of the file in a submission to the server.
        in_average: one of the eight tasks of the paper's average. WNLI is not.
        score_range: lowest and highest label of a regression.
        target_scale: what a regression's labels are multiplied by for training: 0.2 brings STS-B's 0…5 to 0…1
            (google-research/electra); 1.0 keeps 0…5 (richarddwang/electra_pytorch). Both correlations ignore it.
        on_hub: whether `nyu-mll/glue` has it.
        ranked: done as a choice among candidates instead of a classification (glue_ranking.py).
        other_folders: what else `folder` is called: by google-research/electra, or on the hub. Case does not matter.
    """

    name: str
    folder: str
    splits: Mapping[str, Split]
    hub_texts: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")
    epochs: int = 3
    swap_augmentation: bool = False
    intermediate: bool = False
    trained_by: str | None = None
    submission: Mapping[str, str] = field(default_factory=dict)
    in_average: bool = True
    score_range: tuple[float, float] | None = None
    target_scale: float = 1.0
    on_hub: bool = True
    ranked: bool = False
    other_folders: tuple[str, ...] = ()

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

    @property
    def server_labels(self) -> tuple[str, ...]:
        """What the server wants for each class: what the training file writes. Empty for regression: a number there."""
        return self.labels

    @property
    def dev_splits(self) -> dict[str, str]:
        """Dev split → what is added to the names of its metrics: `{"dev": ""}`, for MNLI `"dev_mm": "_mm"` as well."""
        return {name: name.removeprefix("dev") for name in self.splits if name.startswith("dev")}


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


class SpearmanCorrelation(SpearmanCorrCoef):
    """Spearman's rank correlation, NaN where predictions or labels are all the same.

    It is not defined there, and SciPy gives NaN; torchmetrics' own gives 0, though its Pearson correlation gives NaN.
    """

    def __init__(self) -> None:
        with warnings.catch_warnings():
            # Ranks need all predictions at once: of the memory, of which torchmetrics warns, a dev set needs little.
            warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all targets")
            super().__init__()

    def compute(self) -> Tensor:
        values = [dim_zero_cat(part) for part in (self.preds, self.target)]
        if any(bool((value == value[0]).all()) for value in values):
            return torch.full((), torch.nan, device=values[0].device)
        return super().compute()


METRICS: dict[str, Callable[[Task], Metric]] = {
    "accuracy": lambda task: MulticlassAccuracy(len(task.labels), average="micro"),
    "f1": lambda task: BinaryF1Score(),
    "matthews": lambda task: MatthewsCorrCoef(),
    "spearman": lambda task: SpearmanCorrelation(),
    "pearson": lambda task: PearsonCorrCoef(),
}
"""Each takes `update(predictions, labels)`: classes as integers, or values of a regression; and gives -1…1 or 0…1."""


def _layout(texts: tuple[str, ...], label: str = "label", **both: Any) -> dict[str, Split]:
    """`train.tsv` and `dev.tsv` alike, `test.tsv` without labels but with an index; all with headers."""
    return {
        "train": Split("train.tsv", "train", texts, label, **both),
        "dev": Split("dev.tsv", "validation", texts, label, **both),
        "test": Split("test.tsv", "test", texts, None, index="index"),
    }


PAIR = ("sentence1", "sentence2")
NLI_LABELS = ("entailment", "neutral", "contradiction")
RTE_LABELS = ("entailment", "not_entailment")

_TASKS = (
    Task(
        name="cola",
        folder="CoLA",
        # source, label, the author's mark, sentence: without a header, but for the test file
        splits={
            "train": Split("train.tsv", "train", (3,), 1, width=4),
            "dev": Split("dev.tsv", "validation", (3,), 1, width=4),
            "test": Split("test.tsv", "test", ("sentence",), None, index="index"),
        },
        hub_texts=("sentence",),
        metrics=("matthews", "accuracy"),
        submission={"test": "CoLA.tsv"},
    ),
    Task(
        name="sst2",
        folder="SST-2",
        splits=_layout(("sentence",)),
        hub_texts=("sentence",),
        metrics=("accuracy",),
        submission={"test": "SST-2.tsv"},
        other_folders=("sst", "sst2"),
    ),
    Task(
        name="mrpc",
        folder="MRPC",
        splits=_layout(("#1 String", "#2 String"), "Quality"),
        hub_texts=PAIR,
        metrics=("accuracy", "f1"),
        swap_augmentation=True,
        intermediate=True,
        submission={"test": "MRPC.tsv"},
    ),
    Task(
        name="stsb",
        folder="STS-B",
        splits=_layout(PAIR, "score"),
        hub_texts=PAIR,
        metrics=("spearman", "pearson"),
        labels=(),
        epochs=10,
        swap_augmentation=True,
        intermediate=True,
        submission={"test": "STS-B.tsv"},
        score_range=(0.0, 5.0),
        target_scale=0.2,
        other_folders=("sts", "stsb"),
    ),
    Task(
        name="qqp",
        folder="QQP",
        splits={
            **_layout(("question1", "question2"), "is_duplicate", skip_short_rows=True),
            "test": Split("test.tsv", "test", ("question1", "question2"), None, index="id"),
        },
        hub_texts=("question1", "question2"),
        metrics=("accuracy", "f1"),
        submission={"test": "QQP.tsv"},
    ),
    Task(
        name="mnli",
        folder="MNLI",
        # Of several label columns the last counts: what most annotators said. train.tsv has 12 columns, the dev files
        # 16, the test files 10: only the header tells where the sentences and the label are.
        splits={
            "train": Split("train.tsv", "train", PAIR, "gold_label"),
            "dev": Split("dev_matched.tsv", "validation_matched", PAIR, "gold_label"),
            "dev_mm": Split("dev_mismatched.tsv", "validation_mismatched", PAIR, "gold_label"),
            "test": Split("test_matched.tsv", "test_matched", PAIR, None, index="index"),
            "test_mm": Split("test_mismatched.tsv", "test_mismatched", PAIR, None, index="index"),
        },
        hub_texts=("premise", "hypothesis"),
        metrics=("accuracy",),
        labels=NLI_LABELS,
        submission={"test": "MNLI-m.tsv", "test_mm": "MNLI-mm.tsv"},
    ),
    Task(
        name="qnli",
        folder="QNLI",
        splits=_layout(("question", "sentence")),
        hub_texts=("question", "sentence"),
        metrics=("accuracy",),
        labels=RTE_LABELS,
        submission={"test": "QNLI.tsv"},
    ),
    Task(
        name="rte",
        folder="RTE",
        splits=_layout(PAIR),
        hub_texts=PAIR,
        metrics=("accuracy",),
        labels=RTE_LABELS,
        epochs=10,
        intermediate=True,
        submission={"test": "RTE.tsv"},
    ),
    Task(
        name="wnli",
        folder="WNLI",
        splits=_layout(PAIR),
        hub_texts=PAIR,
        metrics=("accuracy",),
        submission={"test": "WNLI.tsv"},
        in_average=False,
    ),
    Task(
        name="ax",
        folder="AX",
        splits={
            "test": Split(
                "diagnostic.tsv",
                "test",
                PAIR,
                None,
                index="index",
                alternatives=(
                    Split("AX.tsv", "test", PAIR, None, index="index"),
                    # the authors' release, which has the labels, too, and no index
                    Split("diagnostic-full.tsv", "test", ("Premise", "Hypothesis"), None),
                ),
            )
        },
        hub_texts=("premise", "hypothesis"),
        metrics=(),
        labels=NLI_LABELS,
        trained_by="mnli",
        submission={"test": "AX.tsv"},
        in_average=False,
        other_folders=("diagnostic", "MNLI"),
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
        in_average=False,
        on_hub=False,
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


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
