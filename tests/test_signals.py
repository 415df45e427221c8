"""SIGINT and SIGTERM from the first statement of a program on: one line on stderr, status 130 or 143."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from signalled import PACKAGE, catches_sigterm, has_loaded, start, stop
from tiny import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIGINT, SIGTERM = signal.SIGINT, signal.SIGTERM


# --- while libraries are imported


COLD = {
    "pretrain": ([PACKAGE / "pretrain.py", ROOT / "yamls/small.yaml"], has_loaded("_xxhash."), SIGINT, False),
    "glue": ([PACKAGE / "glue.py", ROOT / "yamls/glue.yaml"], has_loaded("ft2font"), SIGTERM, False),
    "finetune": ([PACKAGE / "finetune.py", ROOT / "yamls/qa.yaml"], has_loaded("libtorch_cpu.so"), SIGINT, False),
    "predict": ([PACKAGE / "predict.py", "no", "--input", "no"], has_loaded("libtorch_python.so"), SIGTERM, True),
    "convert": ([ROOT / "data_prep/convert_owt.py", "--source", "no"], catches_sigterm, SIGINT, True),
    "export": ([PACKAGE / "export.py", "no", "out"], has_loaded("libtorch_python.so"), SIGTERM, True),
    "preview": (["-m", "electra_composer.preview", "no"], has_loaded("libtorch_cpu.so"), SIGINT, False),
    "score": ([PACKAGE / "score.py", "no"], has_loaded("libtorch_python.so"), SIGINT, True),
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
