"""Schema of the YAML files of `electra_composer/glue.py`. See `config.py` for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from omegaconf import MISSING

from electra_composer.config import BatchSize, DataConfig, Dropout, LayerwiseDecay, LearningRate, Phase, RunConfig, Seed
from electra_composer.ranges import Length, Range


@dataclass
class GlueDataConfig(DataConfig):
    """Location of the GLUE files and of their tokenized copies."""

    cache: str | None = None  # folder for tokenized files, keyed by content; null: tokenize at every start


@dataclass
class GlueModelConfig:
    """Model to finetune."""

    # a checkpoint of this project (.pt, sharded, or its run folder), an export, a folder of ElectraForPreTraining or
    # ElectraModel, or a name on the Hugging Face hub
    source: str = MISSING
    random_init: bool = False  # keep the sizes and tokenizer of `source`, but draw new weights (the baseline)
    dropout: Dropout | None = None  # null: the dropout that `source` was trained with
    classifier_dropout: Dropout = 0.1  # before the head


@dataclass
class TaskSettings:
    """Settings of one task; null keeps the setting of the run."""

    # takes precedence over trainer.max_duration and the task's own epochs
    epochs: Annotated[int, Range(ge=1, le=10**6)] | None = None
    lr: LearningRate | None = None  # peak learning rate
    batch_size: BatchSize | None = None  # takes precedence over trainer.global_train_batch_size
    layerwise_decay: LayerwiseDecay | None = None  # 1.0 turns layerwise decay off
    warmup: Phase | None = None  # a Composer time


@dataclass
class PredictConfig:
    """Test-set predictions in the format of the GLUE server."""

    enabled: bool = False  # every run also writes its logits on the test sets
    select: str = "best"  # runs to predict with: best on dev, one seed, or ensemble (the mean of all runs' logits)
    file: str = "${checkpoints.folder}/submission.zip"  # to write


@dataclass
class GlueConfig(RunConfig):
    """Configuration of `electra_composer/glue.py`."""

    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    model: GlueModelConfig = field(default_factory=GlueModelConfig)
    tasks: list[str] = MISSING  # of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli and ax
    seeds: Annotated[list[Seed], Length(1)] = MISSING  # one finetuning run per task and seed
    task_settings: dict[str, TaskSettings] = field(default_factory=dict)  # such as {rte: {epochs: 10, lr: 1e-4}}
    # targets of STS-B: its 0…5 scaled to 0…1 (google-research/electra), or as they are (richarddwang/electra_pytorch)
    regression_targets: Literal["unit", "raw"] = "unit"
    # method for WNLI: classification of the pair, or coreference, in which the pretrained discriminator and its head
    # rank the candidates for the pronoun (the WSC trick of richarddwang/electra_pytorch)
    wnli: Literal["classification", "coreference"] = "classification"
    # over the examples of a batch; sum (google-research/electra): the norm of the gradient grows with their number, and
    # trainer.gradient_clip takes effect that much earlier
    loss_reduction: Literal["mean", "sum"] = "mean"
    double_unordered: bool = True  # train on the pairs of MRPC and STS-B in both orders (google-research/electra)
    intermediate: bool = False  # start RTE, MRPC and STS-B from the MNLI run of the same seed
    # a seeded sample of this size
    max_train_examples: Annotated[int, Range(ge=1, le=10**9, null="all")] | None = None
    predict: PredictConfig = field(default_factory=PredictConfig)
    results: str = "${checkpoints.folder}/results.json"  # scores and their statistics; .md, .csv and .png beside it
