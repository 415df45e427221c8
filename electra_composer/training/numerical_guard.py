"""Losses and gradients that are not finite, and losses that jump: no harm done, and what led to them is kept."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from electra_composer.errors import UserError

log = logging.getLogger(__name__)

GPU_INTERVAL = 10  # batches between two looks at what the device has found
MOST_RECORDS = 20  # of skipped batches
MOST_SKIPS = 50  # in a row


@dataclass
class _Batch:
    """What is kept of a batch until it has been looked at. Its tensors are those of the loader, on the host."""

    number: int  # batches done, once this one is
    epoch: int
    tensors: dict[str, Tensor]
    learning_rates: list[float] = field(default_factory=list)
    norm: Tensor | None = None  # of the gradients, before clipping; a number on the device
    loss: Tensor | None = None  # of this process; likewise


class NumericalGuard(Callback):
    """Clips gradients, keeps what is not finite from the weights, and reports it; also losses that jump.

    An update whose gradient norm or loss is not finite never reaches the weights or the optimizer's moments: the flag
    that says so stays on the device, where PyTorch's fused AdamW reads it (`found_inf`, of its gradient scaling). A
    loss that is not finite on one process makes its gradients NaN, and so the norm of all: all processes decide alike,
    with no message of their own. The host looks after every batch on a CPU, after each tenth on a GPU, and before a
    checkpoint is written; it waits for the device then, and never else.

    What is found goes to `trouble/` in the run's folder, from each process: `ba<batch>-rank<rank>.json` has loss,
    gradient norm, learning rates, the norm of every parameter and the numbers of the rows, `….safetensors` the batch.

    Under `amp_fp16` gradients overflow by design, and PyTorch's `GradScaler` skips these updates; there only a loss
    that is not finite counts.

    Args:
        folder: the run's.
        gradient_clip: largest global norm of the gradients; None: no clipping. (Composer's `GradientClipping` does not
            tell the norm, and under FSDP2 sums it up anew for every parameter.)
        on_nonfinite: `stop`: no update is applied from then on, and the run ends by an error. `skip`: the update is
            left out and counted, in the metric `trouble/skipped_updates`.
        interval: batches between two looks; None: as said above.

    Raises:
        UserError: at a loss or gradient that is not finite, with `stop`; with `skip` after :data:`MOST_SKIPS` in a row.
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
        self.spikes = SpikeWatch()
        self._in_a_row = 0
        self._pending: list[_Batch] = []
        self._stopped: Tensor | None = None  # 1 from the first trouble on
        self._state: State | None = None
        self._logger: Logger | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        self._state, self._logger = state, logger
        if self.interval is None:
            self.interval = GPU_INTERVAL if state.device.name == "gpu" else 1

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch if isinstance(state.batch, dict) else {}
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self._pending.append(_Batch(state.timestamp.batch.value + 1, state.timestamp.epoch.value, tensors))

    def after_loss(self, state: State, logger: Logger) -> None:
        loss = state.loss["total"] if isinstance(state.loss, dict) else state.loss
        if isinstance(loss, Tensor) and loss.requires_grad:
            poison = loss.detach() * 0.0  # NaN where the loss is not finite
            loss.register_hook(lambda gradient: gradient + poison)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.gradient_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip, norm)
        batch = self._pending[-1]
        batch.norm = norm.detach()
        batch.learning_rates = [group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups]
        if state.precision == Precision.AMP_FP16:
            return
        found = (~norm.isfinite()).float()
        if self.stops:
            found = self._stopped = found if self._stopped is None else torch.maximum(found, self._stopped)
        for optimizer in ensure_tuple(state.optimizers):
            optimizer.found_inf = found

    def keep_losses(self, losses: dict[str, Tensor]) -> None:
        """The trainer tells here what a batch's loss was: `loss/train/total`, of this process, on the device."""
        self._pending[-1].loss = losses["loss/train/total"].detach().clone()  # Composer adds up over processes in place

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self.interval is not None
        if state.timestamp.batch.value % self.interval == 0:
            self.look()

    def fit_end(self, state: State, logger: Logger) -> None:
        self.look()

    def state_dict(self) -> dict[str, Any]:
        self.look()  # a checkpoint is about to be written, on all processes
        counts = {"skipped": self.skipped, "in_a_row": self._in_a_row, "spikes": vars(self.spikes)}
        return {"counts": json.dumps(counts)}  # one value, that a sharded checkpoint does not take apart

    def load_state_dict(self, state: dict[str, Any]) -> None:
        counts = json.loads(state["counts"])
        self.skipped, self._in_a_row = counts["skipped"], counts["in_a_row"]
        vars(self.spikes).update(counts["spikes"])

    def look(self) -> None:
        """Read what the device has found of the batches since the last look; on all processes.

        Raises:
            UserError: see the class.
        """
        batches = [batch for batch in self._pending if batch.loss is not None and batch.norm is not None]
        if not batches:
            return
        self._pending = []
        assert self._state is not None
        is_fp16 = self._state.precision == Precision.AMP_FP16
        losses = torch.stack([batch.loss.reshape(()).float() for batch in batches])  # type: ignore[union-attr]
        norms = torch.stack([batch.norm.reshape(()).float() for batch in batches])  # type: ignore[union-attr]
        values = torch.stack([losses / dist.get_world_size(), norms / dist.get_world_size()])
        dist.all_reduce(values, reduce_operation="SUM")
        for batch, loss, norm in zip(batches, *values.tolist(), strict=True):
            if math.isfinite(loss) and (is_fp16 or math.isfinite(norm)):
                self._in_a_row = 0
                self._report_spike(batch, loss)
            else:
                self._act(batch, loss, norm)

    def _report_spike(self, batch: _Batch, loss: float) -> None:
        message = self.spikes.see(batch.number, loss)
        if self._logger is not None and self.spikes.last == batch.number:
            self._logger.log_metrics({"trouble/loss_spikes": self.spikes.count})
        if message is not None and dist.get_global_rank() == 0:
            log.warning(message)

    def _act(self, batch: _Batch, loss: float, norm: float) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self.stops or self.skipped <= MOST_RECORDS:
            self._record(batch, loss, norm)
        what = f"batch {batch.number}: the loss is {loss:g}, the norm of the gradients {norm:g}"
        kept = f"the batch's rows, learning rate and norms are in {self.folder}"
        if self.stops:
            raise UserError(
                f"{what}; {kept}. No update was applied from this batch on, and the checkpoints are from before it. "
                "Look at: the learning rate, trainer.gradient_clip, trainer.precision, and the rows; or leave such "
                "updates out and go on: trainer.on_nonfinite=skip"
            )
        assert self._logger is not None
        self._logger.log_metrics({"trouble/skipped_updates": self.skipped})
        if self._in_a_row >= MOST_SKIPS:
            raise UserError(
                f"{what}, and so it was in each of the last {MOST_SKIPS} batches: nothing is learnt any more; {kept}. "
                "Look at: the learning rate, trainer.precision, and the weights the run started from"
            )
        if dist.get_global_rank() == 0:
            log.warning("%s; its update was skipped, the %d. of this run; %s", what, self.skipped, kept)

    def _record(self, batch: _Batch, loss: float, norm: float) -> None:
        """Write down a batch; every process its own. A disk that is full does not hide what happened."""
        assert self._state is not None
        assert batch.loss is not None
        norms = {}
        for name, parameter in self._state.model.named_parameters():
            size = torch.linalg.vector_norm(parameter.detach())
            norms[name] = _plain(float(size.full_tensor() if isinstance(size, DTensor) else size))
        rank = dist.get_global_rank()
        record = {
            "batch": batch.number,
            "epoch": batch.epoch,
            "rows": batch.tensors["rows"].tolist() if "rows" in batch.tensors else None,
            "loss": _plain(loss),
            "loss_of_this_process": _plain(float(batch.loss)),
            "gradient_norm": _plain(norm),
            "learning_rates": batch.learning_rates,
            "parameter_norms": norms,
        }
        path = os.path.join(self.folder, f"ba{batch.number}-rank{rank}")
        with contextlib.suppress(OSError):
            os.makedirs(self.folder, exist_ok=True)
            with open(f"{path}.json", "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1, allow_nan=False)
            save_file({name: t.cpu().contiguous().clone() for name, t in batch.tensors.items()}, f"{path}.safetensors")


def _plain(number: float) -> float | str:
    """JSON has no word for what is not finite: `nan`, `inf`, `-inf` become text."""
    return number if math.isfinite(number) else str(number)


class SpikeWatch:
    """Tells a loss that jumps from one that falls or is noisy: above the running mean by six standard deviations.

    Both are exponential means over some fifty batches. A spike itself counts as if it had been at the limit.

    Args:
        sigmas: how far above the mean a spike begins.
        share: of the batches, by which the running means move at each.
        patience: batches before the first, and between two, lines.

    Attributes:
        count: spikes so far.
        last: batch of the latest; 0: none.
    """

    def __init__(self, sigmas: float = 6.0, share: float = 0.02, patience: int = 100) -> None:
        self.sigmas, self.share, self.patience = sigmas, share, patience
        self.count = self.last = 0
        self._seen = self._reported = self._said = 0
        self._mean = self._variance = 0.0

    def see(self, batch: int, loss: float) -> str | None:
        """Take the loss of a batch; a line about it, if it is a spike and the last line is long enough ago."""
        self._seen += 1
        share = max(self.share, 1 / self._seen)  # the plain mean at first
        sigma = math.sqrt(self._variance)
        limit = self._mean + self.sigmas * max(sigma, 0.005 * abs(self._mean))
        is_spike = self._seen > self.patience and loss > limit
        line = None
        if is_spike:
            self.count += 1
            self.last = batch
            if self._reported == 0 or batch - self._reported >= self.patience:
                more = self.count - self._said - 1
                line = (
                    f"batch {batch}: the loss is {loss:.4g}; its running mean is {self._mean:.4g}, sigma {sigma:.2g}"
                    + (f" ({more} more such batches since the last of these lines)" if more else "")
                )
                self._reported, self._said = batch, self.count
        step = (min(loss, limit) if is_spike else loss) - self._mean
        self._mean += share * step
        self._variance = (1 - share) * (self._variance + share * step * step)
        return line
