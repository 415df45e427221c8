"""A changed value, or several, of every key of the pretraining schema, by what must come of it at the next start."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, get_origin, get_type_hints

from electra_composer.config import PretrainConfig

# Of the run whose keys are changed.
LENGTH = 5  # batches
SETTINGS = [
    f"trainer.max_duration={LENGTH}ba",
    "schedule.warmup=1ba",
    "trainer.eval_interval=1dur",
    "trainer.device_eval_batch_size=32",
    "checkpoints.interval=2ba",
    "checkpoints.milestones=[]",
]

# Key → overrides, each in a start of its own. A value may need other overrides, after a space.
FREE = {
    "run_name": ["other"],
    "report": ["false"],
    "trainer.device_train_microbatch_size": ["4", "8"],
    "trainer.device_eval_batch_size": ["3", "64"],
    "trainer.eval_interval": ["1ba", "1dur"],
    "trainer.device": ["cpu"],
    "trainer.on_nonfinite": ["skip"],
    "trainer.compile": ["true"],
    "trainer.cuda_graph": ["false"],
    "trainer.attention": ["sdpa"],
    "trainer.layer_kernels": ["torch"],
    "trainer.fsdp": ["{}"],
    "trainer.fsdp.data_parallel_replicate_degree": [],  # other values need several ranks
    "trainer.fsdp.reshard_after_forward": ["false"],
    "trainer.fsdp.activation_checkpointing": ["true"],
    "trainer.fsdp.activation_cpu_offload": ["true"],
    "trainer.fsdp.state_dict_type": ["sharded"],
    "trainer.fsdp.verbose": ["true"],
    "trainer.activation_checkpointing": ["true"],
    "trainer.deterministic": ["true"],
    "trainer.progress_bar": ["true"],
    "trainer.log_interval": ["2ba"],
    "checkpoints.folder": [],  # another folder is another run
    "checkpoints.remote": [],  # test_remote.py
    "checkpoints.interval": ["null checkpoints.milestones=[]", "1ba", "1ep"],
    "checkpoints.keep": ["1", "5", "-1"],
    "checkpoints.milestones": ["[0.5,1.0]"],
    "checkpoints.resume": [],  # false is refused in a folder with checkpoints
    "checkpoints.overwrite": [],  # true starts over
    "callbacks": [
        "{}",
        "{lr_monitor: {}, memory_monitor: {}, data_wait: {}}",
        "{early_stopper: {monitor: total_loss, dataloader_label: eval, patience: 3ba}}",
    ],
    "loggers": [
        "{}",
        "{console: {}, tensorboard: {}}",
        "{metrics_file: {format: csv}}",
        "{metrics_file: {interval: 2ba}}",
    ],
    "data.num_workers": ["2", "auto"],
    "data.streams.<name>.remote": [],  # batches/test_remote_shards.py
    "data.remote": [],
    "data.tokenizer": ["SHARDS/tokenizer"],
    "data.predownload": ["64"],
    "data.cache_limit": ["1gb"],
    "data.download_attempts": ["5"],
    "data.download_timeout": ["10.0"],
    "objective.masked_lm": ["chunked"],
    "model.init_positions": ["interpolate"],  # of weights that a resumed run does not read
}
REPORTED = {
    "optimizer.lr": ["1.0e-3"],
    "optimizer.betas": ["[0.8,0.9]"],
    "optimizer.eps": ["1.0e-3"],
    "optimizer.weight_decay": ["0.5"],
    "optimizer.layerwise_variant": ["paper"],
    "schedule.name": ["linear", "one_cycle_fastai", "constant"],
    "schedule.warmup": ["0ba", "0.5dur"],
    "schedule.decay": ["1ba"],
    "trainer.max_duration": ["1ba", "3ba", "9ba", "1ep"],
    "trainer.precision": ["amp_bf16"],
    "trainer.gradient_clip": ["null", "0.1"],
    "trainer.eval_batches": ["1"],
    "trainer.fsdp.mixed_precision": ["PURE"],
    "data.path": ["COPY"],
    "data.epoch_size": ["100", "1000"],
    "data.train_split": [],  # the tiny validation split has too few rows to resume in
    "data.eval_split": ["train"],
    "data.eval_streams": ["[a]"],
    "data.streams.<name>.path": ["COPY"],
    "data.streams.<name>.proportion": ["0.5"],
    "data.streams.<name>.repeat": ["2.0"],
    "data.streams.<name>.choose": ["150"],
    "model.dropout": ["0.0", "0.3"],
    "model.attention_dropout": ["0.0"],
    "objective.mask_prob": ["0.1", "0.25"],
    "objective.mask_draw": ["with_replacement", "bernoulli"],
    "objective.mask_style": ["bert"],
    "objective.gen_weight": ["0.0", "2.0"],
    "objective.disc_weight": ["10.0"],
    "objective.sampling": ["gumbel"],
    "objective.temperature": ["2.0"],
    "objective.disallow_correct": ["true"],
    "objective.mlm_label_smoothing": ["0.1"],
    "objective.rtd_label_smoothing": ["0.1"],
    "objective.rtd_label_smoothing_style": ["symmetric"],
}
REFUSED = {
    "seed": ["2"],
    "optimizer.name": [],  # has one value
    "optimizer.bias_correction": ["true"],
    "optimizer.layerwise_decay": ["0.5"],
    "trainer.global_train_batch_size": ["4", "12", "16"],
    "checkpoints.load_path": ["elsewhere"],
    "checkpoints.load_weights_only": ["true checkpoints.load_path=elsewhere"],
    "model.init_from": ["elsewhere"],
    "model.init_generator_from": ["elsewhere"],
    "data.max_seq_length": ["24"],
    "data.batching_method": ["stratified"],
    "data.shuffle": ["false"],
    "data.num_canonical_nodes": ["1", "2"],
    "model.num_layers": ["2"],
    "model.hidden_size": ["16", "64"],
    "model.num_heads": ["4"],
    "model.embedding_size": ["32"],
    "model.generator_size": ["0.25"],
    "model.generator_layers": ["2"],
    "model.max_positions": ["32", "64"],
    "model.init": ["transformers"],
    "model.initializer_range": ["0.1"],
    "model.layer_norm_eps": ["1.0e-3"],
    "objective.kind": ["mlm", "electra_15"],
    "objective.generator": ["uniform"],
    "model.sharing": ["untied", "gdes"],
    "model.generator_embedding_size": ["16"],
    "model.tie_encoder": ["true"],
}
TABLES = {"free": FREE, "reported": REPORTED, "refused": REFUSED}


def leaf_keys(schema: type = PretrainConfig, prefix: str = "") -> list[str]:
    """All keys of a schema that are no sections; `<name>` stands for a name of the user's choice."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        sections: list[Any] = [each for each in (hint, *getattr(hint, "__args__", ())) if is_dataclass(each)]
        below = f"{prefix}{name}.<name>." if get_origin(hint) is dict else f"{prefix}{name}."
        keys += [key for section in sections for key in leaf_keys(section, below)] or [prefix + name]
    return keys


def overrides_of(key: str, value: str) -> list[str]:
    """The override of a key by a value of the tables, and what it needs."""
    value, *others = value.split(" checkpoints.")
    return [f"{key.replace('<name>', 'a')}={value}", *(f"checkpoints.{other}" for other in others)]


def cases() -> list[tuple[str, str, str]]:
    """Kind, key and value of every row of the tables."""
    return [(kind, key, value) for kind, table in TABLES.items() for key, values in table.items() for value in values]
