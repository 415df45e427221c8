"""What this machine can run: the device, and the precision on it."""

from __future__ import annotations

import torch
from composer.utils import dist

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError


def resolve_device(trainer: TrainerConfig) -> tuple[str, str, bool]:
    """Decide where and in which precision a run computes.

    Composer refuses every precision but fp32 on a CPU. bfloat16 is nearly twice as fast there too, so `amp_bf16` on a
    CPU gives Composer fp32 and lets the model's own forward run under CPU autocast.

    Returns:
        `(device, precision, cpu_autocast)`: Composer's device name (`cpu` or `gpu`), the precision to give Composer,
        and whether the model applies bfloat16 autocast itself.

    Raises:
        UserError: a device that is not there, or a precision that it cannot do.
    """
    device = trainer.device or ("gpu" if torch.cuda.is_available() else "cpu")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError(
            "trainer.device is gpu, but torch sees no CUDA device; set trainer.device=cpu or mend the driver"
        )
    if device == "gpu":
        if trainer.precision == "amp_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name()
            raise UserError(f"trainer.precision is amp_bf16, which {name} cannot do; set trainer.precision=amp_fp16")
        return device, trainer.precision, False
    if trainer.precision == "amp_fp16":
        raise UserError("trainer.precision is amp_fp16, which a CPU cannot do; set trainer.precision=amp_bf16 or fp32")
    if trainer.device_train_microbatch_size == "auto":
        raise UserError(
            "trainer.device_train_microbatch_size is auto, which is found by running out of GPU memory; "
            "on a CPU give a number, or null for no split"
        )
    return device, "fp32", trainer.precision == "amp_bf16"


def fsdp_gradient_factor(trainer: TrainerConfig) -> float:
    """What gradients must be multiplied by, because the backend may add up where FSDP asks it to average.

    FSDP2 averages gradients in its reduce-scatter. gloo, of the CPU, adds them up instead, without a word (torch 2.7):
    they are as many times too large as there are processes, which Adam hides and gradient clipping does not. So the
    backend is asked rather than known: the average of ones is one.

    Call it when the processes have joined.
    """
    if trainer.fsdp is None or dist.get_world_size() == 1:
        return 1.0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ones, average = torch.ones(dist.get_world_size(), device=device), torch.zeros(1, device=device)
    torch.distributed.reduce_scatter_tensor(average, ones, op=torch.distributed.ReduceOp.AVG)
    return 1.0 / average.item()
