"""What this machine can run, and how it runs it best: device, precision, attention path, memory allocator."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable

import torch
from composer.utils import dist

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.kernels.attention import attention, pattern_of


def resolve_device(trainer: TrainerConfig) -> tuple[str, str, bool]:
    """Decide where and in which precision a run computes.

    Composer refuses every precision but fp32 on a CPU. Where the CPU multiplies bfloat16 itself, it is nearly twice as
    fast there too, so `amp_bf16` on a CPU gives Composer fp32 and lets the model's own forward run under CPU autocast.

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
        if trainer.attention == "varlen" and trainer.precision == "fp32":
            raise UserError(
                "trainer.attention is varlen, which computes in bf16 or fp16, and trainer.precision is fp32; "
                "set trainer.attention=sdpa or trainer.precision=amp_bf16"
            )
        if trainer.precision == "amp_bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name()
            raise UserError(f"trainer.precision is amp_bf16, which {name} cannot do; set trainer.precision=amp_fp16")
        return device, trainer.precision, False
    if trainer.precision == "amp_fp16":
        raise UserError("trainer.precision is amp_fp16, which a CPU cannot do; set trainer.precision=amp_bf16 or fp32")
    if trainer.precision == "amp_bf16" and not cpu_multiplies_bfloat16():
        raise UserError(
            "trainer.precision is amp_bf16, for which this CPU has no instructions (AVX512-BF16 or AMX): it would be "
            "many times slower than fp32; set trainer.precision=fp32"
        )
    if trainer.attention == "varlen":
        raise UserError("trainer.attention is varlen, which needs CUDA; set trainer.attention=auto or sdpa")
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


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products. Without, torch emulates them: 13 × slower than fp32 on an AVX2 machine."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check)() for check in checks if hasattr(torch.cpu, check))
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Of glibc's malloc.h: mallopt(parameter, value).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory that a step frees for the next step, instead of handing it back to the system.

    A step on a CPU allocates and frees gigabytes; each page that comes back from the system costs a fault, together a
    quarter of a small model's step. The price: the process keeps its peak. CUDA has an allocator of its own.

    Returns:
        Whether there is a glibc, and it did.
    """
    return set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26})


def set_malloc(settings: dict[int, int]) -> bool:
    """Call glibc's `mallopt` for each of `settings`; whether there is a glibc, and it took all of them."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return [mallopt(parameter, value) for parameter, value in settings.items()] == [1] * len(settings)


def choose_attention(trainer: TrainerConfig, encoder: EncoderConfig, rows: int, length: int) -> tuple[str, str]:
    """The attention path of a run (see kernels/attention.py).

    On CUDA in half precision, `auto` runs one layer of both paths forward and backward on a batch of the run's own
    shape and takes the faster; the first process decides for all.

    Args:
        trainer: checked by :func:`resolve_device`.
        encoder: the discriminator's sizes.
        rows: of a microbatch.
        length: of a row, in tokens.

    Returns:
        `sdpa` or `varlen`, and the reason, for the log.
    """
    if trainer.attention != "auto":
        return trainer.attention, "trainer.attention"
    device, precision, _ = resolve_device(trainer)
    if device == "cpu":
        return "sdpa", "the path of CPUs"
    if precision == "fp32":
        return "sdpa", "the path of fp32"
    choice = [("", "")]
    if dist.get_global_rank() == 0:
        dtype = torch.bfloat16 if precision == "amp_bf16" else torch.float16
        qkv = torch.randn(rows, length, 3 * encoder.hidden_size, device="cuda", dtype=dtype, requires_grad=True)
        # Two examples in a row, the second half as long: packed rows hold one or a few.
        ids = (torch.arange(length, device="cuda") >= length * 2 // 3).long().add(1).expand(rows, length).contiguous()

        def run(path: str) -> Callable[[], object]:
            heads, dropout = encoder.num_heads, encoder.attention_dropout
            return lambda: attention(qkv, pattern_of(ids, path), heads, dropout).sum().backward()

        choice = [faster({path: run(path) for path in ("sdpa", "varlen")}, torch.cuda.synchronize)]
    dist.broadcast_object_list(choice)
    return choice[0]


def faster(paths: dict[str, Callable[[], object]], wait: Callable[[], None], repeats: int = 10) -> tuple[str, str]:
    """The path of the smallest median time, and all times (or why a path could not run) in words.

    Raises:
        RuntimeError: none of them runs.
    """
    times: dict[str, list[float]] = {path: [] for path in paths}
    failed: dict[str, str] = {}
    for _ in range(3 + repeats):
        for path, run in paths.items():
            if path in failed:
                continue
            try:
                wait()
                start = time.perf_counter()
                run()
                wait()
                times[path].append(time.perf_counter() - start)
            except RuntimeError as error:  # NotImplementedError, out of memory and kernels that refuse are among them
                failed[path] = str(error).splitlines()[0]
    medians = {path: sorted(times[path][3:])[repeats // 2] for path in paths if path not in failed}
    words = [f"{path} {1e3 * medians[path]:.2f} ms" if path in medians else f"{path}: {failed[path]}" for path in paths]
    if not medians:
        raise RuntimeError(f"no path of attention runs here: {'; '.join(words)}")
    return min(medians, key=lambda path: medians[path]), "measured: " + ", ".join(words)
