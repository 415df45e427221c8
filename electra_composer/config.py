"""Schema of the YAML configuration files, and the reference for every key.

Every valid key is a field of a dataclass below; any other key is an error. :class:`RunConfig` holds the sections shared
by pretraining and finetuning, whose own schemas are in glue_config.py and finetune_config.py. Sizes that follow from
others (generator widths, feed-forward width, number of masked slots) are derived and have no key.
:mod:`electra_composer.config_loading` reads a file into a checked configuration.

A Composer time is a string such as `10000ba` (batches), `1ep` (epochs), `5e9tok` (tokens), `1000sp` (samples) or
`0.1dur` (fraction of training). The range of a number or a time is part of its type (:mod:`electra_composer.ranges`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from omegaconf import MISSING

from electra_composer.ranges import BYTES, DURATION, ROWS, Length, Range, TimeRange

# Types that several keys share. Seeds leave room below 2**32, the limit of NumPy, for ranks and epochs added to them.
Seed = Annotated[int, Range(ge=0, le=2**31 - 1)]
Width = Annotated[int, Range(ge=1, le=65536)]
Layers = Annotated[int, Range(ge=1, le=256)]
BatchSize = Annotated[int, Range(ge=1, le=1_000_000)]
Dropout = Annotated[float, Range(ge=0, le=0.99)]
Smoothing = Annotated[float, Range(ge=0, le=1)]
LossWeight = Annotated[float, Range(ge=0, le=1e6)]
LearningRate = Annotated[float, Range(gt=0, le=10)]
Betas = Annotated[list[Annotated[float, Range(ge=0, lt=1)]], Length(2, 2)]
LayerwiseDecay = Annotated[float, Range(gt=0, le=1, null="none")]
Interval = Annotated[str, TimeRange()]
Phase = Annotated[str, TimeRange(positive=False)]


@dataclass
class DataConfig:
    """Location of the data and settings of the loader."""

    path: str = MISSING  # pretraining: the folder written by convert_owt.py; GLUE: the folder of TSV files, or "hub"
    # tokens per row; in pretraining it must equal the length of the shards
    max_seq_length: Annotated[int, Range(ge=5, le=65535)] = MISSING
    # loader processes per device; 0: load in the training process, between steps; auto: load in a thread of it, or in 2
    # processes if shards are compressed or remote
    num_workers: Annotated[int, Range(ge=0, le=256)] | Literal["auto"] = "auto"


@dataclass
class StreamConfig:
    """One stream of `data.streams`: a folder of shards, and how many of its rows an epoch takes.

    Set at most one of `proportion`, `repeat` and `choose`. With none of them an epoch takes every row once.
    """

    path: str = MISSING  # folder of shards, or the local cache of `remote`
    remote: str | None = None  # URL of the shards, such as s3://bucket/owt
    # weight relative to the other streams; all streams need one, the sum is free
    proportion: Annotated[float, Range(gt=0, le=1e9)] | None = None
    # times each row is taken per epoch: 2 takes each twice, 0.5 takes half of them
    repeat: Annotated[float, Range(gt=0, le=1e6)] | None = None
    choose: Annotated[int, Range(ge=1, le=10**12)] | None = None  # number of rows per epoch


@dataclass
class ShardsConfig(DataConfig):
    """MDS shards read by Streaming."""

    # several folders instead of `path`, by names of your choice: {owt: {path: data/owt, proportion: 0.7}, wikipedia: …}
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    eval_streams: list[str] | None = None  # streams to evaluate on; null: the validation rows of all streams, each once
    # random: rows of any stream in a batch; stratified: the same number of each stream in every batch; per_stream: one
    # stream per batch
    batching_method: Literal["random", "stratified", "per_stream"] = "random"
    # rows per epoch
    epoch_size: Annotated[int | str, Range(ge=1, le=10**12, suffixes=ROWS, example="10m", null="all")] | None = None
    remote: str | None = None  # URL to download the shards from (s3://…); `path` is then the local cache
    tokenizer: str | None = None  # null: the tokenizer saved with the shards; any other must be the one that made them
    train_split: str = "train"  # subfolder to train on
    eval_split: str = "val"  # subfolder to evaluate on
    shuffle: bool = True  # read the training rows in a random order, a new one in each epoch
    # Number of parts that the order of rows is divided into, each read by a group of nodes; null: the number of nodes
    # at the run's first start. The order is the same on any number of nodes that divides it or is a multiple of it.
    num_canonical_nodes: Annotated[int, Range(ge=1, le=65536)] | None = None
    predownload: Annotated[int, Range(ge=0, le=10**9)] | None = None  # rows to fetch ahead; null: Streaming's default
    # such as 50gb; beyond it the least recently used shards of remotes are deleted
    cache_limit: Annotated[str, Range(ge=1, le=2**60, suffixes=BYTES, example="50gb", null="no limit")] | None = None
    download_attempts: Annotated[int, Range(ge=1, le=1000)] = 3  # per file of a remote, with growing pauses
    download_timeout: Annotated[float, Range(gt=0, le=86400)] = 60.0  # seconds to wait for a shard


@dataclass
class ModelConfig:
    """Sizes of the discriminator; the generator's follow from `generator_size` (paper, table 6 of appendix A)."""

    num_layers: Layers = MISSING  # of the discriminator
    hidden_size: Width = MISSING  # of the discriminator; a multiple of `num_heads`
    num_heads: Annotated[int, Range(ge=1, le=1024)] = MISSING  # of attention in the discriminator
    embedding_size: Width = MISSING  # projected to the widths of both models
    generator_size: Annotated[float, Range(gt=0, le=4)] = MISSING  # width of the generator / the discriminator's
    generator_layers: Layers | None = None  # null: as many as the discriminator
    max_positions: Annotated[int, Range(ge=1, le=65535)] = 512  # at least data.max_seq_length
    dropout: Dropout = 0.1  # after embeddings, attention and feed-forward layers
    attention_dropout: Dropout = 0.1  # of attention weights
    # initial weights. google: normal, cut at two standard deviations, but for the projection of the embeddings and the
    # output of the RTD head, which are Glorot-uniform; transformers: normal
    init: Literal["google", "transformers"] = "google"
    initializer_range: Annotated[float, Range(ge=1e-20, le=1)] = 0.02  # standard deviation of the initial weights
    layer_norm_eps: Annotated[float, Range(ge=1e-20, le=1)] = 1e-12  # added to the variance in LayerNorm
    # embeddings of generator and discriminator (docs/recipe.md). tied: one set of tables and one LayerNorm; untied: one
    # set each, the generator's of its own width; gdes: the discriminator's tables are those of the generator, without
    # gradient, plus trained differences (DeBERTaV3)
    sharing: Literal["tied", "untied", "gdes"] = "tied"
    # null: the generator's hidden size if untied, as google-research/electra; otherwise embedding_size, the only value
    generator_embedding_size: Width | None = None
    tie_encoder: bool = False  # share the layers too ("all weights", paper section 3.2); needs generator_size 1.0
    # Networks to continue from (docs/continued_pretraining.md): a checkpoint, an export, a Hugging Face folder or name
    init_from: str | None = None  # null: random weights; otherwise sizes and tying that are not given are its own
    init_generator_from: str | None = None  # null: that of `init_from`; layers: the lower ones of `init_from`; random
    init_positions: Literal["copy", "interpolate"] = "copy"  # how to reach a larger `max_positions` than theirs


@dataclass
class ObjectiveConfig:
    """The pretraining objective and the switches of its ablations (docs/objectives.md)."""

    # electra; mlm: BERT; replace_mlm, all_tokens_mlm and electra_15: between the two (paper, section 3.4); electric:
    # noise-contrastive estimation (Clark et al. 2020)
    kind: Literal["electra", "mlm", "replace_mlm", "all_tokens_mlm", "electra_15", "electric"] = "electra"
    # what fills the masked positions. trained: a masked language model, jointly; frozen: that of `model.init_from`,
    # not trained; uniform, unigram: any token, or by the frequencies in the shards; two_tower: a model that reads
    # from both sides and not the token itself. null: two_tower for electric, otherwise trained
    generator: Literal["trained", "frozen", "uniform", "unigram", "two_tower"] | None = None
    mask_prob: Annotated[float, Range(gt=0, le=1)] = 0.15  # fraction of the tokens that is masked (0.25 for large)
    # with_replacement: as google-research/electra; bernoulli: each token by itself, never [UNK], as electra_pytorch
    mask_draw: Literal["exact", "with_replacement", "bernoulli"] = "exact"
    # electra: 85% [MASK], 15% kept; bert: 80% [MASK], 10% random, 10% kept; null: bert for mlm, otherwise electra
    mask_style: Literal["electra", "bert"] | None = None
    gen_weight: LossWeight = 1.0  # weight of the generator's MLM loss
    disc_weight: LossWeight = 50.0  # weight of the discriminator's RTD loss
    sampling: Literal["gumbel", "inverse_cdf"] = "inverse_cdf"  # the same distribution; inverse_cdf needs less noise
    temperature: Annotated[float, Range(ge=0.01, le=1000)] = 1.0  # divides the generator's logits before sampling
    disallow_correct: bool = False  # never sample the original token
    masked_lm: Literal["auto", "chunked", "triton"] = "auto"  # implementation of loss and sample; auto: triton on CUDA
    mlm_label_smoothing: Smoothing = 0.0  # of the generator's targets, over the vocabulary
    rtd_label_smoothing: Smoothing = 0.0  # of the discriminator's targets
    # one_sided: the target of an original token is the smoothing, that of a replaced one stays 1 (electra_pytorch);
    # symmetric: smoothing / 2 and 1 - smoothing / 2
    rtd_label_smoothing_style: Literal["one_sided", "symmetric"] = "one_sided"

    def resolved(self) -> ObjectiveConfig:
        """Return a copy with the kind's own values for the keys that are null."""
        generator = self.generator or ("two_tower" if self.kind == "electric" else "trained")
        return replace(
            self, generator=generator, mask_style=self.mask_style or ("bert" if self.kind == "mlm" else "electra")
        )


@dataclass
class OptimizerConfig:
    """AdamW as ELECTRA uses it."""

    name: Literal["adamw"] = "adamw"  # the only one
    lr: LearningRate = MISSING  # peak learning rate
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])  # decay of both moving averages
    eps: Annotated[float, Range(ge=1e-20, le=1)] = 1e-6  # added to the root of the second moment
    weight_decay: Annotated[float, Range(ge=0, le=10)] = 0.01  # not applied to LayerNorm and biases
    bias_correction: bool = False  # of both moments, as in Adam; google-research/electra has none
    layerwise_decay: LayerwiseDecay | None = None  # factor d on lr per layer from the top down (finetuning)
    layerwise_variant: Literal["google", "paper"] = "google"  # last layer at lr × d² (the code) or lr × d (the paper)


@dataclass
class ScheduleConfig:
    """Learning rate over training, as a multiple of `optimizer.lr`."""

    # electra: linear decay over all steps × min(1, step / warmup); linear: warmup, then linear decay over the rest;
    # constant: warmup, flat, linear decay over `decay`; one_cycle: torch's, cosine from 1/25 up over `warmup`, cosine
    # down over the rest; one_cycle_fastai: fastai's, which also sets beta1, 0.95–0.85–0.95; adjusted_one_cycle: it from
    # 1e-5 up (electra_pytorch)
    name: Literal["electra", "linear", "one_cycle", "one_cycle_fastai", "adjusted_one_cycle", "constant"] = "electra"
    warmup: Phase = MISSING  # a Composer time
    decay: Phase = "0.1dur"  # length of the final decay of `constant`, a Composer time


@dataclass
class FSDPConfig:
    """Fully sharded data parallelism (FSDP2); see docs/distributed.md."""

    data_parallel_replicate_degree: Annotated[int, Range(ge=1, le=65536)] = 1  # HSDP: replicas, such as one per node
    reshard_after_forward: bool = True  # free the gathered parameters after the forward pass
    activation_checkpointing: bool = False  # the same as trainer.activation_checkpointing
    activation_cpu_offload: bool = False  # keep activations in host memory until the backward pass
    state_dict_type: Literal["full", "sharded"] = "full"  # one checkpoint file, or a folder with one part per rank
    mixed_precision: Literal["DEFAULT", "PURE", "FULL"] = "DEFAULT"  # Composer's presets
    verbose: bool = False  # print the division into shards


@dataclass
class TrainerConfig:
    """Length of training, batch sizes, device, precision and parallelism."""

    # a Composer time; required in pretraining; null in GLUE: each task's own epochs
    max_duration: Annotated[str, DURATION] | None = None
    global_train_batch_size: BatchSize = MISSING  # rows per update over all devices and microbatches
    device_train_microbatch_size: BatchSize | Literal["auto"] | None = None  # null: no split; auto (GPU)
    device_eval_batch_size: BatchSize = MISSING  # rows per device and forward pass in an evaluation
    eval_interval: Interval = "1dur"  # a Composer time
    # batches per evaluation
    eval_batches: Annotated[int, Range(ge=1, le=10**9, null="the complete validation set")] | None = None
    device: Literal["cpu", "gpu"] | None = None  # null: a GPU if there is one
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"  # of matrix products; weights are fp32
    gradient_clip: Annotated[float, Range(gt=0, le=1e6, null="no clipping")] | None = 1.0  # maximum gradient norm
    # on a NaN or infinite loss or gradient: end the run, or skip and count the update (docs/reliability.md)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    # torch.compile: true, false, or its mode; auto: true on a GPU for batches of one length
    compile: bool | Literal["auto", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "auto"
    # auto, true or false: record the training step as one CUDA graph; auto: where that is possible (docs/speed.md)
    cuda_graph: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "sdpa", "varlen", "triton"] = "auto"  # auto: on CUDA the fastest, timed at start
    # LayerNorm, GELU and embeddings by PyTorch or by Triton kernels; auto: triton on CUDA (docs/speed.md)
    layer_kernels: Literal["auto", "torch", "triton"] = "auto"
    fsdp: FSDPConfig | None = None  # {}: FSDP2 with its defaults; null: DDP
    activation_checkpointing: bool = False  # recompute layers in the backward pass: less memory, about 30% slower
    # deterministic kernels only: two runs with one seed are equal to the bit on a GPU too, and slower. Off, the start
    # names the operators that are not deterministic. On a CPU: a number of threads that ignores other processes.
    deterministic: bool = False
    progress_bar: bool = True  # losses, tokens/s and the learning rate in the terminal
    log_interval: Interval = "10ba"  # interval of training metrics, the console logger and the metrics file


@dataclass
class CheckpointConfig:
    """Checkpoints to write, and the checkpoint to start from."""

    folder: str = MISSING  # run folder: config.yaml, tokenizer, metrics and checkpoints
    remote: str | None = None  # URL (s3://bucket/folder) to copy the run folder to; a lost folder is restored from it
    interval: Interval | None = None  # time between checkpoints, a Composer time; null: milestones only
    keep: Annotated[int, Range(ge=1, le=10**9, also=((-1, "all"),))] = 2  # newest interval checkpoints
    milestones: list[Annotated[float, Range(gt=0, le=1)]] = field(default_factory=list)  # fractions of training; kept
    resume: bool = True  # resume from the newest checkpoint in `folder`, if there is one
    overwrite: bool = False  # start from scratch in a folder that holds another run, and replace its files
    load_path: str | None = None  # checkpoint, or run folder (its newest checkpoint), to load weights and state from
    load_weights_only: bool = False  # load only weights: allows another row length, batch size, schedule …


@dataclass
class RunConfig:
    """Sections shared by pretraining and finetuning."""

    run_name: str = MISSING  # name in loggers, and part of the run folder
    seed: Seed = 42  # of initial weights, order of rows, masks, samples and dropout; finetuning has `seeds`
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    # name: {argument: value}; the names and their classes are listed in training/builders.py
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)  # the same

    def resolve(self) -> None:
        """Replace null by the value it stands for, where that depends on other keys."""


@dataclass
class PretrainConfig(RunConfig):
    """Configuration of `electra_composer/pretrain.py`."""

    # write report.html into the run folder at the end, if there is a metrics file (docs/reports.md)
    report: bool = True
    data: ShardsConfig = field(default_factory=ShardsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def resolve(self) -> None:
        """Replace null by the value it stands for, where that depends on other keys."""
        self.objective = self.objective.resolved()
