"""Every combination of device and precision, with and without a GPU."""

from __future__ import annotations

import pytest
import torch

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.training import devices
from electra_composer.training.devices import RunDeviceGPU, resolve_device


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def bf16_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with bfloat16 in emulation only."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old 1080")


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize(("precision", "autocast"), [("fp32", False), ("amp_bf16", True)])
def test_cpu(no_gpu: None, bf16_cpu: None, device: str | None, precision: str, autocast: bool) -> None:
    """Composer gets fp32, the only precision it accepts on a CPU; bfloat16 is the model's own autocast."""
    trainer = TrainerConfig(device=device, precision=precision)  # type: ignore[arg-type]
    assert resolve_device(trainer) == ("cpu", "fp32", autocast)


def test_cpu_may_be_asked_for_beside_a_gpu(new_gpu: None, bf16_cpu: None) -> None:
    assert resolve_device(TrainerConfig(device="cpu", precision="amp_bf16")) == ("cpu", "fp32", True)


@pytest.mark.parametrize("device", [None, "gpu"])
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_gpu(new_gpu: None, device: str | None, precision: str) -> None:
    """Composer's default on a GPU is fp16, so the precision is always given."""
    trainer = TrainerConfig(device=device, precision=precision)  # type: ignore[arg-type]
    assert resolve_device(trainer) == ("gpu", precision, False)


def test_default_precision_is_bfloat16(new_gpu: None) -> None:
    assert resolve_device(TrainerConfig())[1] == "amp_bf16"


def test_gpu_without_bfloat16_is_told_of_fp16(old_gpu: None) -> None:
    with pytest.raises(UserError, match=r"Old 1080 does not support; set trainer\.precision=amp_fp16"):
        resolve_device(TrainerConfig(precision="amp_bf16"))
    assert resolve_device(TrainerConfig(precision="amp_fp16")) == ("gpu", "amp_fp16", False)


def test_gpu_that_is_not_there(no_gpu: None) -> None:
    with pytest.raises(UserError, match=r"no CUDA device; set trainer\.device=cpu"):
        resolve_device(TrainerConfig(device="gpu"))


def test_fp16_on_a_cpu(no_gpu: None) -> None:
    with pytest.raises(UserError, match="amp_fp16, which is not supported on a CPU"):
        resolve_device(TrainerConfig(precision="amp_fp16"))


def test_bfloat16_on_a_cpu_without_it_names_the_switch(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: False)
    with pytest.raises(UserError, match=r"no instructions .* set trainer\.precision=fp32"):
        resolve_device(TrainerConfig(precision="amp_bf16"))
    assert resolve_device(TrainerConfig(precision="fp32")) == ("cpu", "fp32", False)


def test_what_the_cpu_multiplies_is_what_the_kernel_says() -> None:
    """Compare with the processor flags that Linux lists."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = {flag for line in file if line.startswith("flags") for flag in line.split(":")[1].split()}
    except OSError:
        flags = set()
    if not flags:
        pytest.skip("no list of processor flags")
    assert devices.cpu_multiplies_bfloat16() == bool(flags & {"avx512_bf16", "amx_bf16", "amx_tile"})


def test_automatic_microbatches_need_a_gpu(no_gpu: None) -> None:
    with pytest.raises(UserError, match="device_train_microbatch_size is auto"):
        resolve_device(TrainerConfig(precision="fp32", device_train_microbatch_size="auto"))


@pytest.mark.parametrize("attention", ["varlen", "triton"])
def test_attention_that_needs_cuda(no_gpu: None, attention: str) -> None:
    with pytest.raises(UserError, match=rf"{attention}, which needs CUDA; set trainer\.attention=auto or sdpa"):
        resolve_device(TrainerConfig(precision="fp32", attention=attention))  # type: ignore[arg-type]


def test_varlen_attention_in_fp32(new_gpu: None) -> None:
    with pytest.raises(UserError, match=r"set trainer\.attention=sdpa or trainer\.precision=amp_bf16"):
        resolve_device(TrainerConfig(precision="fp32", attention="varlen"))


def test_automatic_microbatches_on_a_gpu(new_gpu: None) -> None:
    assert resolve_device(TrainerConfig(device_train_microbatch_size="auto"))[0] == "gpu"


class Copies(RunDeviceGPU):
    """A GPU that notes the shape of every tensor it gets."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(tensor.shape))
        return tensor.clone()


def test_views_of_one_tensor_are_copied_at_once() -> None:
    """The four columns of a batch are; microbatches and a single column are not the whole of their tensor."""
    packed = torch.arange(4 * 6 * 2).view(4, 6, 2).clone()
    columns = dict(zip("abcd", packed, strict=True))
    batch = {**columns, "scale": torch.ones(6, 2), "num_tokens": 7}
    for given, shapes in (
        (batch, [(4, 6, 2), (6, 2)]),
        ({name: value[:3] if name in columns else value for name, value in batch.items()}, [(3, 2)] * 4 + [(6, 2)]),
        ({"a": columns["a"], "b": columns["b"]}, [(6, 2)] * 2),
        ({name: columns[name] for name in "bacd"}, [(6, 2)] * 4),  # in another order than that of the tensor
    ):
        device = Copies()
        moved = device.batch_to_device(given)
        assert sorted(device.shapes) == sorted(shapes)
        assert list(moved) == list(given)
        for name, value in given.items():
            assert torch.equal(moved[name], value) if isinstance(value, torch.Tensor) else moved[name] == value
