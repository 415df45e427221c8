"""Loader workers: only their parent terminates them, and they exit with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader

from electra_composer.batches.workers import leave_signals_to_parent, loader_workers


def squares_that_take_long(index: int) -> int:
    time.sleep(600 * (index == 2))
    return index * index


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch does not fork its workers")
def test_a_loaders_worker_hears_its_parent_alone():
    """It ignores signals from other processes; its parent's makes it exit with 0, even during a batch."""
    loader = DataLoader(range(4), collate_fn=lambda rows: squares_that_take_long(*rows), **loader_workers(1))
    batches = iter(loader)
    assert next(batches) == 0
    # Workaround (torch 2.7): `_workers` is private; goes when DataLoader lists its workers.
    (worker,) = batches._workers
    for number in ("INT", "TERM", "TERM"):
        subprocess.run(["/bin/sh", "-c", f"kill -{number} {worker.pid}"], check=True)
    assert next(batches) == 1
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()  # in the middle of the third batch
    worker.join(60)
    assert worker.exitcode == 0


def start_slowly() -> None:
    time.sleep(1)
    leave_signals_to_parent()
    time.sleep(600)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch does not fork its workers")
@pytest.mark.parametrize("number", ["INT", "TERM", "USR2"])
def test_a_signal_before_the_worker_has_its_handlers_waits_for_them(number):
    """A signal that killed a worker then made the parent's exit print a traceback."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    worker = loader_workers(1)["multiprocessing_context"].Process(target=start_slowly)
    worker.start()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    os.kill(worker.pid, getattr(signal, f"SIG{number}"))
    worker.join(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


AT_EXIT = """
from torch.utils.data import DataLoader
from electra_composer.batches.workers import loader_workers

batches = iter(DataLoader(range(9), **loader_workers(2)))
next(batches)
"""


def test_workers_end_with_their_parent_without_a_word():
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_loader_without_workers_takes_no_arguments_of_theirs():
    assert list(DataLoader(range(3), batch_size=None, **loader_workers(0))) == [0, 1, 2]
