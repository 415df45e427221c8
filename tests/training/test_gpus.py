"""Peaks of GPUs: agreement with Composer's table, names of devices, precisions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS

from electra_composer.training.gpus import GPUS, find_gpu, peak_flops

COMPOSER = {"A100": "a100", "H100 PCIe": "h100-pcie", "H100 SXM": "h100-sxm", "H200": "h200-sxm"}


@pytest.mark.parametrize("name", COMPOSER)
def test_the_table_agrees_with_composers(name: str) -> None:
    row = GPU_AVAILABLE_FLOPS[COMPOSER[name]]
    for precision in ("amp_bf16", "amp_fp16", "bf16", "fp16", "fp32"):
        assert GPUS[name].peak(precision, tf32=False) == row[precision]
    assert GPUS[name].peak("fp32", tf32=True) == row["tf32"]
    assert GPUS[name].peak("amp_fp8", tf32=False) == 0


def test_b200_is_an_eighth_of_the_boards_72_petaflops_of_fp8_halved_twice() -> None:
    """HGX B200: 36 PFLOP/s in bf16 with sparsity, on 8 GPUs; dense is half, TF32 half of bf16."""
    assert GPUS["B200"].half == 36e15 / 8 / 2
    assert GPUS["B200"].tf32 == GPUS["B200"].half / 2


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", None),  # another card
        ("NVIDIA A10", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_by_their_names(device: str, name: str | None) -> None:
    assert find_gpu(device) == name


def test_other_gpus_are_looked_up_in_composers_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A10")
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    assert peak_flops("fp32") == GPU_AVAILABLE_FLOPS["a10"]["tf32"]
    assert peak_flops("amp_bf16") == GPU_AVAILABLE_FLOPS["a10"]["amp_bf16"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    with pytest.warns(UserWarning, match="MFU cannot be calculated"):
        assert peak_flops("amp_bf16") == 0
