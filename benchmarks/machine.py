"""Shared parts of the benchmarks: machine description, timing, peak memory, the printed JSON line."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from electra_composer.errors import UserError

PACKAGES = {"torch": "torch", "composer": "mosaicml", "transformers": "transformers", "triton": "triton"}


def describe() -> dict[str, object]:
    """Return date, processor, cores, GPU, operating system and versions; None for what is missing."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: _version(distribution) for name, distribution in PACKAGES.items()},
        },
    }


def print_result(benchmark: str, **fields: Any) -> None:
    """Print one JSON line: the benchmark's name, its fields, and the machine."""
    print(json.dumps({"benchmark": benchmark, **fields, "machine": describe()}), flush=True)


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Check that integer options are at least 1.

    Raises:
        UserError: one is smaller.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; expected at least 1")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


class PeakMemory:
    """Context manager that measures peak memory above the amount in use on entry.

    On CUDA: memory of tensors, as counted by torch's allocator. On the CPU: growth of the process's resident memory,
    by resetting its high-water mark (Linux only). A first call also loads libraries and fills caches, so warm up
    before measuring.

    Args:
        device: `cpu` or `cuda`.

    Attributes:
        bytes: set on exit; None if the system does not report it.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            _return_free_memory()
            self._before = _status_bytes("VmRSS") if _reset_high_water_mark() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status_bytes("VmHWM")
        if self._before is not None and peak is not None:
            self.bytes = max(0, peak - self._before)


def _return_free_memory() -> None:
    """Return malloc's free memory to the system; reusing it would not show as growth."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def interleave(
    functions: dict[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Time functions in alternation (A B A B …), so that a change in machine speed affects all of them.

    Args:
        functions: name → function to time.
        repeats: measured rounds.
        warmup: rounds before them, not measured.
        device: on CUDA, events on the current stream are the clock, and every call starts on an idle device.

    Returns:
        Name → `repeats` durations in seconds, in the order measured.
    """
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in tqdm(range(warmup + repeats), desc="rounds", leave=False):
        for name, function in functions.items():
            taken = clock(function)
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000.0


def median_ms(seconds: list[float]) -> float:
    """Return the median in milliseconds, rounded to the microsecond."""
    return round(statistics.median(seconds) * 1000.0, 3)
