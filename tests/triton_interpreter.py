"""Tests of Triton kernels without a GPU: in another process, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

KERNEL_MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="no GPU; run in another process, in Triton's interpreter"),
]


def run_interpreted(files: list[str], at_least: int) -> None:
    """Run the tests `test_kernel_*` of these files in Triton's interpreter; expect that many to pass."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("already in the interpreter")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The tests need none of the shared fixtures, whose imports take seconds.
    plugins = [word for name in ("cacheprovider", "shared_fixtures", "xdist") for word in ("-p", f"no:{name}")]
    command = [sys.executable, "-m", "pytest", "-rA", *plugins, *files, "-k", "test_kernel_"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("PASSED") >= at_least


def multiply_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter multiply bf16 numbers."""
    # Workaround (triton 3.3): the interpreter stores bf16 as 16-bit integers, which `tl.dot` multiplies as integers;
    # goes when it multiplies bf16.
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    original: Callable[..., interpreter.TensorHandle] = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest),
    )
