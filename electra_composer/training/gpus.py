"""Peak speeds of GPUs by their data sheets: the denominator of MFU, and the scale of `benchmarks/cost.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import State


@dataclass(frozen=True)
class GPU:
    """Figures of one model of GPU.

    Attributes:
        pattern: regular expression that is found in `torch.cuda.get_device_name()` in lower case.
        half: FLOPs per second of dense matrix products in bf16 and fp16 (data sheets also give twice as much, with
            structured sparsity).
        tf32: the same in TF32.
        fp32: FLOPs per second in fp32 without TF32.
        bandwidth: bytes per second of its memory.
    """

    pattern: str
    half: float
    tf32: float
    fp32: float
    bandwidth: float

    def peak(self, precision: str, tf32: bool) -> float:
        """Return the peak in FLOPs per second; 0 for a precision that is not in the table.

        Args:
            precision: Composer's name: `fp32`, `amp_bf16`, `amp_fp16`, `bf16` or `fp16`.
            tf32: whether fp32 products use TF32.
        """
        if precision == "fp32":
            return self.tf32 if tf32 else self.fp32
        return self.half if precision in ("amp_bf16", "amp_fp16", "bf16", "fp16") else 0.0


# Sources: NVIDIA's data sheets of H100, H200, A100 (80 GB SXM) and HGX B200 (an eighth of the board's figures).
GPUS = {
    "A100": GPU(r"\ba100\b", 312e12, 156e12, 19.5e12, 2.039e12),
    "H100 PCIe": GPU(r"\bh100 pcie\b|\bh100\b.*\bhbm2e\b", 756.5e12, 378e12, 51e12, 2.0e12),
    "H100 SXM": GPU(r"\bh100\b.*\b(hbm3|sxm5?)\b", 989.5e12, 494.5e12, 67e12, 3.35e12),
    "H200": GPU(r"\bh200\b", 989.5e12, 494.5e12, 67e12, 4.8e12),
    "B200": GPU(r"\bb200\b", 2250e12, 1125e12, 75e12, 8.0e12),
}
"""GPUs by their common names."""


def find_gpu(device_name: str) -> str | None:
    """Return the name in :data:`GPUS` of a device such as `NVIDIA H100 80GB HBM3`; None if it is not there."""
    return next((name for name, gpu in GPUS.items() if re.search(gpu.pattern, device_name.lower())), None)


def peak_flops(precision: str) -> float:
    """Return the peak of the current CUDA device for dense matrix products, in FLOPs per second; 0 if unknown.

    Args:
        precision: Composer's name; fp32 is TF32 where products of fp32 matrices use it.
    """
    tf32 = torch.backends.cuda.matmul.allow_tf32
    name = find_gpu(torch.cuda.get_device_name())
    if name is not None:
        return GPUS[name].peak(precision, tf32)
    # Workaround (composer 0.32): the table of other GPUs can only be read by a function of a State, of which it reads
    # `precision.value`, and which does not consider TF32; goes when Composer has a function of device and precision.
    composer_name = "tf32" if precision == "fp32" and tf32 else precision
    state = cast(State, SimpleNamespace(precision=SimpleNamespace(value=composer_name)))
    return float(get_gpu_flops_available(state))
