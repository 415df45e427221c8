"""Start of pretraining: checks, cheapest first, which read and build what the run needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from composer.core import DataSpec
from composer.utils import dist
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.baselines import loss_without_context
from electra_composer.batches.checks import check_shards, check_split
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.batches.streams import check_streams, describe_streams
from electra_composer.checkpoints.changes import check_changes
from electra_composer.checkpoints.initial import read_initial
from electra_composer.checkpoints.resuming import check_unlocked
from electra_composer.checkpoints.weights import (
    Checkpoint,
    check_state_fits,
    read_checkpoint,
)
from electra_composer.config import ObjectiveConfig, PretrainConfig
from electra_composer.config_loading import to_dict
from electra_composer.errors import UserError
from electra_composer.model.losses import LossTerm
from electra_composer.model.objective_keys import keys_without_meaning
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.model.sizes import check_sizes, count_parameters
from electra_composer.ranges import check_ranges
from electra_composer.signals import unwind
from electra_composer.storage.shard_folder import Meta
from electra_composer.training.builders import build_scheduler
from electra_composer.training.checkpointing import check_run_folder, checkpoint_to_load
from electra_composer.training.devices import resolve_device
from electra_composer.training.model_setup import (
    build_model,
    check_kind,
    choose_kernels,
    count_words,
    load_initial_weights,
    print_once,
)
from electra_composer.training.startup import (
    check_memory,
    check_run_settings,
    check_stoppers,
    check_workers,
    device_batch_size,
    start,
)
from electra_composer.versions import check_versions
from electra_composer.vocabulary import load_tokenizer


@dataclass
class Prepared:
    """A start of a run: its configuration, and what :data:`CHECKS` have read and built.

    Attributes:
        check_only: whether the run does not begin. Nothing is then fetched, moved or written.
        cpu_autocast: see :func:`resolve_device`.
        baseline: see :func:`mlm_baseline`.
    """

    config: PretrainConfig
    check_only: bool
    cpu_autocast: bool = field(init=False)
    meta: Meta = field(init=False)
    tokenizer: PreTrainedTokenizerFast = field(init=False)
    initial: Checkpoint | None = field(init=False)
    model: ElectraPretraining = field(init=False)
    train_data: DataSpec = field(init=False)
    eval_data: DataSpec = field(init=False)
    baseline: float | None = field(init=False)


def duration_of(config: PretrainConfig) -> str:
    """Return `trainer.max_duration`.

    Raises:
        UserError: it is null.
    """
    if config.trainer.max_duration is None:
        raise UserError("trainer.max_duration is null; pretraining needs a duration, such as 1000000ba")
    return config.trainer.max_duration


def check_config(prepared: Prepared) -> None:
    """Check what needs no file and no device: settings that depend on each other."""
    config = prepared.config
    check_run_settings(config, duration_of(config))
    check_workers(config.data.num_workers, dist.get_local_world_size())
    check_sizes(config.model, config.objective, config.data.max_seq_length)
    check_streams(config.data)


def check_device(prepared: Prepared) -> None:
    """Initialise the process group and the seeds; check device, precision, compilers and batch sizes."""
    prepared.cpu_autocast = start(prepared.config)
    check_unlocked(prepared.config.checkpoints.folder)


def read_shards(prepared: Prepared) -> None:
    """Read the metadata of the shards and the tokenizer; check that both splits are complete."""
    data = prepared.config.data
    prepared.meta = read_data(data)
    prepared.tokenizer = load_tokenizer(data.tokenizer or prepared.meta.tokenizer_folder)
    check_shards(prepared.meta, prepared.tokenizer, data.max_seq_length)
    check_split(data, prepared.meta, data.train_split)
    check_split(data, prepared.meta, data.eval_split, evaluation=True)


def read_initial_weights(prepared: Prepared) -> None:
    """Read the checkpoint to start from, and compare its configuration with this one."""
    prepared.initial = read_initial_checkpoint(prepared.config, prepared.check_only)


def check_model(prepared: Prepared) -> None:
    """Build the model, if it fits into memory, and choose its kernels."""
    config = prepared.config
    parameters = count_parameters(config.model, len(prepared.tokenizer), config.objective)
    check_memory(parameters, config.trainer)
    prepared.model = build_model(config, prepared.tokenizer, prepared.cpu_autocast)
    if prepared.initial is None:
        count_words(config, prepared.model, prepared.meta)
    check_stoppers(config.callbacks, prepared.model, ["eval"])
    choose_kernels(config, prepared.model, prepared.meta)
    if prepared.initial is not None:
        check_kind(prepared.initial, config.objective)
        check_state_fits(prepared.initial.state, prepared.model.model.state_dict(), prepared.initial.path)
    else:
        load_initial_weights(config, prepared.model, prepared.tokenizer)
    prepared.initial = None  # free its memory


def open_data(prepared: Prepared) -> None:
    """Open the loaders, and compute what needs rows."""
    unwind()  # loaders have shared memory and threads
    config = prepared.config
    prepared.train_data, prepared.eval_data = build_data(config, prepared.meta, prepared.model)
    build_scheduler(config.schedule, duration_of(config)).check(len(prepared.train_data.dataloader))
    prepared.baseline = mlm_baseline(config, prepared.meta, prepared.model.model.terms)


CHECKS: tuple[tuple[str, Callable[[Prepared], None]], ...] = (
    ("versions", lambda prepared: check_versions()),
    ("ranges", lambda prepared: check_ranges(prepared.config)),
    ("settings", check_config),
    ("run folder", lambda prepared: check_run_folder(prepared.config)),
    ("device", check_device),
    ("shards and tokenizer", read_shards),
    ("checkpoint", read_initial_weights),
    ("model", check_model),
    ("data loaders", open_data),
)
"""Checks of a start, cheapest first. Each may use what those before it have read and built."""


def read_initial_checkpoint(config: PretrainConfig, check_only: bool = False) -> Checkpoint | None:
    """Read the checkpoint to start from, if any, and compare its configuration with this one.

    Args:
        check_only: see :func:`checkpoint_to_load`.

    Raises:
        UserError: it is broken, or a key has changed that must stay (see checkpoints/changes.py).
    """
    path = checkpoint_to_load(config, check_only)
    if path is None:
        return None
    own = os.path.realpath(os.path.dirname(path)) == os.path.realpath(config.checkpoints.folder)
    checkpoint = read_checkpoint(os.path.realpath(path) if own else path)
    if own or not config.checkpoints.load_weights_only:
        changes = check_changes(checkpoint.config, to_dict(config), checkpoint.path, own)
        if changes is not None:
            print_once(changes)
    return checkpoint


def initial_sizes(config: Any) -> dict[str, Any]:
    """Return the sizes that follow from `model.init_from`, by the paths of their keys."""
    initial = read_initial(config.model.init_from, config.model.init_generator_from)
    sizes = {} if initial is None else {f"model.{name}": value for name, value in initial.sizes().items()}
    kind, generator = config.objective.kind, config.objective.generator
    meaningless = keys_without_meaning(ObjectiveConfig(kind=kind, generator=generator))
    return {key: value for key, value in sizes.items() if key not in meaningless}


def build_data(config: PretrainConfig, meta: Meta, model: ElectraPretraining) -> tuple[DataSpec, DataSpec]:
    """Build the training and the evaluation loader."""
    data, seed, rows = config.data, config.seed, device_batch_size(config.trainer)
    pin_memory = resolve_device(config.trainer)[0] == "gpu"
    train_data = build_data_spec(
        data, "train", rows, meta, seed, batch_transforms=model.count_batch, pin_memory=pin_memory
    )
    eval_rows = config.trainer.device_eval_batch_size
    eval_data = build_data_spec(data, "eval", eval_rows, meta, seed, pin_memory=pin_memory)
    streams = describe_streams(data, meta, seed)
    if streams is not None:
        print_once(streams)
    return train_data, eval_data


def mlm_baseline(config: PretrainConfig, meta: Meta, terms: Sequence[LossTerm]) -> float | None:
    """Compute the MLM loss of a network that ignores context; None if the training rows are not on disk yet.

    None, too, for an objective without masked language model.
    """
    if all(term.name != "mlm" for term in terms):
        return None
    loss = loss_without_context(config.data, meta, config.objective)
    if loss is not None:
        print_once(f"MLM loss without context: {loss:.2f} (word frequencies, and copying kept tokens)")
    return loss
