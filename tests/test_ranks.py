"""On two ranks under Composer's launcher the user reads an error once, and the exit status is that of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import programs
import pytest
from launcher import COMPOSER
from tiny import ROOT

PRETRAIN, RECORDED = "electra_composer/pretrain.py", "benchmarks/recorded_run.py"


@dataclass(frozen=True)
class Fault:
    """What two ranks meet.

    Attributes:
        overrides: of the tiny configuration; `FOLDER` is a folder with what :func:`prepared` writes.
        line: part of the one line that is printed.
        program: relative to the repository.
        status: exit status of the launcher.
    """

    overrides: tuple[str, ...]
    line: str
    program: str = PRETRAIN
    status: int = 2


FAULTS = {
    "unknown key": Fault(("nonsense.key=1",), "error: the command line: unknown key nonsense"),
    "number out of range": Fault(("optimizer.lr=-1",), "optimizer.lr is -1.0; expected"),
    "no shards": Fault(("data.path=FOLDER/nowhere",), "nowhere does not exist"),
    "damaged shards": Fault(("data.path=FOLDER/damaged",), "meta.json is damaged or not the metadata of shards"),
    "damaged shards, checked": Fault(("data.path=FOLDER/damaged", "--check"), "meta.json is damaged"),
    "damaged checkpoint": Fault(("checkpoints.load_path=FOLDER/checkpoint.pt",), "error: FOLDER/checkpoint.pt"),
    "run folder that is a file": Fault(("checkpoints.folder=FOLDER/checkpoint.pt",), "FOLDER/checkpoint.pt"),
    "disk of rank 1 full": Fault(
        ("callbacks.full_disk.rank=1", "callbacks.full_disk.batch=2"),
        "error: rank 1: run/trouble could not be written: No space left on device; free some space; rerun the same",
        "tests/failing_rank.py",
    ),
    "SIGTERM to rank 1": Fault(
        ("callbacks.signal_at.batch=2", "callbacks.signal_at.signal=15", "callbacks.signal_at.rank=1"),
        "stopped by SIGTERM after batch 3: saved",
        RECORDED,
        143,
    ),
}


@pytest.fixture
def prepared(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "damaged")
    (tmp_path / "damaged" / "meta.json").write_text('{"version": ')
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\3\4 cut short")
    return tmp_path


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAULTS)
def test_an_error_is_told_once(name: str, prepared: Path, tiny_yaml: Path) -> None:
    fault = FAULTS[name]
    (prepared / "record").mkdir()
    record = [f"callbacks.record.folder={prepared / 'record'}"] if fault.program == RECORDED else []
    overrides = [override.replace("FOLDER", str(prepared)) for override in fault.overrides]
    done = programs.run(
        [str(COMPOSER), "-n", "2", str(ROOT / fault.program), str(tiny_yaml), *record, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == fault.status, done.stdout[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith(("error: ", "stopped by "))]
    assert len(told) == 1, done.stdout[-3000:]
    assert fault.line.replace("FOLDER", str(prepared)) in told[0]
    for unwanted in ("Traceback", "Begin global rank"):  # the launcher prints the output of a rank that has failed
        assert unwanted not in done.stdout, done.stdout[-3000:]


RANK = """
import sys, time
from electra_composer.program import begin
begin()
from electra_composer import ranks
from electra_composer.errors import UserError, report_user_errors

ranks.WAIT_SECONDS = float(sys.argv[2])

@report_user_errors
def main():
    print("started", flush=True)
    if sys.argv[1] == "fails":
        raise UserError("the disk is full")
    time.sleep(600)

main()
"""


def rank(number: int, *arguments: str) -> programs.Program:
    """Start a rank of a launcher that is not there; it has said that it has started."""
    environment = {**os.environ, "LOCAL_RANK": str(number), "RANK": str(number), "WORLD_SIZE": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = programs.Program([sys.executable, "-c", RANK, *arguments], env=environment, **pipes)
    assert started.stdout.readline() == "started\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("does", ["fails", "waits"])
def test_a_signal_ends_another_rank_without_output(does: str, number: signal.Signals) -> None:
    """Whether it has failed like the first rank or is at work. The launcher prints nothing of a rank that is killed."""
    program = rank(1, does, "60")
    program.send_signal(number)
    output, errors = program.communicate(timeout=60)
    assert program.returncode in (-signal.SIGTERM, -signal.SIGKILL)
    assert (output, errors) == ("", "")


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_that_no_other_rank_meets_is_told(number: int) -> None:
    """By the first rank at once, and by another one if the launcher does not end it."""
    program = rank(number, "fails", "0.2")
    _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (2, "error: the disk is full\n")
