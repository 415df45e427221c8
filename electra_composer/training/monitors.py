"""Monitors of a run: throughput and MFU, memory, and time spent waiting for data.

None of them synchronises with the device in every batch, as Composer's `SpeedMonitor` does, so that the host can run
ahead. Values are read back from the device when they are logged.
"""

from __future__ import annotations

import time

import torch
from composer.callbacks import MemoryMonitor, RuntimeEstimator, SpeedMonitor, SystemMetricsMonitor
from composer.core import Callback, Event, State, Timestamp
from composer.loggers import Logger
from composer.utils import MissingConditionalImportError, dist

from electra_composer.errors import UserError
from electra_composer.training.gpus import peak_flops
from electra_composer.training.process_memory import peak_resident_bytes
from electra_composer.training.times import IntervalCallback, interval_scheduler


class ThroughputMonitor(SpeedMonitor):
    """SpeedMonitor that measures and logs once per window of batches.

    Logs under Composer's names:

    - `throughput/tokens_per_sec`: tokens as counted by the loader's `DataSpec`, without padding;
      `throughput/samples_per_sec`: rows; `throughput/batches_per_sec`; each also per device, `throughput/device/…`;
    - `throughput/flops_per_sec`, if the model has `flops_per_batch(batch)`: every batch counts as the last one of the
      window, since shapes are static and rows are packed alike;
    - `throughput/device/mfu`: model FLOPs utilization, FLOPs per second and device divided by the peak of the device
      for **dense** matrices in the run's precision (TF32 if fp32 products use it). Not logged on a CPU or a GPU whose
      peak is not known (gpus.py), unless `gpu_flops_available` is given;
    - `time/train`, `time/val`, `time/total`.

    The clock is Composer's, which is stopped during evaluations. The first batch, which compiles and warms up, is in no
    window. The end of training closes an incomplete window.

    Args:
        window_size: batches per window.
        gpu_flops_available: peak FLOPs per second of one device; None: from gpus.py.
        time_unit: of `time/…`: `seconds`, `minutes`, `hours` or `days`.
    """

    # Workaround (composer 0.32): SpeedMonitor copies the FLOPs of every batch to the device, reduces them over ranks
    # and reads them back; goes when it does so once per window.

    def __init__(
        self, window_size: int = 100, gpu_flops_available: float | None = None, time_unit: str = "hours"
    ) -> None:
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
            if amount:  # 0: the loader does not count tokens, or the model does not count FLOPs
                metrics[f"throughput/{name}_per_sec"] = amount / seconds
                metrics[f"throughput/device/{name}_per_sec"] = amount / seconds / dist.get_world_size()
        if self.gpu_flops_available and amounts["flops"]:
            metrics["throughput/device/mfu"] = metrics["throughput/device/flops_per_sec"] / self.gpu_flops_available
        train, evaluation = now.total_wct.total_seconds(), self.total_eval_wct
        for name, spent in (("train", train), ("val", evaluation), ("total", train + evaluation)):
            metrics[f"time/{name}"] = spent / self.divider
        logger.log_metrics(metrics)


def _flops_per_batch(state: State) -> float:
    """Return the FLOPs of the current batch on all ranks, 0 if the model does not count them. Synchronises a GPU."""
    model = getattr(state.model, "module", state.model)  # inside of DDP
    if not hasattr(model, "flops_per_batch"):
        return 0.0
    flops = torch.tensor(model.flops_per_batch(state.batch), dtype=torch.float64)
    if dist.get_world_size() > 1:
        flops = state.device.tensor_to_device(flops)
        dist.all_reduce(flops, reduce_operation="SUM")
    return flops.item()


def device_flops_available(state: State) -> float:
    """Return the peak of the run's device for dense matrices, in FLOPs per second; 0 if unknown or on a CPU."""
    return peak_flops(state.precision.value) if state.device.name == "gpu" else 0.0


class RunRuntimeEstimator(RuntimeEstimator):
    """RuntimeEstimator that estimates the remaining time at an interval; logs `time/remaining_estimate`.

    Args:
        skip_batches: first batches that are not timed.
        time_unit: `seconds`, `minutes`, `hours` or `days`.
        log_interval: a Composer time such as `10ba`.

    Raises:
        UserError: not a positive Composer time.
    """

    def __init__(self, skip_batches: int = 1, time_unit: str = "hours", log_interval: str = "10ba") -> None:
        super().__init__(skip_batches, time_unit)
        self.is_due = interval_scheduler(log_interval, "log_interval")

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.start_time is None:
            super().batch_start(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.batches_left_to_skip > 0 or self.is_due(state, Event.BATCH_END):
            super().batch_end(state, logger)


class RunMemoryMonitor(IntervalCallback, MemoryMonitor):
    """MemoryMonitor that logs at an interval, and also the memory of the process, in gigabytes (10⁹ bytes).

    Logs on a GPU `memory/…` of torch's allocator, such as `memory/peak_allocated_mem`; everywhere
    `memory/peak_resident_mem`, the peak main memory of rank 0 without its loader workers.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training also logs.
        memory_keys: names in `torch.cuda.memory_stats()` → names to log; None: Composer's selection.

    Raises:
        UserError: not a positive Composer time.
    """

    # Workaround (composer 0.32): MemoryMonitor reads the statistics of the allocator in every batch, and logs nothing
    # but a warning on a CPU; goes when it has an interval.

    def __init__(self, log_interval: str = "10ba", memory_keys: dict[str, str] | None = None) -> None:
        IntervalCallback.__init__(self, log_interval)
        MemoryMonitor.__init__(self, memory_keys)

    def init(self, state: State, logger: Logger) -> None:
        pass  # MemoryMonitor warns here

    def after_train_batch(self, state: State, logger: Logger) -> None:
        pass  # MemoryMonitor logs here

    def log(self, state: State, logger: Logger) -> None:
        MemoryMonitor.after_train_batch(self, state, logger)
        logger.log_metrics({"memory/peak_resident_mem": peak_resident_bytes() / 1e9})


class RunSystemMetricsMonitor(IntervalCallback, SystemMetricsMonitor):
    """SystemMetricsMonitor that logs at an interval, and metrics of GPUs only if the run uses them.

    Args:
        log_all_data: log the GPU metrics of all ranks instead of the smallest and the largest.
        log_interval: a Composer time such as `10ba`; the end of training also logs.

    Raises:
        UserError: not a positive Composer time; on a GPU, pynvml is not installed.
    """

    # Workaround (composer 0.32): SystemMetricsMonitor gathers an object from all ranks in every batch, which waits for
    # a GPU, and asks whether the machine has a GPU, not whether the run uses it; goes when it has an interval and reads
    # the run's device.

    run_event = Callback.run_event  # SystemMetricsMonitor logs there

    def __init__(self, log_all_data: bool = False, log_interval: str = "10ba") -> None:
        IntervalCallback.__init__(self, log_interval)
        self.log_all_data = log_all_data
        self.gpu_available = False

    def init(self, state: State, logger: Logger) -> None:
        if state.device.name != "gpu":
            return
        try:
            SystemMetricsMonitor.__init__(self, self.log_all_data)
        except MissingConditionalImportError as error:
            raise UserError(
                "callbacks.system_metrics_monitor: a package it needs is not installed; pip install nvidia-ml-py"
            ) from error

    def log(self, state: State, logger: Logger) -> None:
        SystemMetricsMonitor.run_event(self, Event.BATCH_START, state, logger)


class DataWait(IntervalCallback):
    """Logs `data/wait_share`, the fraction of training time that rank 0 waits for its loader since the last log.

    Near 0 the loader keeps up; else raise `data.num_workers`. The `batch_transforms` of the data set, such as counting
    the batch, are included.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training also logs.

    Raises:
        UserError: not a positive Composer time.
    """

    def __init__(self, log_interval: str = "10ba") -> None:
        super().__init__(log_interval)
        self.asked_at = 0.0
        self.waited = 0.0
        self.logged_at: float | None = None  # seconds of training on Composer's clock, without evaluations

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self.logged_at is None:
            self.logged_at = state.timestamp.total_wct.total_seconds()
        self.asked_at = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited += time.perf_counter() - self.asked_at

    def log(self, state: State, logger: Logger) -> None:
        now = state.timestamp.total_wct.total_seconds()
        if self.logged_at is None or now <= self.logged_at:
            return  # no training since the last log
        logger.log_metrics({"data/wait_share": min(1.0, self.waited / (now - self.logged_at))})
        self.logged_at, self.waited = now, 0.0
