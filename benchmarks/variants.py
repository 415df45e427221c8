"""What the step benchmark times, each behind the same two calls: build it, run a block of steps.

a: the reference; b: ours, bare; c: ours inside Composer's `Trainer`; d: as c without the optional callbacks.
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
from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.builders import build_optimizer
from electra_composer.training.callbacks import TrainMetrics
from electra_composer.training.compilation import compile_config
from electra_composer.training.devices import (
    M_MMAP_MAX,
    M_MMAP_THRESHOLD,
    M_TOP_PAD,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
    set_malloc,
)
from electra_composer.training.trainer import build_trainer

NAMES = {"a": "reference", "b": "ours", "c": "trainer", "d": "trainer_without_callbacks"}
TOLERANCE = {"fp32": 1e-4, "amp_bf16": 2e-2, "amp_fp16": 2e-2}
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class Variant(Protocol):
    """One way to train."""

    model: torch.nn.Module

    def block(self, batches: int) -> list[float]:
        """Seconds between the ends of consecutive steps, `batches - 1` of them."""


class StepClock(Callback):
    """Takes the time at the end of every step without making it wait.

    On CUDA by events: between two of them lies what the device did and what it waited for; so the host may run ahead,
    as it does in training. It is a callback too, to be ticked by the trainer.
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
        """Of the intervals since the last call."""
        ticks, self.ticks = self.ticks, []
        if self.device.type != "cuda":
            return [end - begin for begin, end in itertools.pairwise(ticks)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000.0 for begin, end in itertools.pairwise(ticks)]


@dataclass
class Setup:
    """What all variants share.

    Attributes:
        config: of the run.
        workload: the shards.
        device: where it runs.
        cpu_autocast: whether bf16 on the CPU is the model's own autocast (see devices.py).
        attention: the path of our attention, as `pretrain.py` chooses it. The reference's is eager, as transformers'.
    """

    config: PretrainConfig
    workload: Workload
    device: torch.device
    cpu_autocast: bool
    attention: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward and loss; to be entered where Composer or our model would."""
        dtype = AUTOCAST.get(self.config.trainer.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def ours(self) -> ElectraPretraining:
        """Our model on the device, the same weights at every call."""
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
        return ElectraPretraining(model, self.cpu_autocast).to(self.device)

    def build(self, what: str, batches: list[dict[str, Any]]) -> Variant:
        """Variant `what` of :data:`NAMES`, for the packed `batches` on the CPU."""
        if what in "cd":
            return TrainerSteps(self, with_callbacks=what == "c")
        return self._bare(batches) if what == "b" else self._reference(batches)

    def _bare(self, batches: list[dict[str, Any]]) -> Variant:
        model = self.ours()
        optimizer = build_optimizer(self.config.optimizer, model)
        prepared = [_to_device(model.count_batch(batch), self.device) for batch in batches]
        arguments = compile_config(self.config.trainer, static_shapes=True)
        if arguments is not None:  # the reference stays eager, as it is used
            model.forward = torch.compile(model.forward, **arguments)  # what Composer's Trainer compiles
        # On the CPU the model enters autocast itself; on CUDA the trainer would.
        context = contextlib.nullcontext if self.cpu_autocast else self.autocast
        return BareSteps(self, model, optimizer, prepared, lambda batch: _our_loss(model, batch), context)

    def _reference(self, batches: list[dict[str, Any]]) -> Variant:
        model = reference.ReferenceElectra(self.ours().model)
        optimizer = reference.build_optimizer(self.config.optimizer, model)
        pad_id = model.special_ids.pad
        prepared = [reference.unpack(_to_device(batch, self.device), pad_id) for batch in batches]
        return BareSteps(self, model, optimizer, prepared, lambda batch: model(batch).total, self.autocast)


def _our_loss(model: ElectraPretraining, batch: dict[str, Any]) -> Tensor:
    return model.loss(model(batch), batch)["total"]


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class BareSteps:
    """Forward, loss, backward, clipping, optimizer: a training loop and nothing around it."""

    def __init__(
        self,
        setup: Setup,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: list[dict[str, Any]],
        loss_of: Callable[[dict[str, Any]], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ):
        self.model, self.optimizer, self.batches, self.loss_of = model.train(), optimizer, batches, loss_of
        self.autocast = autocast
        self.clip = setup.config.trainer.gradient_clip
        self.parameters = list(model.parameters())
        self.clock = StepClock(setup.device)
        # Without fp16 it passes everything through.
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
    """Our model as `pretrain.py` trains it: loaders, callbacks, loggers; but no checkpoints and no progress bar.

    One epoch of the workload is one block, so that every block begins with the loader's start, which the caller drops.
    """

    def __init__(self, setup: Setup, with_callbacks: bool):
        config = setup.config if with_callbacks else replace(setup.config, callbacks={})
        meta, trainer = setup.workload.meta, config.trainer
        self.clock = StepClock(setup.device)
        # The trainer compiles and moves it; it is built on the same device so that its weights are the same.
        self.model = setup.ours()
        train: DataSpec = build_data_spec(
            config.data,
            "train",
            trainer.global_train_batch_size,
            meta,
            config.seed,
            batch_transforms=self.model.count_batch,
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


@dataclass
class Agreement:
    """Mean losses of one batch by both, without dropout, on the same masked tokens and samples."""

    ours: dict[str, float]
    reference: dict[str, float]
    tolerance: float

    @property
    def relative_difference(self) -> float:
        """The largest of the losses'; NaN where one is NaN."""
        return max(
            abs(self.ours[name] - value) / abs(value) if value == value else value
            for name, value in self.reference.items()
        )

    def check(self) -> None:
        """Raises SystemExit, which ends a program with status 1, with both values."""
        if not self.relative_difference <= self.tolerance:  # so that NaN does not pass
            raise SystemExit(
                f"error: the losses do not agree to {self.tolerance}: ours {self.ours}, reference {self.reference}; "
                "a step time means nothing before they do"
            )


def use_allocator_of(what: str) -> None:
    """On a CPU: memory as a loop that somebody wrote has it for the reference, as `pretrain.py` has it for ours.

    Glibc's defaults begin with small thresholds, which grow with what is freed; the reference gets them fully grown,
    which is the best that they become, and starts with all freed memory handed back.
    """
    if what != "a":
        keep_freed_memory()
        return
    grown = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17}
    if set_malloc(grown):
        ctypes.CDLL(None).malloc_trim(0)


@torch.no_grad()
def magnify(model: ElectraForPretraining, factor: float = 4.0) -> None:
    """Weight matrices as large as after some training.

    At the start a discriminator says the same of every token, and its loss is ln 2 whatever it computes.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)


@torch.no_grad()
def agreement(
    setup: Setup, ours: ElectraPretraining, theirs: reference.ReferenceElectra, batch: dict[str, Any]
) -> Agreement:
    """First losses of both on one packed batch: what ours masked and sampled is given to the reference."""
    ours.eval()
    theirs.eval()
    batch = _to_device(ours.count_batch(batch), setup.device)
    model, input_ids = ours.model, batch["input_ids"]
    noise = model.draw_noise(input_ids, torch.Generator(setup.device).manual_seed(setup.config.seed))
    with contextlib.nullcontext() if setup.cpu_autocast else setup.autocast():
        outputs = ours({**batch, "noise": noise})
        losses = ours.loss(outputs, batch)
    positions, weights = outputs["masked_positions"], outputs["masked_weights"]
    originals = input_ids.gather(1, positions)
    _, replace_noise, random_noise, _ = masking.split_noise(noise, model.slots)
    masked = masking.mask_tokens(
        originals,
        weights,
        model.objective.mask_style,
        model.special_ids.mask,
        model.vocab_size,
        replace_noise,
        random_noise,
    )
    targets = torch.where(weights > 0, originals, reference.IGNORED)
    labels = torch.full_like(input_ids, reference.IGNORED).scatter(1, positions, targets)
    unpacking, pad = reference.Unpacking(batch), model.special_ids.pad
    with setup.autocast():
        expected = theirs(
            reference.unpack(batch, pad),
            masked_ids=unpacking(input_ids.scatter(1, positions, masked), pad),
            labels=unpacking(labels, reference.IGNORED),
            corrupted_ids=unpacking(outputs["corrupted_ids"], pad),
        )
    return Agreement(
        {name: losses[name].item() for name in ("mlm", "rtd")},
        {"mlm": expected.mlm.item(), "rtd": expected.rtd.item()},
        TOLERANCE[setup.config.trainer.precision],
    )
