"""SIGTERM and SIGINT: who hears them, what is saved, how a process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from resumed_runs import run, signal_at
from torch.utils.data import DataLoader

from electra_composer.batches.workers import loader_workers
from electra_composer.checkpoints.resuming import find_corruption
from electra_composer.training.interrupts import StopOnSignal


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run(tiny_yaml, tmp_path, capfd, number, status):
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    settings = ["checkpoints.interval=null", "checkpoints.milestones=[1.0]"]
    assert run(str(tiny_yaml), tmp_path, *settings, *signal_at(3, number, 0)) == status
    saved = tmp_path / "run" / "batch-4-rank0.pt"
    said = capfd.readouterr().err
    assert f"{number.name}: stopping after this batch" in said
    assert f"stopped by {number.name} after batch 4: saved {saved}; the same command goes on from there" in said
    assert find_corruption(str(saved)) is None
    assert os.readlink(tmp_path / "run" / "latest-rank0.pt") == saved.name
    assert {one: signal.getsignal(one) for one in before} == before


def test_a_checkpoint_that_is_due_anyway_is_not_written_twice(tiny_yaml, tmp_path, monkeypatch):
    from electra_composer.checkpoints.saving import AtomicCheckpointSaver

    saved = []
    save = AtomicCheckpointSaver._save_checkpoint
    monkeypatch.setattr(
        AtomicCheckpointSaver, "_save_checkpoint", lambda self, *rest: saved.append(self.kind) or save(self, *rest)
    )
    settings = ["checkpoints.interval=4ba", "checkpoints.milestones=[]"]
    assert run(str(tiny_yaml), tmp_path, *settings, *signal_at(3, signal.SIGTERM, 0)) == 143
    assert saved == ["batch-"]


def test_a_run_that_keeps_no_checkpoints_just_ends(tiny_yaml, tmp_path, capfd):
    settings = ["checkpoints.interval=null", "checkpoints.milestones=[]"]
    assert run(str(tiny_yaml), tmp_path, *settings, *signal_at(3, signal.SIGTERM, 0)) == 143
    assert "after batch 4: this run keeps no checkpoints" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt"))


def test_what_one_process_has_received_all_agree_on():
    stop = StopOnSignal(None)
    assert stop.received() == [0, 0]
    stop._received = signal.SIGTERM
    assert stop.received() == [0, 1]
    for counts, agreed in (([0, 0], None), ([0, 3], signal.SIGTERM), ([1, 1], signal.SIGINT)):
        stop.agree(counts)
        assert stop._agreed == agreed


CHILD = """
import os, sys, time
from electra_composer.training.interrupts import StopOnSignal

stop = StopOnSignal(None)
stop.fit_start(None, None)
print("ready", os.getpid(), flush=True)
while not any(stop.received()):
    time.sleep(0.01)
print("received", stop.received(), flush=True)
time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "LOCAL_RANK": "0"})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells a process that its parent has ended")
def test_the_end_of_the_launcher_is_a_sigterm_and_sigint_then_ends_at_once():
    """A launcher that dies of SIGTERM leaves no process training on; what has heard of it stops at Ctrl-C."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, CHILD], stdout=subprocess.PIPE, text=True)
    word, pid = launcher.stdout.readline().split()
    assert word == "ready"
    try:
        launcher.terminate()
        assert launcher.wait(60) == -signal.SIGTERM
        assert launcher.stdout.readline() == "received [0, 1]\n"
        os.kill(int(pid), signal.SIGINT)
        assert launcher.stdout.read() == ""  # it has ended, and said nothing more
    finally:
        for left in (launcher.pid, int(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def squares_that_take_long(index: int) -> int:
    time.sleep(600 * (index == 2))
    return index * index


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere PyTorch does not fork its workers")
def test_a_loaders_worker_hears_its_parent_alone():
    """Signals from elsewhere change nothing; its parent's ends it with 0, whatever it is about."""
    loader = DataLoader(range(4), collate_fn=lambda rows: squares_that_take_long(*rows), **loader_workers(1))
    batches = iter(loader)
    assert next(batches) == 0
    (worker,) = batches._workers
    for number in ("INT", "TERM", "TERM"):
        subprocess.run(["/bin/sh", "-c", f"kill -{number} {worker.pid}"], check=True)
    assert next(batches) == 1
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()  # in the middle of the third batch
    worker.join(60)
    assert worker.exitcode == 0


AT_EXIT = """
from torch.utils.data import DataLoader
from electra_composer.batches.workers import loader_workers

batches = iter(DataLoader(range(9), persistent_workers=True, **loader_workers(2)))
next(batches)
"""


def test_workers_end_with_their_parent_without_a_word():
    ended = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_loader_without_workers_takes_no_arguments_of_theirs():
    assert list(DataLoader(range(3), batch_size=None, **loader_workers(0))) == [0, 1, 2]


def test_a_signal_in_the_last_batch_lets_the_run_end(tiny_yaml, tmp_path):
    settings = ["trainer.max_duration=4ba", "trainer.eval_interval=4ba"]
    assert run(str(tiny_yaml), tmp_path, *settings, *signal_at(3, signal.SIGTERM, 0)) == 0
