"""SIGTERM and SIGINT: which processes react, what is saved, and the exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import programs
import pytest
from resumed_runs import run, signal_at

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
    assert f"stopped by {number.name} after batch 4: saved {saved}; rerun the same command to resume" in said
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


def test_a_fit_that_failed_and_another_give_the_handlers_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopOnSignal(None)
    for _ in range(2):  # an error ends the first fit before its end
        stop.fit_start(None, None)
    stop.close(None, None)
    assert {number: signal.getsignal(number) for number in before} == before


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
import os, signal, sys

if os.fork() == 0:
    os.environ["LOCAL_RANK"] = "0"
    exec(sys.argv[1])
else:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of Composer's, which exits normally
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's signal at the end of a parent")
def test_the_end_of_the_launcher_is_a_sigterm_and_sigint_then_ends_at_once():
    """When the launcher dies of SIGTERM its rank receives SIGTERM too; SIGINT then ends it at once."""
    launcher = programs.Program([sys.executable, "-c", LAUNCHER, CHILD], stdout=subprocess.PIPE, text=True)
    word, pid = launcher.stdout.readline().split()
    assert word == "ready"
    try:
        launcher.terminate()
        assert launcher.wait(60) == -signal.SIGTERM
        assert launcher.stdout.readline() == "received [0, 1]\n"
        os.kill(int(pid), signal.SIGINT)
        assert launcher.stdout.read() == ""  # it has ended without further output
    finally:
        for left in (launcher.pid, int(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)


def test_a_signal_in_the_last_batch_lets_the_run_end(tiny_yaml, tmp_path):
    settings = ["trainer.max_duration=4ba", "trainer.eval_interval=4ba"]
    assert run(str(tiny_yaml), tmp_path, *settings, *signal_at(3, signal.SIGTERM, 0)) == 0
