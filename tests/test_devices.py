"""What runs where: every combination of device and precision, with and without a GPU."""

from __future__ import annotations

import pytest
import torch

from electra_composer.config import TrainerConfig
from electra_composer.devices import resolve_device
from electra_composer.errors import UserError


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that has no bfloat16 but in emulation."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old 1080")


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("precision", "autocast"), [("fp32", False), ("amp_bf16", True)])
def test_cpu(no_gpu: None, device: str | None, precision: str, autocast: bool) -> None:
    """Composer is told fp32, the only precision it takes there; bfloat16 is the model's own autocast."""
    trainer = TrainerConfig(device=device, precision=precision)  # type: ignore[arg-type]
    assert resolve_device(trainer) == ("cpu", "fp32", autocast)


def test_cpu_may_be_asked_for_beside_a_gpu(new_gpu: None) -> None:
    assert resolve_device(TrainerConfig(device="cpu", precision="amp_bf16")) == ("cpu", "fp32", True)


@pytest.mark.parametrize("device", [None, "gpu"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_gpu(new_gpu: None, device: str | None, precision: str) -> None:
    """Composer's own default on a GPU is fp16: what it is given is always stated."""
    trainer = TrainerConfig(device=device, precision=precision)  # type: ignore[arg-type]
    assert resolve_device(trainer) == ("gpu", precision, False)


def test_default_precision_is_bfloat16(new_gpu: None) -> None:
    assert resolve_device(TrainerConfig())[1] == "amp_bf16"


def test_gpu_without_bfloat16_is_told_of_fp16(old_gpu: None) -> None:
    with pytest.raises(UserError, match=r"Old 1080 cannot do; set trainer\.precision=amp_fp16"):
        resolve_device(TrainerConfig(precision="amp_bf16"))
    assert resolve_device(TrainerConfig(precision="amp_fp16")) == ("gpu", "amp_fp16", False)


def test_gpu_that_is_not_there(no_gpu: None) -> None:
    with pytest.raises(UserError, match=r"no CUDA device; set trainer\.device=cpu"):
        resolve_device(TrainerConfig(device="gpu"))


def test_fp16_on_a_cpu(no_gpu: None) -> None:
    with pytest.raises(UserError, match="amp_fp16, which a CPU cannot do"):
        resolve_device(TrainerConfig(precision="amp_fp16"))


def test_automatic_microbatches_need_a_gpu(no_gpu: None) -> None:
    with pytest.raises(UserError, match="device_train_microbatch_size is auto"):
        resolve_device(TrainerConfig(device_train_microbatch_size="auto"))


def test_automatic_microbatches_on_a_gpu(new_gpu: None) -> None:
    assert resolve_device(TrainerConfig(device_train_microbatch_size="auto"))[0] == "gpu"
