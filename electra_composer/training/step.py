"""One training step of a run that needs nothing of Composer's `Trainer` but its events.

Composer 0.32 copies every microbatch, reduces its size over ranks, adds every loss to a new tensor and reads results
back. :class:`TrainStep` fires the same events in the same order on the same state, and does the rest once per step.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from composer.core import Event, Precision
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor

from electra_composer.model.flat_parameters import FlatParameters

if TYPE_CHECKING:
    from composer import Trainer


class TrainStep:
    """Trains the model of a trainer on `state.batch`.

    Args:
        trainer: after its construction.
        flat: whose gradients are averaged over ranks after the backward; None: the model averages them itself (DDP).
    """

    # Workaround (composer 0.32): the parts of Trainer that the step needs are private: `_train_data_spec`,
    # `_original_model`, `_use_grad_scaling`; goes when Trainer has a public method for one step.

    def __init__(self, trainer: Trainer, flat: FlatParameters | None = None):
        self.trainer = trainer
        self.flat = flat

    @functools.cached_property
    def serves(self) -> bool:
        """Whether this step does what Composer's would do.

        Composer's own step runs with fp16 (its gradient scaler), automatic microbatches, FSDP, training metrics of the
        model, a profiler, and losses that are weighted by tokens.
        """
        state = self.trainer.state
        return not (
            state.auto_microbatching
            or state.precision == Precision.AMP_FP16
            or state.fsdp_enabled
            or state.train_metrics
            or state.profiler is not None
            or self.trainer.accumulate_train_batch_on_tokens
        )

    def __call__(self) -> dict[str, Tensor]:
        """Run forward, backward and update; return the losses of this rank as means over its batch, on the device."""
        state, engine = self.trainer.state, self.trainer.engine
        spec = self.trainer._train_data_spec
        assert spec is not None
        assert state.device_train_microbatch_size is not None
        batch = state.batch
        count = spec.get_num_samples_in_batch(batch)
        is_whole = count <= state.device_train_microbatch_size
        microbatches = [batch] if is_whole else spec.split_batch(batch, state.device_train_microbatch_size)
        engine.run_event(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        rows = [count] if is_whole else [spec.get_num_samples_in_batch(microbatch) for microbatch in microbatches]
        mean_rows = _mean_over_ranks(sum(rows))
        losses: dict[str, Tensor] = {}
        for microbatch, of_rows in zip(microbatches, rows, strict=True):
            state.batch = spec.microbatch_transforms(state.device.batch_to_device(microbatch))
            for name, loss in self._microbatch(of_rows / mean_rows).items():
                losses[name] = losses[name] + loss if name in losses else loss
        state.batch = batch
        self._average_gradients()
        engine.run_event(Event.AFTER_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.step()
        self.trainer.first_train_batch_complete = True
        return {f"loss/train/{name}": loss for name, loss in losses.items()}

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

    def _average_gradients(self) -> None:
        if self.flat is None or dist.get_world_size() == 1:
            return
        for leaf in self.flat.flats:
            if leaf.grad is None:  # a task's batch may not use a part of the model; other ranks' may
                leaf.grad = torch.zeros_like(leaf)
            dist.all_reduce(leaf.grad, reduce_operation="SUM")
            leaf.grad.div_(dist.get_world_size())


def _mean_over_ranks(number: int) -> float:
    if dist.get_world_size() == 1:
        return number
    total = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(total, reduce_operation="SUM")  # on the host
    return total.item() / dist.get_world_size()
