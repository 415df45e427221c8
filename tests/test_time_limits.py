"""A test that hangs fails, the processes that it started are killed, and the other tests of its worker still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import programs
import psutil
import pytest
from tiny import ROOT

HANGING = """
import os, signal, subprocess, sys, time
import programs

CHILD = [sys.executable, "-c", "import time; time.sleep(600)"]

def started(process):
    with open("started", "a") as file:
        file.write(f"{process.pid}\\n")
    return process

def test_waits_for_a_process():
    started(subprocess.Popen(CHILD)).wait()

def test_waits_for_a_program():
    started(programs.Program(CHILD)).wait()

def test_runs_no_signal_handler():
    started(subprocess.Popen(CHILD))
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    time.sleep(600)

def test_passes():
    pass
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's list of processes")
def test_tests_that_hang_end_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    programs.run([sys.executable, "-c", "pass"], check=True)  # now their server is ready
    (tmp_path / "test_hanging.py").write_text(HANGING)
    options = "-p conftest -p no:shared_fixtures -p no:cacheprovider -n 1 --max-worker-restart=2 -o timeout=2"
    options += f" -o faulthandler_timeout=5 -o faulthandler_exit_on_timeout=true --rootdir {tmp_path} -c {os.devnull}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "3 failed, 1 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("Failed: Timeout") >= 2
    assert "crashed while running 'test_hanging.py::test_runs_no_signal_handler'" in done.stdout
    started = [int(line) for line in (tmp_path / "started").read_text().splitlines()]
    assert len(started) == 3
    assert not [pid for pid in started if psutil.pid_exists(pid)]
