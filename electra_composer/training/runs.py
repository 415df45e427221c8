"""What pretraining and finetuning build alike from a :class:`RunConfig`: Composer's `Trainer` and what goes with it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from composer import Evaluator, Trainer
from composer.core import Callback, DataSpec
from composer.models import ComposerModel
from composer.utils import create_interval_scheduler, dist, reproducibility
from torch._dynamo.exc import TorchDynamoException

from electra_composer.checkpoints.forms import loading
from electra_composer.checkpoints.remote import RemoteCopy, fetch_newest
from electra_composer.checkpoints.resuming import repair_latest_link
from electra_composer.checkpoints.saving import AtomicCheckpointSaver, IntervalSaver
from electra_composer.checkpoints.sharded import is_sharded
from electra_composer.config import RunConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.training.builders import build_callbacks, build_loggers, build_optimizer, build_scheduler
from electra_composer.training.callbacks import BatchSeed, milestone_saver
from electra_composer.training.devices import keep_freed_memory, resolve_device
from electra_composer.training.interrupts import StopOnSignal
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.optim import parse_time
from electra_composer.training.parallelism import compile_model, fsdp_config, recompute_activations
from electra_composer.training.trainer import RunTrainer, run_device

LATEST = "latest-rank{rank}.pt"


def start(config: RunConfig) -> bool:
    """Join the processes of the run, seed them, and check what can be checked before anything is built.

    Returns:
        Whether the model is to run under bfloat16 autocast on the CPU (see devices.py).

    Raises:
        UserError: a device, precision, batch size or time that cannot be.
    """
    device, _, cpu_autocast = resolve_device(config.trainer)
    check_compile(config.trainer)
    if device == "cpu":
        keep_freed_memory()
    dist.initialize_dist(run_device(device), timeout=300.0)
    device_batch_size(config.trainer)
    for key, time in (
        ("trainer.max_duration", config.trainer.max_duration),
        ("trainer.eval_interval", config.trainer.eval_interval),
        ("checkpoints.interval", config.checkpoints.interval),
    ):
        if time is not None and parse_time(time, key).value <= 0:
            raise UserError(f"{key}: {time!r}: expected more than nothing, such as 1000ba")
    reproducibility.seed_all(config.seed)  # the same on every process: weights must start equal
    return cpu_autocast


def device_batch_size(trainer: TrainerConfig) -> int:
    """Rows that one process gets of a global batch.

    Raises:
        UserError: a global batch that the processes cannot share evenly, or a microbatch that cannot be.
    """
    total, processes, microbatch = (
        trainer.global_train_batch_size,
        dist.get_world_size(),
        trainer.device_train_microbatch_size,
    )
    if total < 1 or total % processes:
        raise UserError(
            f"trainer.global_train_batch_size is {total}, which {processes} processes cannot share evenly; "
            f"expected a multiple of {processes}"
        )
    rows = total // processes
    if isinstance(microbatch, str) and microbatch != "auto":
        raise UserError(f"trainer.device_train_microbatch_size is {microbatch!r}; expected a number, auto or null")
    if microbatch == "auto" and trainer.fsdp is not None:
        raise UserError(
            "trainer.device_train_microbatch_size is auto, which Composer does not do under FSDP2; give a number, or "
            "null for no split"
        )
    if isinstance(microbatch, int) and not 1 <= microbatch <= rows:
        raise UserError(
            f"trainer.device_train_microbatch_size is {microbatch}; expected 1 to {rows}, the rows that each of "
            f"{processes} processes gets of trainer.global_train_batch_size {total}"
        )
    if trainer.device_eval_batch_size < 1:
        raise UserError(f"trainer.device_eval_batch_size is {trainer.device_eval_batch_size}; expected at least 1")
    return rows


COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile(trainer: TrainerConfig) -> None:
    """Refuse what `torch.compile` does not know, and a CPU without a C++ compiler, before anything is built.

    Raises:
        UserError: naming trainer.compile.
    """
    if isinstance(trainer.compile, str) and trainer.compile not in COMPILE_MODES:
        raise UserError(
            f"trainer.compile is {trainer.compile!r}; expected true, false or one of {', '.join(COMPILE_MODES)}"
        )
    if trainer.compile and resolve_device(trainer)[0] == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise UserError(
                "trainer.compile needs a C++ compiler on a CPU, and there is none; "
                "install g++ or set trainer.compile=false"
            ) from error


@contextlib.contextmanager
def compile_errors_named() -> Iterator[None]:
    """What `torch.compile` raises where it fails, at the first batch or later, as one line with the switch."""
    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"trainer.compile: torch.compile failed: {reason.strip()}; set trainer.compile=false, or another mode"
        ) from error


def microbatch_size(trainer: TrainerConfig) -> int:
    """Rows that the model sees at a time; the largest there may be where Composer is to find the number."""
    microbatch = trainer.device_train_microbatch_size
    return microbatch if isinstance(microbatch, int) else device_batch_size(trainer)


def build_trainer(
    config: RunConfig,
    model: ComposerModel,
    train_data: DataSpec,
    eval_data: DataSpec,
    max_duration: str,
    callbacks: Sequence[Callback] = (),
    static_shapes: bool = True,
    copy: RemoteCopy | None = None,
) -> Trainer:
    """Composer's `Trainer` for one run.

    Args:
        config: the run's configuration.
        model: the wrapped model.
        train_data: batches of `device_batch_size` rows.
        eval_data: batches of `device_eval_batch_size` rows.
        max_duration: a Composer time.
        callbacks: in addition to the configuration's.
        static_shapes: whether all batches of a loader have one length.
        copy: of the checkpoints, in an object store.

    Raises:
        UserError: what the builders find wrong.
    """
    trainer, checkpoints = config.trainer, config.checkpoints
    device, precision, _ = resolve_device(trainer)
    savers = checkpoint_savers(config, copy)
    stop = StopOnSignal(savers[-1] if savers else None)
    microbatch = trainer.device_train_microbatch_size
    guard = NumericalGuard(checkpoints.folder, trainer.gradient_clip, trainer.on_nonfinite)
    optimizer = build_optimizer(config.optimizer, model)
    sharding = fsdp_config(trainer.fsdp, device)
    is_sharded_run = sharding is not None and sharding.state_dict_type == "sharded"
    compile_model(model, trainer, static_shapes)
    if trainer.activation_checkpointing and not (sharding is not None and sharding.activation_checkpointing):
        recompute_activations(model)
    latest = os.path.join(checkpoints.folder, LATEST.format(rank=0))
    with loading(checkpoints, latest, path_to_start_from(config), is_sharded_run) as load_arguments:
        return RunTrainer(
            log_interval=trainer.log_interval,
            guard=guard,
            stop=stop,
            model=model,
            train_dataloader=train_data,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_data),
            max_duration=max_duration,
            eval_interval=trainer.eval_interval,
            eval_subset_num_batches=trainer.eval_batches or -1,
            optimizers=optimizer,
            callbacks=[
                BatchSeed(config.seed),
                build_scheduler(config.schedule, max_duration),
                guard,
                *build_callbacks(config.callbacks),
                *callbacks,
                *savers,
                stop,
            ],
            loggers=build_loggers(config.loggers, checkpoints.folder, trainer.log_interval, trainer.progress_bar),
            progress_bar=False,  # ours is among the loggers
            run_name=config.run_name,
            seed=config.seed,
            device=run_device(device),
            precision=precision,
            device_train_microbatch_size=microbatch_size(trainer) if microbatch is None else microbatch,
            parallelism_config={"fsdp": sharding} if sharding is not None else None,
            deterministic_mode=trainer.deterministic,
            **load_arguments,
            load_strict_model_weights=True,
        )


def checkpoint_savers(config: RunConfig, copy: RemoteCopy | None = None) -> list[AtomicCheckpointSaver]:
    """Savers for milestones (kept for good) and intervals (the newest `keep`); none if the run keeps neither.

    The last one also saves when a signal ends the run. `latest-rank0.pt` points to the newest of either, where a run
    resumes. Files are replaced: a run that is resumed from before a checkpoint writes it again, and
    :func:`check_run_folder` keeps other runs out.
    """
    checkpoints = config.checkpoints
    if checkpoints.keep < 1 and checkpoints.keep != -1:
        raise UserError(f"checkpoints.keep is {checkpoints.keep}; expected at least 1, or -1 for all")
    if not checkpoints.interval and not checkpoints.milestones:
        return []
    common: dict[str, Any] = {
        "latest_filename": LATEST,
        "overwrite": True,
        "replace_run": checkpoints.overwrite,
        "copy": copy,
    }
    savers: list[AtomicCheckpointSaver] = []
    if checkpoints.milestones:
        savers.append(milestone_saver(checkpoints.folder, checkpoints.milestones, **common))
    # The last milestone already stands at the end of training; without it the interval saver saves there.
    final_events: dict[str, Any] = {"final_events": set()} if 1.0 in checkpoints.milestones else {}
    savers.append(
        IntervalSaver(
            checkpoints.folder,
            "batch-",
            save_interval=create_interval_scheduler(checkpoints.interval, **final_events)
            if checkpoints.interval
            else lambda state, event: False,
            num_checkpoints_to_keep=checkpoints.keep,
            **common,
        )
    )
    return savers


def checkpoint_to_load(config: RunConfig) -> str | None:
    """The checkpoint that the trainer will start from: the run's newest, else `checkpoints.load_path`, else none.

    A file, or the folder of a sharded one; to be checked before anything is built. If the copy of the run in an object
    store has a newer one, it is fetched. If the run's newest is broken, the link to it is moved to the one before it
    (see resuming.py).
    """
    checkpoints = config.checkpoints
    latest = os.path.join(checkpoints.folder, LATEST.format(rank=0))
    fetch_newest(checkpoints, config.run_name, LATEST.format(rank=0))
    if checkpoints.resume and not checkpoints.overwrite:
        repair_latest_link(checkpoints.folder, LATEST.format(rank=0))
    if checkpoints.resume and not checkpoints.overwrite and os.path.lexists(latest):
        return latest
    return path_to_start_from(config)


def path_to_start_from(config: RunConfig) -> str | None:
    """`checkpoints.load_path`; where it is the folder of a run, the newest checkpoint in there.

    Raises:
        UserError: a folder that is neither that nor a sharded checkpoint.
    """
    path = config.checkpoints.load_path
    if path is None or not os.path.isdir(path):
        return path
    latest = os.path.join(path, LATEST.format(rank=0))
    if os.path.exists(latest):
        path = os.path.realpath(latest)
    if os.path.isdir(path) and not is_sharded(path):
        raise UserError(
            f"checkpoints.load_path={path}: neither the folder of a run, with its {os.path.basename(latest)}, nor a "
            "sharded checkpoint; give one of them, or a .pt file"
        )
    return path


def check_run_folder(config: RunConfig) -> None:
    """Refuse to start anew in a folder that holds another run's checkpoints, or in an object store.

    Raises:
        UserError: there are checkpoints, and the configuration says neither to continue nor to replace them; no
            folder at all; or copies of checkpoints that are not made.
    """
    checkpoints = config.checkpoints
    if "://" in checkpoints.folder:
        # Nothing can be renamed there, so that nothing would be whole or absent.
        raise UserError(
            f"checkpoints.folder={checkpoints.folder}: checkpoints are written to a folder of this machine, or of a "
            "file system that its nodes share; give one, and the object store as checkpoints.remote, for copies of them"
        )
    if checkpoints.remote is not None and not checkpoints.interval and not checkpoints.milestones:
        raise UserError(
            f"checkpoints.remote={checkpoints.remote}: there will be no checkpoints to copy; set checkpoints.interval, "
            "such as 1000ba, or checkpoints.milestones"
        )
    latest = os.path.join(checkpoints.folder, LATEST.format(rank=0))
    if os.path.lexists(latest) and not checkpoints.resume and not checkpoints.overwrite:
        raise UserError(
            f"{checkpoints.folder} holds the checkpoints of a run; set checkpoints.resume=true to continue it, "
            "checkpoints.overwrite=true to replace it, or another checkpoints.folder"
        )
