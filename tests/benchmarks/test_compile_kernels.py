"""benchmarks/compile_kernels.py: kernels of one step for one GPU, and its failure if registers are spilled."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import compile_kernels
import pytest
from tiny import BENCHMARKS


def test_no_kernel_of_the_generators_attention_spills_registers() -> None:
    """In another process, because it replaces Triton's driver."""
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / "compile_kernels.py"), "--capabilities", "90"]
    done = subprocess.run([*command, "--steps", "small, generator"], capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout)["kernels"]
    assert (forward["kernel"], backward["kernel"]) == ("forward", "backward_of_tile")
    for row in (forward, backward):
        assert row["tiles"]["BLOCK"] == 128
        assert row["spilled"] == 0
        assert 32 < row["registers"] <= 255
        assert row["blocks_per_sm"] >= 1


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_spilled_registers_are_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kernel": "forward", "step": "small, generator", "capability": 90, "spilled": 16}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(compile_kernels, "HAS_TRITON", True)
    monkeypatch.setattr(compile_kernels, "compile_steps", lambda *_: [row])
    assert compile_kernels.main(["--capabilities", "90"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kernels"] == [row]
    assert "spilled registers: forward (small, generator, sm_90)" in printed.err
