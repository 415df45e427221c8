"""Choices that depend on the machine: device and precision."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
from composer.devices import Device, DeviceGPU
from composer.utils import collect_env, dist, get_device

from electra_composer.config import RunConfig, TrainerConfig
from electra_composer.errors import UserError

Result = TypeVar("Result")


def choose_device(wanted: str | None, key: str) -> str:
    """Return Composer's name of the device to use, `gpu` or `cpu`: the one that is wanted, else a GPU if there is one.

    Args:
        key: key or option of `wanted`, for messages.

    Raises:
        UserError: there is no GPU.
    """
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError(f"{key} is gpu, but torch sees no CUDA device; set {key}=cpu or fix the driver")
    return wanted or ("gpu" if torch.cuda.is_available() else "cpu")


def resolve_device(trainer: TrainerConfig) -> tuple[str, str, bool]:
    """Choose device and precision of a run.

    Returns:
        `(device, precision, cpu_autocast)`: Composer's device name (`cpu` or `gpu`), the precision for Composer, and
        whether the model applies bfloat16 autocast itself. On a CPU `amp_bf16` becomes fp32 for Composer and CPU
        autocast in the model's forward, nearly twice as fast as fp32 if the CPU has bfloat16 products.

    Raises:
        UserError: a device that is missing, or a precision that it does not support.
    """
    device = choose_device(trainer.device, "trainer.device")
    if device == "gpu":
        if trainer.attention == "varlen" and trainer.precision == "fp32":
            raise UserError(
                "trainer.attention is varlen, which needs bf16 or fp16, and trainer.precision is fp32; "
                "set trainer.attention=sdpa or trainer.precision=amp_bf16"
            )
        if trainer.precision == "amp_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name()
            raise UserError(
                f"trainer.precision is amp_bf16, which {name} does not support; set trainer.precision=amp_fp16"
            )
        return device, trainer.precision, False
    if trainer.precision == "amp_fp16":
        raise UserError(
            "trainer.precision is amp_fp16, which is not supported on a CPU; set trainer.precision=amp_bf16 or fp32"
        )
    if trainer.precision == "amp_bf16" and not cpu_multiplies_bfloat16():
        raise UserError(
            "trainer.precision is amp_bf16, for which this CPU has no instructions (AVX512-BF16 or AMX): it would be "
            "many times slower than fp32; set trainer.precision=fp32"
        )
    if trainer.attention in ("varlen", "triton"):
        raise UserError(
            f"trainer.attention is {trainer.attention}, which needs CUDA; set trainer.attention=auto or sdpa"
        )
    if trainer.device_train_microbatch_size == "auto":
        raise UserError(
            "trainer.device_train_microbatch_size is auto, which is found by running out of GPU memory; "
            "on a CPU set a number, or null for no split"
        )
    # Workaround (composer 0.32): Trainer refuses every precision but fp32 on a CPU; goes when it takes amp_bf16.
    return device, "fp32", trainer.precision == "amp_bf16"


def hide_unused_gpus(entry_point: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate the entry point of a run so that libraries find no GPU while the run is on the CPU of a GPU machine."""

    # Workaround (composer 0.32): Composer, Streaming and torch.distributed.checkpoint ask whether the machine has a
    # GPU, not whether the run uses it: every run starts CUDA to log the GPU's name, and under FSDP on the CPU a step
    # fails, since it reads statistics of CUDA. Goes when they ask for the device of the run.
    @functools.wraps(entry_point)
    def wrapper(config: RunConfig, *arguments: Any, **options: Any) -> Result:
        if config.trainer.device != "cpu":
            return entry_point(config, *arguments, **options)
        with (
            mock.patch.object(torch.cuda, "is_available", return_value=False),
            mock.patch.object(torch.accelerator, "is_available", return_value=False),  # torch 2.15's optimizers
            mock.patch.object(collect_env, "cuda_available", return_value=False),  # the same, imported by name
        ):
            return entry_point(config, *arguments, **options)

    return wrapper


class RunDeviceGPU(DeviceGPU):
    """DeviceGPU that leaves host-side scalars on the host, saving a copy and a synchronisation per batch."""

    # Workaround (composer 0.32): Trainer copies the size of each batch and flags such as "last batch" to the GPU and
    # reads them back; goes when it keeps them on the host. The process group has gloo beside NCCL, so that such scalars
    # are reduced on the host.

    dist_backend = "cuda:nccl,cpu:gloo"

    def batch_to_device(self, batch: Any) -> Any:
        """Copy a batch to the GPU, tensors that together are the whole of another one by one copy of that."""
        if not isinstance(batch, dict):
            return super().batch_to_device(batch)
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        copied = super().batch_to_device({name: value for name, value in batch.items() if name not in tensors})
        for names, whole in whole_tensors(tensors).items():
            copy = self.tensor_to_device(whole)
            copied |= dict(zip(names, copy if len(names) > 1 else [copy], strict=True))
        return {name: copied[name] for name in batch}

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the GPU, except scalars (0-d) and flags (one uint8), which stay on the host."""
        is_flag = tensor.dtype == torch.uint8 and tensor.numel() == 1
        if tensor.dim() == 0 or is_flag:
            return tensor
        return super().tensor_to_device(tensor)


def whole_tensors(tensors: dict[str, torch.Tensor]) -> dict[tuple[str, ...], torch.Tensor]:
    """Return the tensors to copy instead of each of these: where several are all of the parts of one, that one.

    A batch of packed rows is one tensor `[4, rows, length]`, of which its four tensors are the parts.

    Returns:
        names → tensor. With several names, `tensor[i]` is that of the i-th name.
    """
    wholes: dict[tuple[str, ...], torch.Tensor] = {}
    bases = {name: tensor._base for name, tensor in tensors.items() if tensor._base is not None}
    for whole in {id(base): base for base in bases.values()}.values():
        names = tuple(name for name, base in bases.items() if base is whole)
        if len(names) > 1 and len(whole) == len(names) and all(map(_is_same, whole, (tensors[n] for n in names))):
            wholes[names] = whole
    together = {name for names in wholes for name in names}
    return wholes | {(name,): tensor for name, tensor in tensors.items() if name not in together}


def _is_same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.shape == right.shape and left.stride() == right.stride()


def run_device(name: str) -> Device:
    """Return the Composer device `gpu` or `cpu`, for the process group and for the trainer, which must agree."""
    return RunDeviceGPU() if name == "gpu" else get_device(name)


def fsdp_gradient_factor(trainer: TrainerConfig) -> float:
    """Return the factor by which gradients must be multiplied where the backend sums instead of averaging.

    1.0 without FSDP. Measured, not known by backend: the average of ones is one. Collective: call on all ranks after
    the process group is initialised.
    """
    if trainer.fsdp is None or dist.get_world_size() == 1:
        return 1.0
    # Workaround (torch 2.7): FSDP2 averages gradients in its reduce-scatter, for which gloo silently returns the sum.
    # Gradients are then too large by the number of ranks, which Adam hides and gradient clipping does not. Goes when
    # gloo averages or refuses.
    device = torch.device("cuda" if resolve_device(trainer)[0] == "gpu" else "cpu")
    ones, average = torch.ones(dist.get_world_size(), device=device), torch.zeros(1, device=device)
    torch.distributed.reduce_scatter_tensor(average, ones, op=torch.distributed.ReduceOp.AVG)
    return 1.0 / average.item()


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 products. Without, torch emulates them: 13 × slower than fp32 with AVX2."""
    # Workaround (torch 2.7): the queries of CPU instructions are private; goes when torch.cpu has public ones.
    if platform.machine().lower() in ("x86_64", "amd64"):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
