"""Programs end: their exit waits for nothing, and signals end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import programs
import pytest
from glue_tiny import settings, write_data, write_source
from tiny import ROOT

SLOW_EXIT = """
import atexit, time
import composer  # installs handlers
from electra_composer.errors import report_user_errors

atexit.register(time.sleep, 600)  # a library that hangs
atexit.register(print, "exits", flush=True)

@report_user_errors
def main():
    print("result", flush=True)

main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_program_that_hangs_at_exit(number):
    alone = {
        name: value for name, value in os.environ.items() if name != "LOCAL_RANK"
    }  # Composer sets it in this process
    program = programs.Program([sys.executable, "-c", SLOW_EXIT], stdout=subprocess.PIPE, text=True, env=alone)
    try:
        assert [program.stdout.readline() for _ in range(2)] == ["result\n", "exits\n"]
        os.kill(program.pid, number)
        assert program.wait(60) == -number
    finally:
        program.kill()


def test_a_launched_rank_keeps_its_status_when_its_launcher_ends_the_others():
    environment = {**os.environ, "LOCAL_RANK": "0"}
    code = SLOW_EXIT.replace("time.sleep, 600", "lambda: os.kill(os.getpid(), signal.SIGTERM)").replace(
        "import atexit", "import os, signal, atexit"
    )
    done = programs.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0


def exit_of(program, *arguments):
    """Run a program of the package and return what its exit waited for (see at_exit.py)."""
    command = [sys.executable, ROOT / "tests" / "at_exit.py", ROOT / program, *arguments]
    done = programs.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pretraining_ends(tiny_yaml):
    settings = ["data.num_workers=1", "trainer.max_duration=2ba", "trainer.eval_interval=2ba", "trainer.device=cpu"]
    found = exit_of("electra_composer/pretrain.py", str(tiny_yaml), *settings)
    assert found == {"in vain": [], "threads": [], "children": 0}


def test_finetuning_ends(tmp_path):
    source, data = write_source(tmp_path / "source"), write_data(tmp_path / "glue")
    overrides = [*settings(source, data, tmp_path), "tasks=[sst2]", "seeds=[1]", "trainer.max_duration=2ba"]
    yaml = str(ROOT / "yamls" / "glue.yaml")
    found = exit_of("electra_composer/glue.py", yaml, *overrides, "data.num_workers=1", "trainer.device=cpu")
    assert found == {"in vain": [], "threads": [], "children": 0}
