"""Start programs, and send them signals at chosen moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from tiny import ROOT

PACKAGE = ROOT / "electra_composer"


def catches_sigterm(pid: int) -> bool:
    """Whether a process handles SIGTERM. Python does not by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def has_loaded(library: str) -> Callable[[int], bool]:
    """Whether a process has loaded a shared library, such as that of an import."""
    return lambda pid: library in Path(f"/proc/{pid}/maps").read_text()


def has_exited(process: subprocess.Popen) -> bool:
    """Whether a process has ended, or the kernel is releasing its memory, when a signal has no effect any more."""
    return process.poll() is not None or not Path(f"/proc/{process.pid}/cmdline").read_bytes()


def wait_until(process: subprocess.Popen, reached: Callable[[int], bool]) -> None:
    while not reached(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def stop(process: subprocess.Popen, number: signal.Signals, group: bool) -> tuple[int, list[str]]:
    """Send a signal to a process or to its group, as a terminal does; return its status and the lines on stderr."""
    (os.killpg if group else os.kill)(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(_session(other.pid) == process.pid for other in psutil.process_iter()):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.01)
    return process.returncode, [line for line in stderr.replace("\r", "\n").split("\n") if line]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid) if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else None
    except (ProcessLookupError, psutil.Error):
        return None


def start(command: list[Any], cwd: Path, kind: Any = subprocess.Popen, **environment: str) -> subprocess.Popen:
    return kind(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
