"""Schema of the YAML files of `electra_composer/finetune.py`: a task of one's own. See `config.py` for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from electra_composer.config import Dropout, RunConfig, Seed
from electra_composer.ranges import Length, Range


@dataclass
class TaskDataConfig:
    """Files of the task, or a data set on the hub."""

    train: str = MISSING  # a file, a folder, or a pattern such as data/part-*.jsonl; with `hub`, the name of a split
    validation: str | None = None  # null: `validation_fraction` of the training examples
    test: str | None = None  # examples to predict after training; labels are optional
    validation_fraction: Annotated[float, Range(gt=0, le=0.5)] = 0.1  # drawn by `seed`
    hub: str | None = None  # name of a data set on the Hugging Face hub, or a folder that `datasets` loads
    hub_config: str | None = None  # its configuration
    # auto: by the name of the file, or by its content
    format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "squad", "mrqa"] = "auto"
    header: bool = True  # whether csv and tsv files begin with the names of the columns; false: they are "0", "1", …
    # role: column, such as {text: review, label: stars}; roles that are not given are guessed, and said. Roles of
    # classification and regression: text, text_pair, label (several columns: a list); tagging: tokens, tags; qa: id,
    # question, context, answers, is_impossible
    columns: dict[str, Any] = field(default_factory=dict)
    # tokens per example; auto: the 99th percentile of the training examples, at most the positions of the model
    max_seq_length: Annotated[int, Range(ge=5, le=65535)] | Literal["auto"] = "auto"
    num_workers: Annotated[int, Range(ge=0, le=256)] | Literal["auto"] = "auto"  # auto: a thread of this process


@dataclass
class TaskConfig:
    """The task: what is predicted. A key that another kind of task has must keep its default."""

    kind: Literal["classification", "regression", "tagging", "qa"] = MISSING  # qa: extractive question answering
    metric: str | None = None  # score of a run, by which the best epoch and seed are chosen; null: the kind's first
    # classification: several labels per example; auto: if the label column holds lists, or is several columns
    multi_label: bool | Literal["auto"] = "auto"
    label_separator: str | None = None  # classification: text between the labels of one example, such as ","
    class_weights: Literal["none", "balanced"] = "none"  # classification: balanced: inversely to their frequency
    standardize: bool = True  # regression: train on targets of mean 0 and variance 1; predictions are in their units
    # tagging: how spans are marked; none: a tag per word, such as parts of speech
    scheme: Literal["auto", "iob1", "iob2", "bioes", "none"] = "auto"
    context: bool = False  # tagging: fill the window with neighbouring sentences of the same document
    # tagging: tokens that the rows of a longer sentence share, at most half of a row; qa: tokens between windows of a
    # longer text
    stride: Annotated[int, Range(ge=1, le=65535)] = 128
    max_answer_length: Annotated[int, Range(ge=1, le=65535)] = 30  # qa: tokens
    n_best: Annotated[int, Range(ge=1, le=1000)] = 20  # qa: starts that are considered, and answers that are listed
    unanswerable: bool | Literal["auto"] = "auto"  # qa: whether questions may have no answer; auto: if some have none


@dataclass
class TaskModelConfig:
    """Model to finetune."""

    source: str = MISSING  # as in `glue.yaml`
    random_init: bool = False  # keep the sizes and tokenizer of `source`, but draw new weights (the baseline)
    dropout: Dropout | None = None  # null: the dropout that `source` was trained with
    classifier_dropout: Dropout = 0.1  # before the head
    # linear: one layer (google-research/electra); transformers: the head of transformers' classifier (dense, GELU,
    # dropout, linear); joint: qa only, the end of an answer given its start (google-research/electra)
    head: Literal["linear", "transformers", "joint"] = "linear"


@dataclass
class TaskPredictConfig:
    """Predictions for `data.test`, and the model that `predict.py` and exports use."""

    select: str = "best"  # runs to predict with: best on validation, one seed, or ensemble (the mean of their outputs)
    calibrate: bool = False  # classification: divide the logits by a temperature fitted on validation
    file: str = "${checkpoints.folder}/predictions.jsonl"  # .jsonl, .csv or .tsv


@dataclass
class FinetuneConfig(RunConfig):
    """Configuration of `electra_composer/finetune.py`."""

    data: TaskDataConfig = field(default_factory=TaskDataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: TaskModelConfig = field(default_factory=TaskModelConfig)
    seeds: Annotated[list[Seed], Length(1)] = MISSING  # one run each
    loss_reduction: Literal["mean", "sum"] = "mean"  # as in glue_config.py; tagging has mean only
    epoch: Literal["best", "last"] = "best"  # whose weights a run keeps: best by `task.metric` on validation
    save: Literal["best", "all", "none"] = "best"  # models to keep: of the best seed, of all seeds (for an ensemble)
    # a seeded sample of this size
    max_train_examples: Annotated[int, Range(ge=1, le=10**9, null="all")] | None = None
    predict: TaskPredictConfig = field(default_factory=TaskPredictConfig)
    results: str = "${checkpoints.folder}/results.json"  # scores and their statistics; .md, .csv and .png beside it
