"""Start of a run: process group, seed, and checks before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from composer.models import ComposerModel
from composer.utils import dist, reproducibility

from electra_composer.config import RunConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.faults import check_can_write, explain_failures
from electra_composer.training.builders import build_callbacks, build_loggers, build_scheduler
from electra_composer.training.compilation import check_compile
from electra_composer.training.determinism import use_deterministic_kernels
from electra_composer.training.devices import resolve_device, run_device
from electra_composer.training.parallelism import fsdp_config
from electra_composer.training.process_memory import keep_freed_memory
from electra_composer.training.step_graph import check_cuda_graph
from electra_composer.training.threads import choose_threads

Prepared = TypeVar("Prepared")

WORKERS_PER_CORE, MOST_WORKERS = 4, 32
"""Loader workers per core, and on a machine with few cores."""

BYTES_PER_PARAMETER = 16
"""fp32 weights, gradients and the two moments of AdamW."""


def run_checks(checks: Sequence[tuple[str, Callable[[Prepared], None]]], prepared: Prepared) -> str:
    """Run the checks of a start in order, cheapest first; the first that fails ends it.

    Args:
        checks: name and function of each. A function may keep what it reads and builds in `prepared`.

    Returns:
        The names.

    Raises:
        UserError: of a check.
    """
    with explain_failures():
        for _, check in checks:
            check(prepared)
    return ", ".join(name for name, _ in checks)


def check_run_settings(config: RunConfig, max_duration: str) -> None:
    """Check settings that depend on each other, and the arguments of callbacks and loggers, which are then discarded.

    Raises:
        UserError: of a builder; or batch sizes that contradict each other.
    """
    device_batch_size(config.trainer)
    build_scheduler(config.schedule, max_duration)
    build_callbacks(config.callbacks)
    build_loggers(config.loggers, config.checkpoints.folder, config.trainer.log_interval, progress_bar=False)
    for logger, argument in (("metrics_file", "path"), ("tensorboard", "log_dir")):
        path = (config.loggers.get(logger) or {}).get(argument)
        if path is not None:
            check_can_write(f"loggers.{logger}.{argument}", path, is_folder=argument == "log_dir")


def check_workers(num_workers: int | str, ranks: int) -> None:
    """Refuse more loader workers than the machine can start in a few seconds.

    Args:
        num_workers: `data.num_workers`.
        ranks: on this machine.

    Raises:
        UserError: naming data.num_workers.
    """
    cores = os.cpu_count() or 1
    most = max(MOST_WORKERS, cores * WORKERS_PER_CORE) // ranks
    if isinstance(num_workers, int) and num_workers > most:
        raise UserError(
            f"data.num_workers is {num_workers}; expected at most {most} per rank, with {ranks} ranks on the {cores} "
            "cores of this machine"
        )


def check_stoppers(callbacks: dict[str, Any], model: ComposerModel, labels: Sequence[str]) -> None:
    """Refuse callbacks that wait for a metric which the evaluation does not have, and would fail there.

    Args:
        labels: of the evaluations.

    Raises:
        UserError: with the metrics and labels that there are.
    """
    metrics = list(model.get_metrics(is_train=False))
    for name in ("early_stopper", "threshold_stopper"):
        arguments = callbacks.get(name) or {}
        for key, valid in (("monitor", metrics), ("dataloader_label", list(labels))):
            if name in callbacks and arguments.get(key) not in valid:
                raise UserError(f"callbacks.{name}.{key} is {arguments.get(key)!r}; expected one of {', '.join(valid)}")


def check_memory(parameters: int, trainer: TrainerConfig) -> None:
    """Refuse a model whose weights, gradients and moments alone exceed the memory.

    Raises:
        UserError: with both numbers of bytes.
    """
    gpu = resolve_device(trainer)[0] == "gpu"
    memory = torch.cuda.mem_get_info()[1] if gpu else psutil.virtual_memory().total // dist.get_local_world_size()
    needed = parameters * BYTES_PER_PARAMETER // (1 if trainer.fsdp is None else dist.get_world_size())
    if needed > memory:
        raise UserError(
            f"the model has {parameters / 1e9:,.1f} billion parameters, for which training needs at least "
            f"{needed / 1e9:,.0f} GB per rank (weights, gradients, moments), and there are {memory / 1e9:,.0f} GB; "
            "choose smaller sizes under model:, or shard them over more ranks (trainer.fsdp)"
        )


def start(config: RunConfig, ranks_of_machine: int | None = None) -> bool:
    """Initialise the process group and the seeds, choose the number of CPU threads, and check device, precision and
    batch sizes.

    Args:
        ranks_of_machine: processes of the program on this machine, which share its cores; None: those of the launcher.

    Returns:
        Whether the model is to run under bfloat16 autocast on the CPU (see devices.py).

    Raises:
        UserError: a value that is not possible on this machine.
    """
    use_deterministic_kernels(config.trainer)
    device, _, cpu_autocast = resolve_device(config.trainer)
    check_compile(config.trainer)
    check_cuda_graph(config.trainer)
    fsdp_config(config.trainer.fsdp, device)
    if device == "cpu":
        keep_freed_memory()
    dist.initialize_dist(run_device(device), timeout=300.0)
    device_batch_size(config.trainer)
    if device == "cpu":
        choose_threads(config.trainer, ranks_of_machine or dist.get_local_world_size())
    reproducibility.seed_all(config.seed)  # the same on every rank, so that weights are initialised equally
    return cpu_autocast


def device_batch_size(trainer: TrainerConfig) -> int:
    """Return the rows per rank of a global batch.

    Raises:
        UserError: a global batch size that is not a multiple of the number of ranks, or an impossible microbatch.
    """
    total, ranks = trainer.global_train_batch_size, dist.get_world_size()
    microbatch = trainer.device_train_microbatch_size
    if total % ranks:
        raise UserError(
            f"trainer.global_train_batch_size is {total}; expected a multiple of {ranks}, the number of ranks"
        )
    rows = total // ranks
    # Workaround (composer 0.32): automatic microbatching fails an assertion under FSDP2; goes when it is supported.
    if microbatch == "auto" and trainer.fsdp is not None:
        raise UserError(
            "trainer.device_train_microbatch_size is auto, which Composer does not support under FSDP2; set a number, "
            "or null for no split"
        )
    if isinstance(microbatch, int) and microbatch > rows:
        raise UserError(
            f"trainer.device_train_microbatch_size is {microbatch}; expected 1 to {rows}, the rows per rank of "
            f"trainer.global_train_batch_size {total} on {ranks} ranks"
        )
    return rows


def microbatch_size(trainer: TrainerConfig) -> int:
    """Return the rows of a microbatch; for `auto`, the largest possible number."""
    microbatch = trainer.device_train_microbatch_size
    return microbatch if isinstance(microbatch, int) else device_batch_size(trainer)
