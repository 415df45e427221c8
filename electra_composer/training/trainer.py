"""Composer's `Trainer`, without the waits for the device that it has in every step.

A small model's step on a GPU is milliseconds; the host must be a step ahead to keep the device busy. Composer 0.32
reads back from it in every batch: the loss three times, the size of the batch, the time, the counts of samples and
tokens, and whether the loader has ended. Here losses are read when they are logged, and what the host knows anyway
never goes to the device.
"""

from __future__ import annotations

import contextlib
import datetime
import random
from collections.abc import Iterator
from typing import Any

import torch
from composer import Trainer
from composer.core import TimeUnit
from composer.devices import Device, DeviceGPU
from composer.utils import dist, get_device

from electra_composer.training.interrupts import StopOnSignal
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.optim import parse_time


class RunTrainer(Trainer):
    """`composer.Trainer` in everything but the moments at which it waits.

    Args:
        log_interval: a Composer time. On a GPU, if it counts batches, `loss/train/…` is read and logged at these alone,
            and at the end of training: the loss of that batch, as ever. On a CPU, where reading costs nothing, and with
            any other unit, at every batch.
        guard: is told every batch's losses, as they are on the device.
        stop: told at every batch how many processes have received a signal; it must be among the callbacks too.
        arguments: Composer's.
    """

    def __init__(
        self,
        *,
        log_interval: str = "1ba",
        guard: NumericalGuard | None = None,
        stop: StopOnSignal | None = None,
        **arguments: Any,
    ):
        self.guard = guard
        self.stop = stop
        time = parse_time(log_interval, "trainer.log_interval")
        self.loss_interval = time.value if time.unit == TimeUnit.BATCH else 1
        with _signal_files_apart():
            super().__init__(**arguments)

    def fit(self, **arguments: Any) -> None:
        """As Composer's; but a run that is complete is no error.

        It was started again by whoever starts it until it ends well, or was killed between its last checkpoint and its
        end: then the end is what is left to do.
        """
        duration = self.state.max_duration
        if arguments or duration is None or self.state.timestamp.get(duration.unit) < duration:
            super().fit(**arguments)
            return
        if dist.get_global_rank() == 0:
            print(f"this run is complete: {duration} are done; a longer trainer.max_duration continues it", flush=True)
        self.state.previous_timestamp = self.state.timestamp  # or the evaluation at the end is left out
        self._train_loop()

    def _use_closures(self) -> bool:
        # A closure has to return the loss as a number. No optimizer of ours needs one.
        return False

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        losses = super()._train_batch(use_grad_scaling)
        if self.guard is not None and losses is not None:
            self.guard.keep_losses(losses)
        return losses if self._reads_losses() else None  # Composer goes on without losses when it is given none

    def _reads_losses(self) -> bool:
        if self.state.device.name != "gpu":
            return True
        done = self.state.timestamp.batch.value + 1
        duration = self.state.max_duration
        is_last = duration is not None and duration.unit == TimeUnit.BATCH and done >= duration.value
        return done % self.loss_interval == 0 or is_last

    def _accumulate_time_across_ranks(
        self, num_samples: int | float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        """Samples and tokens of all processes, and the first one's time: between the hosts, and signals with them."""
        received = self.stop.received() if self.stop is not None else []
        counts = torch.tensor([num_samples, num_tokens, batch_time.total_seconds(), *received], dtype=torch.float64)
        if dist.get_world_size() > 1:
            seconds = counts[2:3].clone()
            dist.all_reduce(counts, reduce_operation="SUM")
            dist.broadcast(seconds, src=0)
            counts[2] = seconds
        samples, tokens, time, *received = counts.tolist()
        if self.stop is not None:
            self.stop.agree(received)
        return round(samples), round(tokens), datetime.timedelta(seconds=time)


@contextlib.contextmanager
def _signal_files_apart() -> Iterator[None]:
    """Give the files by which a node's processes wait for their first a name for each node.

    Composer means them to have one, and then sends the first node's name to all. Where nodes share the run's folder,
    the first to be done removes the file of the others, and they fail.
    """
    name_for_all = dist.get_node_signal_file_name

    def name_for_node(rng: random.Random | None = None) -> str:
        return f"{name_for_all(rng)}_{dist.get_node_rank()}"

    dist.get_node_signal_file_name = name_for_node
    try:
        yield
    finally:
        dist.get_node_signal_file_name = name_for_all


class RunDeviceGPU(DeviceGPU):
    """Composer's GPU, on which what the host has made for itself stays with the host.

    Composer sends the size of each batch and flags such as "this was the last" to the device, only to read them back.
    The process group has gloo beside NCCL, so that processes can add up such numbers without their devices.
    """

    dist_backend = "cuda:nccl,cpu:gloo"

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """As Composer's; but a number (no dimensions) and a flag (one byte) stay where they are."""
        is_flag = tensor.dtype == torch.uint8 and tensor.numel() == 1
        if tensor.dim() == 0 or is_flag:
            return tensor
        return super().tensor_to_device(tensor)


def run_device(name: str) -> Device:
    """The device of a run: `gpu` or `cpu`. The process group must be made for the same device as the trainer."""
    return RunDeviceGPU() if name == "gpu" else get_device(name)
