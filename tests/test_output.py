"""Programs end without a traceback when their output is closed, as by `… | head`, or its disk is full."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from converter import load_main
from tiny import ROOT

from electra_composer import export, finetune, glue, glue_report, predict, pretrain, preview, push, quickstart, score

PRINT = """
import sys
from electra_composer.errors import report_user_errors

@report_user_errors
def main():
    for number in range(20_000):
        print("line", number, file=sys.{stream})

main()
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe(stream, unbuffered):
    command = [sys.executable, "-c", PRINT.format(stream=stream)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        closed, other = getattr(process, stream), process.stderr if stream == "stdout" else process.stdout
        closed.readline()
        closed.close()
        assert other.read().strip() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_of_the_output(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINT.format(stream="stdout")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device\n")


def test_another_broken_pipe_is_a_bug():
    """One of a socket, while stdout is there."""
    program = PRINT.replace("for number", "raise BrokenPipeError(32, 'Broken pipe')\n    for number").format(
        stream="stdout"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_every_program_has_this_guard():
    for main in (export.main, push.main, preview.main, predict.main, glue_report.main, score.main, load_main()):
        assert hasattr(main, "__wrapped__")
    for module in (pretrain, glue, finetune, quickstart):
        with open(module.__file__, encoding="utf-8") as file:
            assert file.read().count("report_user_errors") >= 2  # imported and used
