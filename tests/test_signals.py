"""SIGINT and SIGTERM at any moment before and beside training: one line on stderr, status 130 or 143, nothing left."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import psutil
import pytest
from glue_tiny import settings, write_data, write_source
from tiny import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM
PACKAGE = ROOT / "electra_composer"


def catches_sigterm(pid: int) -> bool:
    """Whether a process handles SIGTERM. Python does not by itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (SIGTERM - 1) & 1)


def has_loaded(library: str) -> Callable[[int], bool]:
    """Whether a process has loaded a shared library, such as that of an import."""
    return lambda pid: library in Path(f"/proc/{pid}/maps").read_text()


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


# --- while libraries are imported


COLD = {
    "pretrain": ([PACKAGE / "pretrain.py", "no.yaml"], has_loaded("_xxhash."), SIGINT, False),
    "glue": ([PACKAGE / "glue.py", "no.yaml"], has_loaded("ft2font"), SIGTERM, False),
    "convert": ([ROOT / "data_prep/convert_owt.py", "--source", "no"], catches_sigterm, SIGINT, True),
    "export": ([PACKAGE / "export.py", "no", "out"], has_loaded("libtorch_python.so"), SIGTERM, True),
    "preview": (["-m", "electra_composer.preview", "no"], has_loaded("libtorch_cpu.so"), SIGINT, False),
    "quickstart": (["-m", "electra_composer.quickstart"], has_loaded("tokenizers.abi3.so"), SIGTERM, False),
}


@pytest.mark.slow
def test_while_libraries_are_imported(tmp_path):
    """All at once, each at its moment. Processes without warm imports, since those are what is interrupted."""
    running = {name: start(command, tmp_path) for name, (command, *_) in COLD.items()}
    waiting, ended = dict(running), {}
    while waiting:
        for name, process in list(waiting.items()):
            _, reached, number, group = COLD[name]
            assert process.poll() is None, (name, process.communicate())
            if reached(process.pid):
                ended[name] = stop(waiting.pop(name), number, group)
        time.sleep(0.002)
    expected = {name: (128 + number, [f"stopped by {number.name}"]) for name, (*_, number, _) in COLD.items()}
    assert ended == expected
    assert list(tmp_path.iterdir()) == []


# --- the mechanism, in processes without libraries

BEGIN = "import os, signal, sys, time; from electra_composer import program, signals; program.begin()\n"
BLOCKS = """
import ctypes
mutex = (ctypes.c_char * 64)()
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
print("ready", flush=True)
lock(mutex)  # never returns, and signals do not interrupt it
"""
WAITS = 'print("ready", flush=True)\ntime.sleep(60)\n'
SWALLOWS = 'print("ready", flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    print("swallowed")\n'
FORKS = """
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"1")
    time.sleep(60)
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    signal.raise_signal(signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
"""
# As the import of Composer does.
REPLACES = """
def sigterm_handler(number, frame): sys.exit(1)
sigterm_handler.__module__ = "composer.core.engine"
signal.signal(signal.SIGTERM, sigterm_handler)
signal.signal(signal.SIGINT, sigterm_handler)
"""
FINALIZES = """
signals.unwind()

def generator():
    try:
        yield
    finally:
        print("ready", flush=True)
        time.sleep(60)

for _ in generator():
    break  # Python ignores what its end raises
time.sleep(60)
"""
CLEANS = """
import threading
from electra_composer.errors import report_user_errors

def fail(*_):
    raise ValueError("a consequence")

class Fails:
    __del__ = fail

@report_user_errors
def main():
    signals.unwind()
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        signals.tell("cleaned up")
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        Fails()
        raise OSError("on the way")

main()
"""


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (WAITS, ""),
        (SWALLOWS, ""),
        (BLOCKS, ""),
        (FORKS + WAITS, ""),
        (REPLACES + WAITS, ""),
        (FINALIZES, ""),
        (CLEANS, ": cleaned up"),
        ("signals.BLOCKED_SECONDS = 0.1; signals.unwind()\n" + BLOCKS, ""),
    ],
    ids=["waits", "swallows", "blocks", "forks", "replaces", "finalizes", "cleans", "blocks in work"],
)
def test_one_line_and_the_status(tmp_path, number, code, outcome):
    process = start(["-c", BEGIN + code], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert stop(process, number, group=False) == (128 + number, [f"stopped by {number.name}{outcome}"])


def test_a_second_ctrl_c_does_not_wait_for_cleaning(tmp_path):
    code = 'signals.unwind()\ntry:\n    print("ready", flush=True)\n    time.sleep(60)\n'
    process = start(["-c", BEGIN + code + 'finally:\n    print("cleaning", flush=True)\n    time.sleep(60)'], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    assert stop(process, SIGINT, group=False) == (128 + SIGTERM, ["stopped by SIGTERM"])


def test_a_rank_above_0_is_silent_and_killed(tmp_path):
    """Composer's launcher prints the output of a rank that ends in another way."""
    for number in (SIGINT, SIGTERM):
        process = start(["-c", BEGIN + WAITS], tmp_path, RANK="1")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert stop(process, number, group=False) == (-signal.SIGKILL, [])


# --- while programs work


@pytest.fixture
def text(tmp_path) -> Path:
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=200)) for _ in range(4000)))
    return path


def convert_command(text: Path, folder: Path) -> list[Any]:
    options = ["--tokenizer", "train", "--vocab-size", "200", "--out", folder / "out", "--no-progress"]
    return [ROOT / "data_prep/convert_owt.py", "--source", text, "--workers", "2", *options]


@pytest.mark.parametrize(
    ("moment", "number", "group"),
    [("out.partial/plan.json", SIGINT, True), ("out.partial/unfinished", SIGTERM, False)],
)
def test_a_conversion_at_work(text, tmp_path, moment, number, group):
    process = start(convert_command(text, tmp_path), tmp_path, programs.Program)
    wait_until(process, lambda pid: (tmp_path / moment).exists())
    status, lines = stop(process, number, group)
    assert status == 128 + number
    assert lines == [f"stopped by {number.name}: nothing was kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_run_between_its_data_and_its_first_batch(tiny_yaml, tmp_path):
    command = [PACKAGE / "pretrain.py", tiny_yaml, "trainer.max_duration=100000ba"]
    process = start(command, tmp_path, programs.Program)
    wait_until(process, lambda pid: (tmp_path / "run/.lock").exists())
    files = " ".join(file.path for file in psutil.Process(process.pid).open_files())
    datasets = re.findall(r"_(\d{6,})\.owner", files)
    assert datasets
    status, lines = stop(process, SIGTERM, group=False)
    assert status == 143
    assert lines == ["stopped by SIGTERM"]
    assert not [number for number in datasets if os.path.exists(f"/dev/shm/{number}_locals")]
    assert not list((tmp_path / "run").glob("*.pt"))


def test_finetuning_before_its_first_batch(tmp_path):
    source, data = write_source(tmp_path / "source"), write_data(tmp_path / "data")
    command = [PACKAGE / "glue.py", ROOT / "yamls/glue.yaml", *settings(source, data, tmp_path)]
    process = start(command, tmp_path, programs.Program)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("attention")
    assert stop(process, SIGINT, group=True) == (130, ["stopped by SIGINT"])


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_quickstart_ends_the_step_that_it_waits_for(tmp_path, number):
    """The step, a child of the tests' program server, prints the line."""
    for name in ("electra_composer", "data_prep", "yamls"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["-m", "electra_composer.quickstart", "--smoke"]
    process = start(command, tmp_path, programs.Program, **{programs.WARM_CHILDREN: "1"})
    wait_until(process, lambda pid: (tmp_path / "runs/quickstart/shards.partial/plan.json").exists())
    status, lines = stop(process, number, group=False)
    assert status == 128 + number
    assert [line for line in lines if "B/s]" not in line] == ["stopped by SIGTERM: nothing was kept"]


# --- at twenty moments


def program_runs(tmp_path: Path, text: Path, run: Path, shards: Path) -> dict[str, list[Any]]:
    glue = settings(write_source(tmp_path / "source"), write_data(tmp_path / "data"), tmp_path)
    return {
        "glue": [PACKAGE / "glue.py", ROOT / "yamls/glue.yaml", *glue],
        "convert": convert_command(text, tmp_path),
        "export": [PACKAGE / "export.py", run, tmp_path / "export"],
        "preview": ["-m", "electra_composer.preview", shards, "--checkpoint", run],
        "pretrain": [PACKAGE / "pretrain.py", tmp_path / "tiny.yaml"],
    }


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["pretrain", "glue", "convert", "export", "preview"])
def test_twenty_moments(tmp_path, tiny_yaml, text, shards, name):
    """Spread over the time of a whole run, both signals in turn, to the program and to its group.

    While a run trains there are two lines, and a run that has trained its last batch is complete (interrupts.py).
    """
    first = start([PACKAGE / "pretrain.py", tiny_yaml, "checkpoints.folder=first"], tmp_path)
    first.communicate()
    assert first.returncode == 0
    command = program_runs(tmp_path, text, tmp_path / "first", shards)[name]

    def clean() -> None:
        for folder in ("out", "export", "run"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

    clean()
    begun = time.monotonic()
    start(command, tmp_path).communicate()
    total = time.monotonic() - begun
    for moment in range(20):
        clean()
        number, group = (SIGINT, SIGTERM)[moment % 2], moment % 4 > 1
        begun, process = time.monotonic(), start(command, tmp_path)
        wait_until(process, catches_sigterm)
        time.sleep(max(0, begun + total * moment / 20 - time.monotonic()))
        if process.poll() == 0:  # faster than the first
            assert moment > 15
            process.communicate()
            continue
        status, lines = stop(process, number, group)
        lines = [line for line in lines if not line.startswith("the ")]  # advice on tiny models
        if lines and "stopping after this batch" in lines[0]:
            del lines[0]
            if status == 0:  # in the last batch
                continue
        assert status == 128 + number, (moment, lines)
        assert [line.partition(":")[0].partition(" after")[0] for line in lines] == [f"stopped by {number.name}"]
