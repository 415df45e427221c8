"""Composer's `Trainer` for a run: its construction, and a subclass without device synchronisation in every step.

A step of a small model on a GPU takes milliseconds, so the host must run one step ahead to keep the device busy.
Composer 0.32 reads back from the device in every batch: the loss three times, the batch size, the time, the counts of
samples and tokens, and whether the loader has ended. Here losses are read only when they are logged, and values that
the host has never go to the device (:class:`~electra_composer.training.devices.RunDeviceGPU`).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from composer import Evaluator, Trainer
from composer.core import Callback, DataSpec, Event, TimeUnit, TrainerMode
from composer.models import ComposerModel
from composer.trainer import trainer as composer_trainer
from composer.utils import dist

from electra_composer.checkpoints.formats import trainer_load_arguments
from electra_composer.checkpoints.remote import RemoteCopy
from electra_composer.config import RunConfig, TrainerConfig
from electra_composer.training.builders import build_callbacks, build_loggers, build_optimizer, build_scheduler
from electra_composer.training.callbacks import BatchSeed
from electra_composer.training.checkpointing import LATEST_OF_RANK_0, checkpoint_savers, load_path
from electra_composer.training.compilation import CompileReport, choose_compile, compile_model
from electra_composer.training.devices import resolve_device, run_device
from electra_composer.training.engine import RunEngine
from electra_composer.training.interrupts import StopOnSignal
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.optim import AdamW
from electra_composer.training.parallelism import (
    RunFSDP2Config,
    can_be_flat,
    fsdp_config,
    use_flat_parameters,
    wrap_activations,
)
from electra_composer.training.startup import microbatch_size
from electra_composer.training.step import TrainStep
from electra_composer.training.step_graph import obstacle_in_config, use_graph
from electra_composer.training.threads import ThreadWatch, watch_threads
from electra_composer.training.times import parse_time


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
    """Build the trainer of a run and load the checkpoint it starts from.

    Args:
        train_data, eval_data: batches of `device_batch_size` and `device_eval_batch_size` rows.
        max_duration: a Composer time.
        callbacks: in addition to those of the configuration.
        static_shapes: whether all batches of a loader have one length.
        copy: of the checkpoints in an object store.

    Raises:
        UserError: a setting that a builder refuses, or a checkpoint that cannot be loaded.
    """
    trainer, folder = config.trainer, config.checkpoints.folder
    device, precision, _ = resolve_device(trainer)
    savers = checkpoint_savers(config, copy)
    stop, report = StopOnSignal(savers[-1] if savers else None), CompileReport(*choose_compile(trainer, static_shapes))
    guard = NumericalGuard(folder, trainer.gradient_clip, trainer.on_nonfinite)
    machine = run_device(device)
    optimizer = build_optimizer(config.optimizer, machine.module_to_device(model))
    sharding = fsdp_config(trainer.fsdp, device)
    sharded = sharding is not None and sharding.state_dict_type == "sharded"
    _prepare(model, trainer, optimizer, sharding, static_shapes)
    schedule, own_callbacks = build_scheduler(config.schedule, max_duration), build_callbacks(config.callbacks)
    latest = os.path.join(folder, LATEST_OF_RANK_0)
    with trainer_load_arguments(config.checkpoints, latest, load_path(config), sharded) as arguments:
        return RunTrainer(
            log_interval=trainer.log_interval,
            cuda_graph=(trainer.cuda_graph, obstacle_in_config(trainer, static_shapes)),
            guard=guard,
            stop=stop,
            report=report,
            threads=watch_threads(trainer, device),
            model=model,
            train_dataloader=train_data,
            eval_dataloader=Evaluator(label="eval", dataloader=eval_data),
            max_duration=max_duration,
            eval_interval=trainer.eval_interval,
            eval_subset_num_batches=batches_to_evaluate(trainer.eval_batches, eval_data),
            optimizers=optimizer,
            callbacks=[BatchSeed(config.seed), schedule, guard, *own_callbacks, *callbacks, *savers, stop],
            loggers=build_loggers(config.loggers, folder, trainer.log_interval, trainer.progress_bar),
            progress_bar=False,  # RunProgressBar is among the loggers
            run_name=config.run_name,
            seed=config.seed,
            device=machine,
            precision=precision,
            device_train_microbatch_size=trainer.device_train_microbatch_size or microbatch_size(trainer),
            parallelism_config={"fsdp": sharding} if sharding is not None else None,
            **arguments,
        )


def batches_to_evaluate(wanted: int | None, data: DataSpec) -> int:
    """Return the number of batches of an evaluation as Composer takes it: -1 for all, and if more are wanted.

    Composer warns of a number above that of the loader.
    """
    loader: Any = data.dataloader
    return -1 if wanted is None or wanted >= len(loader) else wanted


def _prepare(
    model: ComposerModel,
    trainer: TrainerConfig,
    optimizer: AdamW,
    sharding: RunFSDP2Config | None,
    static_shapes: bool,
) -> None:
    """Flatten the parameters, compile, and apply activation checkpointing, each if the configuration asks for it."""
    if can_be_flat(trainer, sharding is not None):
        use_flat_parameters(model, optimizer, trainer.precision)
    compile_model(model, trainer, static_shapes, optimizer.flat)
    wrap_activations(model, trainer)


class RunTrainer(Trainer):
    """Composer's Trainer without device synchronisation in every step.

    Args:
        log_interval: a Composer time. On a GPU, if it is in batches, `loss/train/…` of a batch is read and logged at
            this interval and at the end of training. On a CPU, where reading is free, and with any other unit, of every
            batch.
        guard: gets the losses of every batch, on the device.
        stop: gets the number of ranks that have received a signal, at every batch. Must be among the callbacks too.
        cuda_graph: `trainer.cuda_graph`, and why the configuration does not allow it, for :func:`use_graph`.
        report: a callback that checkpoints have no state of.
        threads: adapts the number of CPU threads. No callback, since old checkpoints lack the state of new callbacks.
        arguments: Composer's.
    """

    # Workaround (composer 0.32): Trainer synchronises with the device in every batch, and these private methods are
    # where: `_use_closures`, `_train_batch`, `_accumulate_time_across_ranks`; goes when Trainer reads losses and counts
    # only to log them.

    def __init__(
        self,
        *,
        log_interval: str = "1ba",
        guard: NumericalGuard | None = None,
        stop: StopOnSignal | None = None,
        cuda_graph: tuple[bool | str, str | None] = (False, None),
        report: Callback | None = None,
        threads: ThreadWatch | None = None,
        **arguments: Any,
    ) -> None:
        self.cuda_graph = cuda_graph
        self.guard = guard
        self.stop = stop
        self.threads = threads
        flat = getattr(arguments.get("optimizers"), "flat", None)
        time = parse_time(log_interval, "trainer.log_interval")
        self.loss_interval = time.value if time.unit == TimeUnit.BATCH else 1
        # Workaround (composer 0.32): the ranks of a node wait for its first rank by a signal file, and the first node's
        # name for it is broadcast to all. Where nodes share the run's folder, the first node to finish removes the file
        # of the others, and they fail. Goes when names differ between nodes.
        shared_name = dist.get_node_signal_file_name

        def name_per_node(*args: Any) -> str:
            return f"{shared_name(*args)}_{dist.get_node_rank()}"

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(dist, "get_node_signal_file_name", name_per_node))
            patches.enter_context(mock.patch.object(composer_trainer, "Engine", RunEngine))
            if flat is not None:
                patches.enter_context(mock.patch.object(composer_trainer, "prepare_ddp_module", lambda model, _: model))
            super().__init__(**arguments)
        if report is not None:
            self.state.callbacks.append(report)  # Composer warns of callbacks that it finds no state of
        self.step = TrainStep(self, flat)

    def fit(self, **arguments: Any) -> None:
        """Same as Trainer.fit, except that resuming a finished run is not an error.

        A scheduler may restart a finished run, or the run was killed between its last checkpoint and its end. The end
        of training is then run: its evaluation, final logs and callbacks.
        """
        line = use_graph(self.step, *self.cuda_graph)
        if line is not None and dist.get_global_rank() == 0:
            print(line, flush=True)
        duration = self.state.max_duration
        if arguments or duration is None or self.state.timestamp.get(duration.unit) < duration:
            super().fit(**arguments)
            return
        if dist.get_global_rank() == 0:
            done = self.state.timestamp.get(duration.unit).to_timestring()
            print(f"this run is complete: {done} are done; set a longer trainer.max_duration to go on", flush=True)
        # Workaround (composer 0.32): `fit` raises if `max_duration` is reached, so the private loop is called, which
        # skips the last evaluation without a previous timestamp; goes when `fit` of a finished run returns.
        self.state.previous_timestamp = self.state.timestamp
        self._train_loop()

    def close(self) -> None:
        """Same as Trainer.close, but a rank that has failed does not wait for the others, which are elsewhere."""
        # Workaround (composer 0.32): `close` ends in a barrier, also of one rank alone; goes when it has none.
        if sys.exc_info()[0] is None:
            super().close()
        else:
            self.engine.close()

    def _use_closures(self) -> bool:
        return False  # a closure returns the loss as a number, which synchronises; our optimizer needs none

    def _train_batch(self, use_grad_scaling: bool) -> None:
        """Train on `state.batch`, and log its losses at the interval; Trainer logs none if it gets None."""
        losses = self.step() if self.step.unserved is None else super()._train_batch(use_grad_scaling)
        if self.threads is not None:
            self.threads.after_batch(self.state.timestamp.batch.value + 1)
        if losses is None:
            return
        if self.guard is not None:
            self.guard.record_losses(losses)
        if self._reads_losses():
            values = torch.stack([loss.detach().reshape(()).float() for loss in losses.values()])
            if dist.get_world_size() > 1:
                dist.all_reduce(values, reduce_operation="SUM")
                values = values / dist.get_world_size()
            self.state.total_loss_dict = dict(zip(losses, values.tolist(), strict=True))
            size = {"trainer/device_train_microbatch_size": self.state.device_train_microbatch_size}
            self.logger.log_metrics({**self.state.total_loss_dict, **size})

    def _reads_losses(self) -> bool:
        if self.state.device.name != "gpu":
            return True
        done = self.state.timestamp.batch.value + 1
        duration = self.state.max_duration
        is_last = duration is not None and duration.unit == TimeUnit.BATCH and done >= duration.value
        return done % self.loss_interval == 0 or is_last

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        """Yield batches; on one rank without asking all ranks whether their loaders have ended."""
        if dist.get_world_size() > 1 or trainer_mode != TrainerMode.TRAIN:
            yield from super()._iter_dataloader(trainer_mode)
            return
        assert self.state.dataloader is not None
        length = self.state.dataloader_len
        batches = itertools.islice(self.state.dataloader, None if length is None else int(length))
        while True:
            self.engine.run_event(Event.BEFORE_DATALOADER)
            try:
                batch = next(batches)
            except StopIteration:
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
                return
            yield batch

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        """Return samples and tokens of all ranks and the time of rank 0, reduced on the hosts with received signals."""
        received = self.stop.received() if self.stop is not None else []
        if dist.get_world_size() == 1:
            if self.stop is not None:
                self.stop.agree(received)
            return int(num_samples), num_tokens, batch_time
        counts = torch.tensor([num_samples, num_tokens, batch_time.total_seconds(), *received], dtype=torch.float64)
        seconds = counts[2:3].clone()
        dist.all_reduce(counts, reduce_operation="SUM")
        dist.broadcast(seconds, src=0)
        counts[2] = seconds
        samples, tokens, time, *received = counts.tolist()
        if self.stop is not None:
            self.stop.agree(received)
        return round(samples), round(tokens), datetime.timedelta(seconds=time)
