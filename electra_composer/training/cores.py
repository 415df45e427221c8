"""CPU cores of this process: how many it may use, and how much of them other processes use."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


def allowed_cpus() -> list[int]:
    """Return the numbers of the CPUs that the affinity of this process allows; all of the machine on macOS."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cgroup_cores(proc: Path = Path("/proc"), mount: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the CPU quota of the control groups of this process in cores, infinity if there is none.

    Reads version 2 (`cpu.max`) and version 1 (`cpu.cfs_quota_us` / `cpu.cfs_period_us`) at the group and all groups
    above it, whose limits also hold. Inside a container the group's own path is often not mounted; the mount point is
    then its group.

    Args:
        proc, mount: where the two file systems are mounted.
    """
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers  # of version 2, whose line names no controllers: the mount point
        if controllers and not root.is_dir():
            root = mount / "cpu"
        group = Path(path.lstrip("/"))
        quotas += [_quota(root / part) for part in (group, *group.parents)]
    return min(quotas)


def _quota(group: Path) -> float:
    """Return the quota of one group in cores, infinity if it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if quota != "max" and int(quota) > 0:
                return int(quota) / int(period)
    return math.inf


@dataclass(frozen=True)
class CoreUsage:
    """CPU time since some fixed moment.

    Attributes:
        seconds: time of the measurement.
        busy: CPU seconds of all processes on the CPUs that this process may use.
        own: CPU seconds of this process, its loader processes included.
    """

    seconds: float
    busy: float
    own: float


def measure_usage() -> CoreUsage:
    """Measure the CPU time used so far, in 0.2 ms.

    The system's counters include other containers of the machine. Processes of a positive nice value do not count as
    busy unless this process has one too: they run only where nothing else does.
    """
    cpus, times = allowed_cpus(), psutil.cpu_times(percpu=True)
    if cpus[-1] < len(times):
        times = [times[cpu] for cpu in cpus]
    kinds = ["user", "system", "irq", "softirq"] + ["nice"] * (os.getpriority(os.PRIO_PROCESS, 0) > 0)
    busy = sum(getattr(cpu, kind, 0.0) for cpu in times for kind in kinds)
    own = time.process_time()
    for child in multiprocessing.active_children():
        with contextlib.suppress(psutil.Error):
            used = psutil.Process(child.pid).cpu_times()
            own += used.user + used.system
    finished = os.times()
    return CoreUsage(time.monotonic(), busy, own + finished.children_user + finished.children_system)


def used_by_others(before: CoreUsage, after: CoreUsage, ranks: int = 1) -> float:
    """Return how many cores other processes used on average between two measurements.

    Args:
        ranks: processes of this run on this machine, which use about as much as this one and do not count as others.
    """
    busy, own = after.busy - before.busy, after.own - before.own
    return max(0.0, (busy - ranks * own) / (after.seconds - before.seconds))
