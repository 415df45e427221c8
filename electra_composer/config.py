"""The schema of the YAML files; :mod:`electra_composer.config_loading` makes one checked configuration of a file.

Every key that a YAML may hold is a field of a dataclass below; anything else is an error. What pretraining and GLUE
have in common (data, optimizer, schedule, trainer, checkpoints, callbacks, loggers) is one part, :class:`RunConfig`.
Sizes that follow from others (generator widths, feed-forward width, number of masked slots) are derived, not listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Union

from omegaconf import MISSING


@dataclass
class DataConfig:
    """Where the data is and how it is loaded."""

    path: str = MISSING  # pretraining: the folder convert_owt.py wrote; GLUE: the folder of TSV files, or "hub"
    max_seq_length: int = MISSING  # tokens in a row; for pretraining the shards must have been made for it
    num_workers: int = 2  # loader processes per device; 0 loads in the training process


@dataclass
class StreamConfig:
    """One of several folders of shards that are read as one, and how much of it is in an epoch.

    At most one of `proportion`, `repeat` and `choose`; none of them: every row once.
    """

    path: str = MISSING  # as data.path: the folder, or with `remote` its cache
    remote: str | None = None
    proportion: float | None = None  # weight among the streams, which all have one then; they need not add up to 1
    repeat: float | None = None  # how often each row is taken: 2 is twice, 0.5 half of them
    choose: int | None = None  # so many rows


@dataclass
class ShardsConfig(DataConfig):
    """MDS shards read by Streaming."""

    # several folders, by names of your own, instead of `path`: {owt: {path: data/owt, proportion: 0.7}, wikipedia: …}
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    eval_streams: list[str] | None = None  # names; null: the validation rows of all streams, each once
    # random: a batch has rows of any stream; stratified: as many of each in every batch; per_stream: of one stream
    batching_method: Literal["random", "stratified", "per_stream"] = "random"
    epoch_size: Union[int, str, None] = None  # noqa: UP007 (OmegaConf); rows, such as 10m; null: as many as there are
    remote: str | None = None  # where Streaming downloads the shards from (s3://…); `path` is then its cache
    tokenizer: str | None = None  # null: the one beside the shards; else it must be the one that made them
    train_split: str = "train"
    eval_split: str = "val"
    shuffle: bool = True
    # parts that the rows are shuffled in, each for some nodes; null: the nodes of the run's first start. Runs with the
    # same number have the same order of rows on any number of nodes that divides it, or that it divides
    num_canonical_nodes: int | None = None
    predownload: int | None = None  # rows that Streaming fetches ahead of a remote's reader
    cache_limit: str | None = None  # such as 50gb: oldest shards of a remote are dropped beyond it
    download_attempts: int = 3  # at a file of a remote, with growing pauses between them
    download_timeout: float = 60.0  # seconds for a shard to come


@dataclass
class ModelConfig:
    """Sizes of the discriminator; the generator's follow from `generator_size` (paper, table 6 of appendix A)."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_heads: int = MISSING
    embedding_size: int = MISSING
    generator_size: float = MISSING  # generator's width as a fraction of the discriminator's
    generator_layers: int | None = None  # null: as many as the discriminator
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    tie_embeddings: bool = True  # token, position and type embeddings and their LayerNorm shared by both sides
    tie_encoder: bool = False  # the layers too, "all weights" of the paper's section 3.2; needs generator_size 1.0


@dataclass
class ObjectiveConfig:
    """Replaced-token detection, with the switches of its ablations."""

    mask_prob: float = 0.15  # share of the tokens that are masked (0.25 for large)
    mask_style: Literal["electra", "bert"] = "electra"  # 85% [MASK], 15% kept; or 80% [MASK], 10% random, 10% kept
    gen_weight: float = 1.0
    disc_weight: float = 50.0
    sampling: Literal["gumbel", "inverse_cdf"] = "inverse_cdf"  # the same distribution; inverse CDF needs less noise
    temperature: float = 1.0  # the generator's logits are divided by it before sampling
    disallow_correct: bool = False  # never sample the original token
    masked_lm: Literal["auto", "chunked", "triton"] = "auto"  # how loss and sample are computed; auto: triton on CUDA
    mlm_label_smoothing: float = 0.0
    rtd_label_smoothing: float = 0.0


@dataclass
class OptimizerConfig:
    """AdamW as ELECTRA uses it."""

    name: Literal["adamw"] = "adamw"
    lr: float = MISSING
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-6
    weight_decay: float = 0.01  # never applied to LayerNorm and biases
    bias_correction: bool = False
    layerwise_decay: float | None = None  # learning rate multiplier per layer downwards (finetuning)
    layerwise_variant: Literal["google", "paper"] = "google"  # last layer at lr × d² (code) or lr × d (paper's text)


@dataclass
class ScheduleConfig:
    """Learning rate over training, as a multiple of `optimizer.lr`."""

    # electra: linear decay over all steps times min(1, step / warmup); linear: warmup, then linear decay over the rest;
    # one_cycle: cosine up over `warmup`, cosine down over the rest; constant: warmup, flat, linear decay over `decay`
    name: Literal["electra", "linear", "one_cycle", "constant"] = "electra"
    warmup: str = MISSING  # a Composer time: 10000ba, 1ep, 0.1dur
    decay: str = "0.1dur"  # `constant` only: length of the final decay


@dataclass
class FSDPConfig:
    """Fully sharded data parallelism (FSDP2), as Composer's `FSDP2Config` takes it; see docs/distributed.md."""

    data_parallel_replicate_degree: int = 1  # hybrid sharding (HSDP): replicas of the shards, such as one per node
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False  # or trainer.activation_checkpointing, which is the same
    activation_cpu_offload: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"  # full: one checkpoint file that export and GLUE read
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"
    verbose: bool = False


@dataclass
class TrainerConfig:
    """How long, how wide, on what."""

    max_duration: str | None = None  # a Composer time; required for pretraining, null in GLUE: the task's own epochs
    global_train_batch_size: int = MISSING  # rows over all devices and microbatches
    device_train_microbatch_size: Union[int, str, None] = None  # noqa: UP007 (OmegaConf); null: no split; auto (GPU)
    device_eval_batch_size: int = MISSING
    eval_interval: str = "1dur"
    eval_batches: int | None = None  # null: the whole validation set
    device: Literal["cpu", "gpu"] | None = None  # null: a GPU where there is one
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    gradient_clip: float | None = 1.0  # largest global gradient norm; null: no clipping
    # a loss or gradient that is NaN or infinite: end the run, or leave that update out and count it; trouble.py
    on_nonfinite: Literal["stop", "skip"] = "stop"
    compile: Union[bool, str] = False  # noqa: UP007 (OmegaConf); torch.compile; or its mode, such as reduce-overhead
    attention: Literal["auto", "sdpa", "varlen"] = "auto"  # auto: on CUDA the faster of both, measured at start
    fsdp: FSDPConfig | None = None  # {} for its defaults; null: DDP
    activation_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, some 30% more time
    deterministic: bool = False
    progress_bar: bool = True
    log_interval: str = "10ba"  # how often train metrics are computed, and the console logger prints


@dataclass
class CheckpointConfig:
    """What is kept of a run, and where it starts from."""

    folder: str = MISSING  # config.yaml, tokenizer, metrics and checkpoints of the run
    remote: str | None = None  # s3://bucket/folder for copies of them, from which a lost `folder` is filled again
    interval: str | None = None  # a Composer time; null: none but the milestones
    keep: int = 2  # interval checkpoints that stay; -1: all
    milestones: list[float] = field(default_factory=list)  # fractions of training whose checkpoints stay for good
    resume: bool = True  # continue from the newest checkpoint in `folder`, if there is one
    overwrite: bool = False  # start anew in a folder that holds another run, replacing its files
    load_path: str | None = None  # start from this checkpoint's (or this run's folder's newest) weights and state
    load_weights_only: bool = False  # its weights alone: another length of rows, batch size, schedule …


@dataclass
class RunConfig:
    """What every run has, pretraining or finetuning."""

    run_name: str = MISSING
    seed: int = 42
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # name: {argument: value}; names in builders.py
    loggers: dict[str, Any] = field(default_factory=dict)


@dataclass
class PretrainConfig(RunConfig):
    """`electra_composer/pretrain.py`."""

    data: ShardsConfig = field(default_factory=ShardsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


@dataclass
class GlueDataConfig(DataConfig):
    """Where GLUE is, and where its tokens are kept."""

    cache: str | None = None  # folder of tokenized files, found by content; null: tokenized anew at every start


@dataclass
class GlueModelConfig:
    """What is finetuned."""

    # a checkpoint of ours (.pt, sharded, or its run folder), an export, a folder of ElectraForPreTraining or
    # ElectraModel, or a name on the hub
    source: str = MISSING
    random_init: bool = False  # keep the sizes and the tokenizer of `source`, but draw new weights: the baseline
    dropout: float | None = None  # null: what `source` was trained with
    classifier_dropout: float = 0.1


@dataclass
class TaskSettings:
    """What one task does otherwise than the rest; null: as the rest."""

    epochs: int | None = None  # before trainer.max_duration, and before the task's own
    lr: float | None = None
    batch_size: int | None = None  # before trainer.global_train_batch_size
    layerwise_decay: float | None = None  # 1.0: none
    warmup: str | None = None


@dataclass
class PredictConfig:
    """Predictions for the test sets, as the GLUE server takes them."""

    enabled: bool = False  # every run then keeps its logits on the test sets
    select: str = "best"  # of a task's runs: best on dev; the seed of one; or ensemble, the mean of their logits
    file: str = "${checkpoints.folder}/submission.zip"


@dataclass
class GlueConfig(RunConfig):
    """`electra_composer/glue.py`."""

    data: GlueDataConfig = field(default_factory=GlueDataConfig)
    model: GlueModelConfig = field(default_factory=GlueModelConfig)
    tasks: list[str] = MISSING
    seeds: list[int] = MISSING  # one finetuning run per task and seed
    task_settings: dict[str, TaskSettings] = field(default_factory=dict)  # such as {rte: {epochs: 10, lr: 1e-4}}
    regression_targets: Literal["unit", "raw"] = "unit"  # STS-B's 0…5 as 0…1 (google), or as they are (richarddwang)
    # how WNLI is done: classification, as all tasks; coreference: candidates for the pronoun are ranked by the
    # pretrained discriminator with its head (the reference repository's WSC trick)
    wnli: Literal["classification", "coreference"] = "classification"
    double_unordered: bool = True  # MRPC's and STS-B's training pairs are also given swapped (google)
    intermediate: bool = False  # RTE, MRPC and STS-B start from the weights of the MNLI run of the same seed
    max_train_examples: int | None = None  # null: all; else a seeded sample, for quick looks
    predict: PredictConfig = field(default_factory=PredictConfig)
    results: str = "${checkpoints.folder}/results.json"
