"""Cores of this process: affinity and quotas from files as the kernel writes them, and the CPU time of processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from electra_composer.training import cores
from electra_composer.training.cores import CoreUsage, allowed_cpus, cgroup_cores, measure_usage, used_by_others

V1 = "12:cpuset:/job\n5:cpu,cpuacct:/job/step\n1:name=systemd:/init.scope\n"
V2 = "0::/job/step\n"


def quota_of(folder: Path, of_process: str, files: dict[str, str]) -> float:
    """Write /proc/self/cgroup and files below /sys/fs/cgroup, and return the quota read from them."""
    for name, text in {"proc/self/cgroup": of_process, **{f"sys/{name}": text for name, text in files.items()}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return cgroup_cores(folder / "proc", folder / "sys")


@pytest.mark.parametrize(
    ("of_process", "files", "expected"),
    [
        (V2, {"job/step/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"job/step/cpu.max": "max 100000\n"}, math.inf),
        (V2, {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "400000 100000\n"}, 4),
        (V2, {"job/step/cpu.max": "100000 50000\n", "job/cpu.max": "400000 100000\n"}, 2),
        (V2, {"cpu.max": "300000 100000\n"}, 3),  # the container's own group is the mount point
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"job/step/cpu.max": "\n"}, math.inf),
        (V1, {"cpu,cpuacct/job/step/cpu.cfs_quota_us": "250000\n"}, math.inf),  # no period
        *(
            (V1, {f"{mount}/{group}/cpu.cfs_quota_us": quota, f"{mount}/{group}/cpu.cfs_period_us": "100000\n"}, result)
            for mount in ("cpu,cpuacct", "cpu")
            for group in ("job/step", "job", ".")
            for quota, result in (("250000\n", 2.5), ("-1\n", math.inf))
        ),
        (V1, {"cpuset/job/cpu.max": "100000 100000\n", "cpu.max": "100000 100000\n"}, math.inf),  # not of this group
        (V1 + V2, {"unified/job/step/cpu.stat": "0\n"}, math.inf),  # hybrid
        ("", {}, math.inf),
    ],
)
def test_quota(tmp_path: Path, of_process: str, files: dict[str, str], expected: float) -> None:
    assert quota_of(tmp_path, of_process, files) == expected


def test_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path / "none", tmp_path) == math.inf


def test_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2}, raising=False)
    assert allowed_cpus() == [2, 5]
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS
    assert allowed_cpus() == list(range(os.cpu_count() or 1))


@pytest.mark.parametrize(
    ("cpus", "own_nice", "busy"),
    [
        ([1], 0, 20 + 3 + 2 + 1),  # neither idle, waiting for disks, nor stolen by another virtual machine
        ([0, 1], 0, 10 + 20 + 3 + 2 + 1),
        ([1], 5, 20 + 3 + 2 + 1 + 100),
        ([7], 0, 10 + 20 + 3 + 2 + 1),  # numbers with gaps: all
    ],
)
def test_what_counts_as_busy(monkeypatch: pytest.MonkeyPatch, cpus: list[int], own_nice: int, busy: float) -> None:
    first = SimpleNamespace(user=10, system=0, nice=0)  # macOS has no more
    second = SimpleNamespace(user=20, system=3, irq=2, softirq=1, nice=100, idle=1000, iowait=1000, steal=1000)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [first, second])
    monkeypatch.setattr(cores, "allowed_cpus", lambda: cpus)
    monkeypatch.setattr(os, "getpriority", lambda which, who: own_nice)
    assert measure_usage().busy == busy


def test_own_time_includes_children() -> None:
    """A child that computes for 0.2 s and then waits; then its time after its end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    before = measure_usage()
    child = context.Process(target=compute_and_wait, args=(theirs,))
    child.start()
    ours.recv()
    during = measure_usage()
    ours.send(None)
    child.join()
    after = measure_usage()
    for usage in (during, after):
        assert 0.19 < usage.own - before.own < 1.0
    assert before.seconds < during.seconds < after.seconds


def compute_and_wait(connection) -> None:
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    connection.send(None)
    connection.recv()


@pytest.mark.parametrize(
    ("busy", "own", "ranks", "others"),
    [(4.0, 2.6, 1, 0.7), (4.0, 2.0, 2, 0.0), (4.0, 1.5, 2, 0.5), (2.0, 2.02, 1, 0.0)],
)
def test_share_of_others(busy: float, own: float, ranks: int, others: float) -> None:
    """Over two seconds. Counters of hundredths of a second do not make it negative."""
    usages = CoreUsage(100.0, 50.0, 10.0), CoreUsage(102.0, 50.0 + busy, 10.0 + own)
    assert used_by_others(*usages, ranks) == pytest.approx(others)
