"""What a run shows of itself: throughput and MFU, waiting for data, memory.

None of them waits for the device at every batch, as Composer's `SpeedMonitor` does: a GPU that is waited for cannot be
given the next step's work ahead. What has to be read back from it is read back when it is logged.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from composer.callbacks import MemoryMonitor, SpeedMonitor
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, Event, State, Timestamp
from composer.loggers import Logger
from composer.utils import dist

from electra_composer.errors import UserError
from electra_composer.training.callbacks import interval_scheduler


class ThroughputMonitor(SpeedMonitor):
    """Composer's `SpeedMonitor`, every `window_size` batches instead of at every batch.

    Composer's puts the operations of each batch on the device, adds them up over the processes and reads the sum back.
    This one does so once per window, and logs then, under Composer's names:

    - `throughput/tokens_per_sec`: tokens as the loader's `DataSpec` counts them: without padding;
      `throughput/samples_per_sec`: rows; `throughput/batches_per_sec`; each also per device, `throughput/device/…`;
    - `throughput/flops_per_sec`, if the model has `flops_per_batch(batch)`: that of the window's last batch stands for
      each of them, as shapes are static and rows are packed alike;
    - `throughput/device/mfu`: model FLOPs utilization, FLOPs per second and device over what the device can do at most
      on **dense** matrices in the run's precision (with TF32 where fp32 products use it). On a CPU, or a GPU that
      Composer's table lacks, there is none unless `gpu_flops_available` says what the device can do;
    - `time/train`, `time/val`, `time/total`.

    The clock is Composer's, which stands still during evaluations. The first batch, which compiles and warms up, is in
    no window; the end of training closes one that has begun.

    Args:
        window_size: batches in a window.
        gpu_flops_available: operations per second of one device; `None`: Composer's table.
        time_unit: of `time/…`: `seconds`, `minutes`, `hours` or `days`.

    Raises:
        UserError: a window of no batches.
    """

    def __init__(
        self, window_size: int = 100, gpu_flops_available: float | None = None, time_unit: str = "hours"
    ) -> None:
        if window_size < 1:
            raise UserError(f"window_size is {window_size}; expected at least 1 batch")
        super().__init__(window_size, None, time_unit)
        self.gpu_flops_available: float | None = gpu_flops_available
        self.window_size = window_size
        self.start: Timestamp | None = None  # of the window

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None:
            self.gpu_flops_available = device_flops_available(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        self.start = None

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.start is None:
            self.start = state.timestamp
        elif state.timestamp.batch.value - self.start.batch.value >= self.window_size:
            self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.start is not None and state.timestamp.batch > self.start.batch:
            self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        start, now = self.start, state.timestamp
        assert start is not None
        self.start = now
        seconds = (now.total_wct - start.total_wct).total_seconds()
        batches = now.batch.value - start.batch.value
        amounts = {
            "batches": batches,
            "samples": now.sample.value - start.sample.value,
            "tokens": now.token.value - start.token.value,
            "flops": batches * _flops_per_batch(state),
        }
        metrics = {}
        for name, amount in amounts.items():
            if amount:  # a loader that counts no tokens, a model that counts no operations
                metrics[f"throughput/{name}_per_sec"] = amount / seconds
                metrics[f"throughput/device/{name}_per_sec"] = amount / seconds / dist.get_world_size()
        if self.gpu_flops_available and amounts["flops"]:
            metrics["throughput/device/mfu"] = metrics["throughput/device/flops_per_sec"] / self.gpu_flops_available
        train, evaluation = now.total_wct.total_seconds(), self.total_eval_wct
        for name, spent in (("train", train), ("val", evaluation), ("total", train + evaluation)):
            metrics[f"time/{name}"] = spent / self.divider
        logger.log_metrics(metrics)


def _flops_per_batch(state: State) -> float:
    """Of all processes together; 0 if the model does not tell. Waits for the device where there is one."""
    model = getattr(state.model, "module", state.model)  # inside DDP
    if not hasattr(model, "flops_per_batch"):
        return 0.0
    flops = torch.tensor(model.flops_per_batch(state.batch), dtype=torch.float64)
    if dist.get_world_size() > 1:
        flops = state.device.tensor_to_device(flops)
        dist.all_reduce(flops, reduce_operation="SUM")
    return flops.item()


def device_flops_available(state: State) -> float:
    """What the run's device can do at most, dense, in operations per second; 0 where that is not known.

    Composer's table by the GPU's name and the run's precision, with two corrections: a run on the CPU of a machine that
    has a GPU has no peak, and fp32 matrix products that the GPU does in TF32 are measured against TF32's.
    """
    if state.device.name != "gpu":
        return 0.0
    if state.precision.value == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        state = cast(State, SimpleNamespace(precision=SimpleNamespace(value="tf32")))
    return float(get_gpu_flops_available(state))


class RunMemoryMonitor(MemoryMonitor):
    """Memory in gigabytes (10⁹ bytes): of the GPU as Composer's `MemoryMonitor` logs it, and of the process.

    Logged: on a GPU `memory/…` of torch's allocator, such as `memory/peak_allocated_mem`; everywhere
    `memory/peak_resident_mem`, the most main memory that the first process has held so far, without its loader's.
    Composer's reads the allocator's whole state at every batch, and has nothing to say on a CPU.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training logs in any case.
        memory_keys: names in `torch.cuda.memory_stats()` → names to log; `None`: Composer's choice.

    Raises:
        UserError: not a positive Composer time.
    """

    def __init__(self, log_interval: str = "10ba", memory_keys: dict[str, str] | None = None) -> None:
        super().__init__(memory_keys)
        self.is_due = interval_scheduler(log_interval, "log_interval")

    def init(self, state: State, logger: Logger) -> None:
        pass  # Composer's warns that it shows nothing on a CPU; this one does

    def after_train_batch(self, state: State, logger: Logger) -> None:
        pass  # Composer's moment, at every batch

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END):
            self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        super().after_train_batch(state, logger)
        logger.log_metrics({"memory/peak_resident_mem": peak_resident_bytes() / 1e9})


def peak_resident_bytes() -> int:
    """The most main memory that this process has held at one time.

    Linux hands `ru_maxrss` on to a program that a process becomes, so that a child of a large process (a launcher, a
    test runner) reports its parent's peak; the mark in `/proc` is the program's own.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, others kibibytes


class DataWait(Callback):
    """The share of training time that the first process spends waiting for its loader: `data/wait_share`, 0 to 1.

    Taken over the batches since the last log. Near 0 the loader keeps up; else raise `data.num_workers`. The data set's
    `batch_transforms`, such as counting the batch, are part of it.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training logs in any case.

    Raises:
        UserError: not a positive Composer time.
    """

    def __init__(self, log_interval: str = "10ba"):
        self.is_due = interval_scheduler(log_interval, "log_interval")
        self.asked_at = 0.0
        self.waited = 0.0
        self.logged_at: float | None = None  # seconds of training, as Composer counts them: without evaluation

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.logged_at is None:
            self.logged_at = state.timestamp.total_wct.total_seconds()
        self.asked_at = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited += time.perf_counter() - self.asked_at

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END):
            self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        now = state.timestamp.total_wct.total_seconds()
        if self.logged_at is None or now <= self.logged_at:
            return  # nothing trained since
        logger.log_metrics({"data/wait_share": min(1.0, self.waited / (now - self.logged_at))})
        self.logged_at, self.waited = now, 0.0
