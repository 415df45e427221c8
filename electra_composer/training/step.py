"""One training step of a run that needs nothing of Composer's `Trainer` but its events.

Composer 0.32 copies every microbatch, reduces its size over ranks, adds every loss to a new tensor and reads results
back. :class:`TrainStep` fires the same events in the same order on the same state, and does the rest once per step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from composer.core import Event, Precision
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor

from electra_composer.model.flat_parameters import FlatParameters
from electra_composer.training.optim import AdamW

if TYPE_CHECKING:
    from composer import Trainer


class TrainStep:
    """Trains the model of a trainer on `state.batch`.

    Args:
        trainer: after its construction.
        flat: whose gradients are averaged over ranks after the backward; None: the model averages them itself (DDP).

    Attributes:
        run: takes a batch on the host and the weights of its microbatches, and returns the losses; may be replaced by
            what records the step (step_graph.py). See :meth:`run_kernels`.
    """

    # Workaround (composer 0.32): the parts of Trainer that the step needs are private: `_train_data_spec`,
    # `_original_model`, `_use_grad_scaling`; goes when Trainer has a public method for one step.

    def __init__(self, trainer: Trainer, flat: FlatParameters | None = None):
        self.trainer = trainer
        self.flat = flat
        self.run: Callable[[Any, list[float]], dict[str, Tensor]] = self.run_kernels

    @functools.cached_property
    def unserved(self) -> str | None:
        """Why Composer's own step must run instead of this one, in a few words; None: it need not."""
        state = self.trainer.state
        reasons = {
            "the size of microbatches is found automatically": state.auto_microbatching,
            "the gradients of fp16 are scaled by Composer's step": state.precision == Precision.AMP_FP16,
            "FSDP runs in Composer's step": state.fsdp_enabled,
            "the model has training metrics": bool(state.train_metrics),
            "a profiler is used": state.profiler is not None,
            "losses are weighted by tokens": self.trainer.accumulate_train_batch_on_tokens,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.trainer.state.model.parameters()).device

    @property
    def flats(self) -> list[Tensor]:
        """The flat buffers; empty if the parameters are separate."""
        return self.flat.flats if self.flat is not None else []

    def __call__(self) -> dict[str, Tensor]:
        """Run forward, backward and update; return the losses of this rank as means over its batch, on the device."""
        state = self.trainer.state
        batch = state.batch
        rows = [self._rows(microbatch) for microbatch in self._split(batch)]
        mean_rows = _mean_over_ranks(sum(rows))
        weights = [of_rows / mean_rows for of_rows in rows]
        self.trainer.engine.run_event(Event.BEFORE_TRAIN_BATCH)
        losses = self.run(batch, weights)
        state.batch = batch
        self.trainer.first_train_batch_complete = True
        return {f"loss/train/{name}": loss for name, loss in losses.items()}

    def run_kernels(self, batch: Any, weights: list[float]) -> dict[str, Tensor]:
        """Run the step kernel by kernel, its microbatches moved to the device one by one.

        Args:
            batch: on the host.
            weights: factor of the loss of each microbatch: its rows over those of a rank's batch.
        """
        losses = self.compute(batch, weights)
        self.average_gradients()
        self.load_learning_rates()
        self.update()
        return losses

    def compute(self, batch: Any, weights: list[float]) -> dict[str, Tensor]:
        """Run forward and backward of all microbatches; return their summed losses, on the device."""
        state, spec = self.trainer.state, self.trainer._train_data_spec
        assert spec is not None
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        for microbatch, weight in zip(self._split(batch), weights, strict=True):
            state.batch = spec.microbatch_transforms(state.device.batch_to_device(microbatch))
            for name, loss in self._microbatch(weight).items():
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

    def update(self) -> None:
        """Run what callbacks do with the gradients, such as clipping, and the optimizer."""
        self.trainer.engine.run_event(Event.AFTER_TRAIN_BATCH)
        for optimizer in self.trainer.state.optimizers:
            optimizer.step()

    def average_gradients(self) -> None:
        """Average the gradients of flat buffers over ranks."""
        if self.flat is None or dist.get_world_size() == 1:
            return
        for leaf in self.flat.flats:
            if leaf.grad is None:  # a task's batch may not use a part of the model; other ranks' may
                leaf.grad = torch.zeros_like(leaf)
            dist.all_reduce(leaf.grad, reduce_operation="SUM")
            leaf.grad.div_(dist.get_world_size())

    def load_learning_rates(self) -> None:
        """Copy the learning rates to the device if the optimizer reads them there."""
        for optimizer in self.trainer.state.optimizers:
            if isinstance(optimizer, AdamW):
                optimizer.load_learning_rates()

    def show_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Let the flat buffers and their parameters have these gradients."""
        if self.flat is not None:
            self.flat.show_gradients(gradients)

    def _split(self, batch: Any) -> list[Any]:
        spec, size = self.trainer._train_data_spec, self.trainer.state.device_train_microbatch_size
        assert spec is not None
        assert size is not None
        return [batch] if self._rows(batch) <= size else list(spec.split_batch(batch, size))

    def _rows(self, batch: Any) -> int:
        assert self.trainer._train_data_spec is not None
        return int(self.trainer._train_data_spec.get_num_samples_in_batch(batch))

    def _microbatch(self, weight: float) -> dict[str, Tensor]:
        """Run forward and backward of `state.batch`, whose loss counts with `weight`."""
        state, engine = self.trainer.state, self.trainer.engine
        engine.run_event(Event.BEFORE_FORWARD)
        with get_precision_context(state.precision, state.precision_config):
            state.outputs = state.model(state.batch)
        engine.run_event(Event.AFTER_FORWARD)
        engine.run_event(Event.BEFORE_LOSS)
        with get_precision_context(state.precision, state.precision_config):
            state.loss = self.trainer._original_model.loss(state.outputs, state.batch)
        engine.run_event(Event.AFTER_LOSS)
        engine.run_event(Event.BEFORE_BACKWARD)
        losses = state.loss if isinstance(state.loss, dict) else {"total": state.loss}
        total = losses["total"] if weight == 1.0 else losses["total"] * weight
        total.backward()
        engine.run_event(Event.AFTER_BACKWARD)
        # Copied: a compiled model may overwrite its outputs, and a callback a loss.
        return {name: loss.detach() * weight for name, loss in losses.items()}


def _mean_over_ranks(number: int) -> float:
    if dist.get_world_size() == 1:
        return number
    total = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(total, reduce_operation="SUM")  # on the host
    return total.item() / dist.get_world_size()
