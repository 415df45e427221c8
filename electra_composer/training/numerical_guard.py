"""Skip non-finite updates, detect loss spikes, and record the batches that caused them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors.torch
import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from torch import Tensor
from torch.distributed.tensor import DTensor

from electra_composer.atomic_files import write_file
from electra_composer.errors import UserError
from electra_composer.training.optim import leaves
from electra_composer.training.spikes import SpikeDetector

log = logging.getLogger(__name__)

GPU_INTERVAL = 10  # batches between two checks on a GPU
MAX_RECORDS = 20  # of skipped batches, and of spikes
MAX_SKIPS = 50  # in a row


@dataclass
class PendingBatch:
    """A batch that has not been checked yet. `tensors` are those of the loader, on the host."""

    number: int  # batches done once this one is
    epoch: int
    tensors: dict[str, Tensor]
    learning_rates: list[float] = field(default_factory=list)
    norm: Tensor | None = None  # scalar on the device: global gradient norm before clipping
    loss: Tensor | None = None  # scalar on the device: loss of this rank
    parts: dict[str, Tensor] = field(default_factory=dict)  # its terms, likewise: mlm, rtd

    # Both copy: the next launch of a recorded step writes the tensors again, and Composer reduces losses in place.

    def take_norm(self, norm: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Take the gradient norm, on the device, and the optimizers' learning rates."""
        self.norm = norm.clone()
        self.learning_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def take_losses(self, losses: dict[str, Tensor]) -> None:
        """Take `loss/train/total` and its terms of this rank, on the device."""
        values = torch.stack([loss.detach().reshape(()).float() for loss in losses.values()]).unbind()
        self.parts = {name.removeprefix("loss/train/"): value for name, value in zip(losses, values, strict=True)}
        self.loss = self.parts.pop("total")


class NumericalGuard(Callback):
    """Clips gradients, skips updates that are not finite, and reports them and loss spikes.

    A non-finite update reaches neither the weights nor the optimizer's moments: its flag stays on the device, where
    PyTorch's fused AdamW reads it (`found_inf`, from gradient scaling). A non-finite loss on one rank makes its
    gradients NaN, and with them the global norm, so all ranks decide alike without extra communication. The host checks
    after every batch on a CPU, after every tenth on a GPU, and before a checkpoint is written. It waits for the device
    at these checks only. Each rank writes its records to `trouble/` in the run's folder, see :func:`write_record`, also
    of the first spikes, whose rows may explain them.

    Logs `gradient/norm`, the global norm before clipping, of the last batch of each check.

    Under `amp_fp16` gradients overflow by design and PyTorch's `GradScaler` skips these updates, so only a non-finite
    loss counts.

    Args:
        folder: the run's folder.
        gradient_clip: maximum global gradient norm; None: no clipping. (`GradientClipping` does not return the norm.)
        on_nonfinite: `stop`: apply no further update and end the run with an error. `skip`: skip the update and count
            it in the metric `trouble/skipped_updates`.
        interval: batches between two checks; None: as above.

    Raises:
        UserError: a non-finite loss or gradient, with `stop`; with `skip` after :data:`MAX_SKIPS` in a row.
    """

    def __init__(
        self,
        folder: str,
        gradient_clip: float | None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        interval: int | None = None,
    ) -> None:
        self.folder = os.path.join(folder, "trouble")
        self.gradient_clip = gradient_clip
        self.stops = on_nonfinite == "stop"
        self.interval = interval
        self.skipped = 0
        self.spikes = SpikeDetector()
        self._in_a_row = 0
        self._pending: list[PendingBatch] = []
        self._stopped: Tensor | None = None  # scalar on the device: 1 from the first non-finite update on
        self._take_norm: Callable[[], None]
        self._state: State  # set when training starts
        self._logger: Logger

    def fit_start(self, state: State, logger: Logger) -> None:
        self._state, self._logger = state, logger
        self.interval = self.interval or (GPU_INTERVAL if state.device.name == "gpu" else 1)

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch if isinstance(state.batch, dict) else {}
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self._pending.append(PendingBatch(state.timestamp.batch.value + 1, state.timestamp.epoch.value, tensors))

    def after_loss(self, state: State, logger: Logger) -> None:
        loss = state.loss["total"] if isinstance(state.loss, dict) else state.loss
        if isinstance(loss, Tensor) and loss.requires_grad:
            poison = loss.detach() * 0.0  # NaN if the loss is not finite
            loss.register_hook(lambda gradient: gradient + poison)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        tensors = [tensor for optimizer in state.optimizers for tensor in leaves(optimizer)]
        # Workaround (torch 2.7): with a norm that is a DTensor, as clip_grad_norm_ computes it under FSDP2, clipping
        # reduces it once per parameter; goes when clip_grad_norm_ reduces it once.
        norm = _full(torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors]))
        if self.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(tensors, self.gradient_clip, norm)
        norm, optimizers = norm.detach(), state.optimizers
        self._take_norm = lambda: self._pending[-1].take_norm(norm, optimizers)
        self._take_norm()
        if state.precision == Precision.AMP_FP16:
            return
        found = (~norm.isfinite()).float()
        if self.stops:
            self._stopped = torch.zeros_like(found) if self._stopped is None else self._stopped
            found = torch.maximum(found, self._stopped, out=self._stopped)  # in place, as a recorded step needs
        for optimizer in ensure_tuple(state.optimizers):
            # Workaround (torch 2.7): the attribute by which GradScaler makes a fused optimizer skip a step is not
            # documented; goes when torch.optim documents a way to skip a step by a flag on the device.
            optimizer.found_inf = found

    def after_recording(self) -> Callable[[], None]:
        """See :class:`~electra_composer.training.step_graph.RecordedCallback`."""
        return self._take_norm

    def record_losses(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of the batch from the trainer."""
        self._pending[-1].take_losses(losses)

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self.interval is not None
        if state.timestamp.batch.value % self.interval == 0:
            self.check()

    def fit_end(self, state: State, logger: Logger) -> None:
        self.check()

    def state_dict(self) -> dict[str, Any]:
        self.check()  # all ranks are about to write a checkpoint
        counts = {"skipped": self.skipped, "in_a_row": self._in_a_row, "spikes": vars(self.spikes)}
        # Workaround (torch 2.7): a sharded checkpoint is loaded by the names of its nested values, which must not
        # differ between runs, so this is one JSON string; goes when torch.distributed.checkpoint loads changed keys.
        return {"counts": json.dumps(counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        counts = json.loads(state["counts"])
        self.skipped, self._in_a_row = counts["skipped"], counts["in_a_row"]
        vars(self.spikes).update(counts["spikes"])

    def check(self) -> None:
        """Read losses and norms of the batches since the last check from the device; raise what the class raises.

        Collective: call on all ranks.
        """
        batches = [batch for batch in self._pending if batch.loss is not None and batch.norm is not None]
        if not batches:
            return
        self._pending = []
        is_fp16 = self._state.precision == Precision.AMP_FP16
        losses, norms = _losses_and_norms(batches)
        self._logger.log_metrics({"gradient/norm": norms[-1]})
        for batch, loss, norm in zip(batches, losses, norms, strict=True):
            if math.isfinite(loss) and (is_fp16 or math.isfinite(norm)):
                self._in_a_row = 0
                self._report_spike(batch, loss, norm)
            else:
                self._report_nonfinite(batch, loss, norm)

    def _report_spike(self, batch: PendingBatch, loss: float, norm: float) -> None:
        report = self.spikes.update(batch.number, loss)
        if self.spikes.last == batch.number:
            self._logger.log_metrics({"trouble/loss_spikes": self.spikes.count})
        if report is None:
            return
        if self.spikes.reports <= MAX_RECORDS:
            write_record(self.folder, batch, self._state.model, loss, norm)
            report = f"{report}; its rows, losses and norms are in {self.folder}"
        if dist.get_global_rank() == 0:
            log.warning(report)

    def _report_nonfinite(self, batch: PendingBatch, loss: float, norm: float) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self.stops or self.skipped <= MAX_RECORDS:
            write_record(self.folder, batch, self._state.model, loss, norm)
        what = f"batch {batch.number}: the loss is {loss:g}, the gradient norm {norm:g}"
        if not self.stops:
            self._logger.log_metrics({"trouble/skipped_updates": self.skipped})
        if self.stops or self._in_a_row >= MAX_SKIPS:
            raise _end_of_run(what, self.folder, self.stops)
        if dist.get_global_rank() == 0:
            log.warning("%s; its update was skipped, number %d of this run; see %s", what, self.skipped, self.folder)


def _end_of_run(what: str, folder: str, stops: bool) -> UserError:
    record = f"its rows, learning rates and norms are in {folder}"
    if stops:
        return UserError(
            f"{what}; {record}. No update from this batch on was applied or saved. Check the learning rate, "
            "trainer.gradient_clip, trainer.precision and the rows; or set trainer.on_nonfinite=skip"
        )
    return UserError(
        f"{what}, not finite as in each of the last {MAX_SKIPS} batches; {record}. Check the learning rate, "
        "trainer.precision, and the weights the run started from"
    )


def write_record(folder: str, batch: PendingBatch, model: torch.nn.Module, loss: float, norm: float) -> None:
    """Write the record of a batch on this rank. Ignore a full disk, which would hide the error being reported.

    `ba<batch>-rank<rank>.json` has losses, gradient norm, learning rates, the norm of every parameter and the row
    numbers; `….safetensors` has the batch.

    Args:
        folder: created if missing.
        batch: with the loss of this rank.
        model: for the norms of its parameters. Collective under FSDP2.
        loss: mean over ranks.
        norm: global gradient norm.
    """
    assert batch.loss is not None
    record = {
        "batch": batch.number,
        "epoch": batch.epoch,
        "rows": batch.tensors["rows"].tolist() if "rows" in batch.tensors else None,
        "loss": _json_number(loss),
        "loss_of_this_process": _json_number(float(batch.loss)),
        "parts_of_this_loss": {name: _json_number(float(part)) for name, part in batch.parts.items()},
        "gradient_norm": _json_number(norm),
        "learning_rates": batch.learning_rates,
        "parameter_norms": {
            name: _json_number(float(_full(torch.linalg.vector_norm(parameter.detach()))))
            for name, parameter in model.named_parameters()
        },
    }
    path = os.path.join(folder, f"ba{batch.number}-rank{dist.get_global_rank()}")
    with contextlib.suppress(OSError):
        write_file(f"{path}.json", json.dumps(record, indent=1, allow_nan=False))
        tensors = {name: t.cpu().contiguous().clone() for name, t in batch.tensors.items()}
        write_file(f"{path}.safetensors", safetensors.torch.save(tensors))


def _losses_and_norms(batches: list[PendingBatch]) -> list[list[float]]:
    """Read losses and gradient norms from the device, as means over ranks."""
    scalars = [batch.loss for batch in batches] + [batch.norm for batch in batches]
    values = torch.stack([scalar.reshape(()).float() for scalar in scalars])  # type: ignore[union-attr]
    if dist.get_world_size() > 1:
        dist.all_reduce(values, reduce_operation="SUM")
        values = values / dist.get_world_size()
    return values.view(2, len(batches)).tolist()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _json_number(number: float) -> float | str:
    """Return `nan`, `inf` and `-inf` as text, since JSON has no such numbers."""
    return number if math.isfinite(number) else str(number)
