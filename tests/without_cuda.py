"""Run a program as on a machine with a GPU, and fail if it starts CUDA or pins memory.

    python tests/without_cuda.py PROGRAM [ARGUMENT …]

`torch.cuda.is_available` and `torch.accelerator.is_available` return True. What would start CUDA, or needs it to be
started, raises :class:`TouchedCUDA`, also in threads and loader workers, since their errors end the program.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class TouchedCUDA(BaseException):
    """Not an Exception, so that no library takes it for a failure that it can handle."""


def refuse(name: str) -> Any:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise TouchedCUDA(name)

    return refused


def fake_gpu(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    for module in (torch.cuda, torch.accelerator):
        replace(module, "is_available", lambda: True)
    for name in ("_lazy_init", "init", "current_device", "set_device", "synchronize", "memory_stats", "Stream"):
        replace(torch.cuda, name, refuse(f"torch.cuda.{name}"))
    for name in ("current_device_index", "set_device_index", "current_stream", "synchronize"):
        replace(torch.accelerator, name, refuse(f"torch.accelerator.{name}"))
    replace(torch.Tensor, "pin_memory", refuse("Tensor.pin_memory"))


if __name__ == "__main__":
    fake_gpu()
    program, *arguments = sys.argv[1:]
    sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
