"""Variants of the pretraining-step benchmark behind one interface.

a: the reference; b: ours in a bare loop; c: ours in Composer's `Trainer`; d: c without the optional callbacks.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import reference
import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from torch import Tensor
from workload import Workload

from electra_composer.batches.shards import build_data_spec
from electra_composer.checkpoints.weights import special_ids
from electra_composer.config import PretrainConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.kernels.fused_layers import resolve_layer_kernels, use_layer_kernels
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.builders import build_optimizer
from electra_composer.training.callbacks import TrainMetrics
from electra_composer.training.compilation import compile_config
from electra_composer.training.parallelism import use_flat_parameters
from electra_composer.training.process_memory import (
    M_MMAP_MAX,
    M_MMAP_THRESHOLD,
    M_TOP_PAD,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
    set_malloc,
)
from electra_composer.training.trainer import build_trainer

NAMES = {"a": "reference", "b": "ours", "c": "trainer", "d": "trainer_without_callbacks"}
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Variant(Protocol):
    """One way to run training steps."""

    model: torch.nn.Module

    def block(self, batches: int) -> list[float]:
        """Run `batches` steps and return the `batches - 1` durations between the ends of consecutive steps."""


class StepClock(Callback):
    """Record the time at the end of every step without synchronising.

    On CUDA by events, which measure the device's time including its idle time, so that the host can run ahead as in
    training. It is also a callback, so that the trainer can drive it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def batch_end(self, state: State, logger: Logger) -> None:
        self.tick()

    def seconds(self) -> list[float]:
        """Return the intervals between the ticks since the last call."""
        ticks, self.ticks = self.ticks, []
        if self.device.type != "cuda":
            return [end - begin for begin, end in itertools.pairwise(ticks)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000.0 for begin, end in itertools.pairwise(ticks)]


@dataclass
class Setup:
    """Configuration, data and device shared by all variants.

    Attributes:
        config: configuration of the run.
        workload: shards to train on.
        device: where the steps run.
        cpu_autocast: whether bf16 on the CPU is the model's own autocast (see devices.py).
        attention: attention path of our model, chosen as in `pretrain.py`. The reference's attention is eager.
    """

    config: PretrainConfig
    workload: Workload
    device: torch.device
    cpu_autocast: bool
    attention: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context that Composer or our model would enter for forward and loss."""
        dtype = AUTOCAST.get(self.config.trainer.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def ours(self) -> ElectraPretraining:
        """Build our model on the device, with the same weights at every call."""
        torch.manual_seed(self.config.seed)
        tokenizer = self.workload.tokenizer
        model = ElectraForPretraining(
            self.config.model,
            self.config.objective,
            len(tokenizer),
            special_ids(tokenizer),
            self.config.data.max_seq_length,
        )
        model.attention_path = self.attention
        use_layer_kernels(model, resolve_layer_kernels(self.config.trainer.layer_kernels, self.device.type))
        return ElectraPretraining(model, self.cpu_autocast).to(self.device)

    def build(self, what: str, batches: list[dict[str, Any]]) -> Variant:
        """Build variant `what` of :data:`NAMES` for packed batches on the CPU."""
        if what in "cd":
            return TrainerSteps(self, with_callbacks=what == "c")
        return self._bare(batches) if what == "b" else self._reference(batches)

    def _bare(self, batches: list[dict[str, Any]]) -> Variant:
        model = self.ours()
        optimizer = build_optimizer(self.config.optimizer, model)
        flats = use_flat_parameters(model, optimizer, self.config.trainer.precision).flats
        prepared = [to_device(model.count_batch(batch), self.device) for batch in batches]
        arguments = compile_config(self.config.trainer, static_shapes=True)
        if arguments is not None:  # the reference stays eager
            model.forward = torch.compile(model.forward, **arguments)  # as Composer's Trainer does
        # On the CPU the model enters autocast itself; on CUDA the trainer would.
        context = contextlib.nullcontext if self.cpu_autocast else self.autocast
        return BareSteps(self, model, optimizer, prepared, lambda batch: _our_loss(model, batch), context, flats)

    def _reference(self, batches: list[dict[str, Any]]) -> Variant:
        model = reference.ReferenceElectra(self.ours().model)
        optimizer = reference.build_optimizer(self.config.optimizer, model)
        pad_id = model.special_ids.pad
        prepared = [reference.unpack(to_device(batch, self.device), pad_id) for batch in batches]
        parameters = list(model.parameters())
        return BareSteps(self, model, optimizer, prepared, lambda batch: model(batch).total, self.autocast, parameters)


def _our_loss(model: ElectraPretraining, batch: dict[str, Any]) -> Tensor:
    return model.loss(model(batch), batch)["total"]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class BareSteps:
    """Bare training loop: forward, loss, backward, clipping, optimizer step."""

    def __init__(
        self,
        setup: Setup,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: list[dict[str, Any]],
        loss_of: Callable[[dict[str, Any]], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        parameters: list[Tensor],
    ):
        self.model, self.optimizer, self.batches, self.loss_of = model.train(), optimizer, batches, loss_of
        self.autocast = autocast
        self.clip = setup.config.trainer.gradient_clip
        self.parameters = parameters
        self.clock = StepClock(setup.device)
        # A no-op unless the precision is fp16.
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.config.trainer.precision == "amp_fp16")

    def step(self, batch: dict[str, Any]) -> None:
        with self.autocast():
            loss = self.loss_of(batch)
        self.scaler.scale(loss).backward()
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def block(self, batches: int) -> list[float]:
        for index in range(batches):
            self.step(self.batches[index % len(self.batches)])
            self.clock.tick()
        return self.clock.seconds()


class TrainerSteps:
    """Our model trained as by `pretrain.py`, with loaders, callbacks and loggers, but no checkpoints or progress bar.

    A block is one epoch of the workload, so that every block begins with the start of the loader, which the caller
    leaves out.
    """

    def __init__(self, setup: Setup, with_callbacks: bool):
        config = setup.config if with_callbacks else replace(setup.config, callbacks={})
        meta, trainer = setup.workload.meta, config.trainer
        self.clock = StepClock(setup.device)
        # Built on the same device as the other variants so that its weights are the same.
        self.model = setup.ours()
        train: DataSpec = build_data_spec(
            config.data,
            "train",
            trainer.global_train_batch_size,
            meta,
            config.seed,
            batch_transforms=self.model.count_batch,
            pin_memory=trainer.device == "gpu",
        )
        evaluation = build_data_spec(config.data, "eval", trainer.device_eval_batch_size, meta, config.seed)
        assert trainer.max_duration is not None  # read_config sets it
        self.trainer = build_trainer(
            config,
            self.model,
            train,
            evaluation,
            trainer.max_duration,
            callbacks=[TrainMetrics(trainer.log_interval), self.clock],
        )

    def block(self, batches: int) -> list[float]:
        self.trainer.fit(duration=f"{batches}ba")
        return self.clock.seconds()


def use_allocator_of(what: str) -> None:
    """Set malloc on a CPU: glibc's defaults for the reference, the settings of `pretrain.py` for ours.

    Glibc's thresholds start small and grow with the sizes freed. The reference gets them fully grown, the best that
    the defaults reach, and starts with all free memory returned to the system.
    """
    if what != "a":
        keep_freed_memory()
        return
    grown = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17}
    if set_malloc(grown):
        ctypes.CDLL(None).malloc_trim(0)
