"""Loader workers: only their parent terminates them, and they exit with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import programs
import pytest
from tiny import ROOT
from torch.utils.data import DataLoader

from electra_composer.batches.row_loader import RowLoader
from electra_composer.batches.workers import WorkerLoader, leave_signals_to_parent, loader_workers
from electra_composer.finetuning.loader import build_loader
from electra_composer.tasks.encoded import EncodedRows


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


ALIVE_AT_EXIT = """
import sys
sys.path.insert(0, sys.argv.pop())
import at_exit  # pins memory and watches
from electra_composer.batches.workers import WorkerLoader, loader_workers

loader = WorkerLoader(range(99), pin_memory=True, **loader_workers(2))
assert next(iter(loader)) == 0
if sys.argv[1:] == ["deleted"]:
    del loader
"""


@pytest.mark.parametrize("arguments", [[], ["deleted"]])
def test_nobody_waits_for_workers_at_exit(arguments):
    """On CUDA every worker of a loader that was alive at exit held the process for five seconds (torch 2.7)."""
    tests = str(ROOT / "tests")
    command = [sys.executable, "-c", ALIVE_AT_EXIT, *arguments, tests]
    ended = programs.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == {"in vain": [], "threads": [], "children": 0}


def test_every_loader_with_workers_ends_them():
    assert issubclass(RowLoader, WorkerLoader)
    examples = EncodedRows(np.zeros(4, np.int32), np.arange(3), np.ones(2, np.int64), None)
    assert isinstance(build_loader(examples, 0, 1, 2, None).dataloader, WorkerLoader)


def test_a_loader_without_workers_takes_no_arguments_of_theirs():
    assert list(DataLoader(range(3), batch_size=None, **loader_workers(0))) == [0, 1, 2]
