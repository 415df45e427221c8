"""`torch.compile`: checks before the model is built, compilation of the model, and its errors in one line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch._dynamo.exc import TorchDynamoException

from electra_composer.compilers import (
    describe_operators_briefly,
    keep_compiled_code,
    missing_for_cpp,
    missing_for_triton,
)
from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import Layer
from electra_composer.model.flat_parameters import FlatParameters
from electra_composer.training.devices import resolve_device

MODES_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def check_compile(trainer: TrainerConfig) -> None:
    """Refuse `torch.compile` on a machine without the compilers it needs, unless it is `auto`.

    Raises:
        UserError: naming trainer.compile.
    """
    if trainer.compile and trainer.compile != "auto":
        missing = missing_compiler(resolve_device(trainer)[0])
        if missing is not None:
            raise UserError(
                f"trainer.compile is {trainer.compile} and the machine lacks {missing}; install it or set "
                "trainer.compile=false"
            )


def missing_compiler(device: str) -> str | None:
    """Return what the machine lacks to compile for a device, and how to get it; None if nothing.

    Args:
        device: `cpu` or `gpu`.
    """
    if device == "cpu":
        return missing_for_cpp()
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return f"a GPU of compute capability 7.0, as Triton needs (this one has {major}.{minor})"
    return missing_for_triton()


def choose_compile(trainer: TrainerConfig, static_shapes: bool) -> tuple[bool | str, str | None]:
    """Resolve `trainer.compile`: `auto` compiles on a GPU if all batches of a loader have one length.

    `auto` is the default mode. It merges operators into few kernels, compiles in a minute or less, and leaves the
    launches to a CUDA graph of the whole step. Of the other modes, `reduce-overhead` records CUDA graphs of its own, of
    the forward and of the backward, which exclude one of the whole step, and `max-autotune` compiles for many minutes.

    Batches of varying length, as in finetuning, would need a compilation for symbolic lengths in every run, which takes
    longer than many tasks train.

    Returns:
        The mode, true for the default mode, or false; and, where it should be said, the reason, else None.
    """
    if trainer.compile != "auto":
        return trainer.compile, "trainer.compile" if trainer.compile else None
    if not static_shapes or (device := resolve_device(trainer)[0]) == "cpu":
        return False, None
    missing = missing_compiler(device)
    if missing is not None:
        return False, f"the machine lacks {missing}; without it, steps take several times as long"
    return True, "the default on a GPU"


def compile_config(trainer: TrainerConfig, static_shapes: bool) -> dict[str, Any] | None:
    """Return the arguments of `torch.compile`, with which a graph break is an error; None: do not compile."""
    choice, _ = choose_compile(trainer, static_shapes)
    if not choice:
        return None
    mode = {"mode": choice} if isinstance(choice, str) else {}
    return {"fullgraph": True, "dynamic": not static_shapes, **mode}


def compile_model(
    model: ComposerModel, trainer: TrainerConfig, static_shapes: bool, flat: FlatParameters | None = None
) -> None:
    """Compile the model in place if `trainer.compile` says so. Call before the trainer wraps the model.

    On one rank and on replicas the complete forward is one graph. If there is DDP, the compiler splits it at the
    buckets. Under FSDP each Transformer layer is one graph, since it is the unit that is gathered and freed;
    embeddings, heads and losses are not compiled.

    Args:
        model: not wrapped yet; its `forward`, or that of its layers, is replaced.
        trainer: uses `compile` and `fsdp`.
        static_shapes: whether all batches of a loader have one length.
        flat: the model's flat parameters, if it has any.
    """
    arguments = compile_config(trainer, static_shapes)
    if arguments is None:
        return
    keep_compiled_code()
    describe_operators_briefly()
    if flat is not None and flat.flats[0].is_cuda and trainer.compile in MODES_WITH_CUDA_GRAPHS:
        flat.use_in_cuda_graphs()
    # Workaround (torch 2.7): all layers share one compiled function, and its variants (training and evaluation, two
    # widths, a smaller last batch) reach the limit of 8, a private setting; goes when torch.compile takes a limit.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # Workaround (composer 0.32): Trainer's `compile_config` compiles the model after wrapping it, which with DDP's and
    # FSDP's hooks is not one graph (torch 2.7); goes when it compiles inside of the wrapper.
    parts = [module for module in model.modules() if isinstance(module, Layer)] if trainer.fsdp is not None else [model]
    for part in parts:
        part.forward = torch.compile(part.forward, **arguments)  # type: ignore[method-assign]


class CompileReport(Callback):
    """Prints on rank 0 whether the model is compiled and why, and how long the first batch took, which compiles it.

    Args:
        choice, reason: from :func:`choose_compile`.
    """

    def __init__(self, choice: bool | str, reason: str | None) -> None:
        self.choice, self.reason = choice, reason
        self.started = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.reason is not None and dist.get_global_rank() == 0:
            choice = "off" if not self.choice else "on" if self.choice is True else self.choice
            wait = "; the first batch includes the compilation" if self.choice else ""
            print(f"compile: {choice} ({self.reason}){wait}", flush=True)
        self.started = time.perf_counter()
        if not self.choice:
            state.callbacks.remove(self)

    def batch_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            print(f"compiled in {time.perf_counter() - self.started:.0f} s", flush=True)
        state.callbacks.remove(self)  # no call in later batches


@contextlib.contextmanager
def explain_compile_errors() -> Iterator[None]:
    """Turn errors of `torch.compile`, in the first batch or later, into one-line errors that name trainer.compile.

    Raises:
        UserError: compilation failed.
    """
    try:
        yield
    # Workaround (torch 2.7): the base class of compiler errors is private; goes when torch.compiler exports one.
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"trainer.compile: torch.compile failed: {reason.strip()}; set trainer.compile=false, or another mode"
        ) from error
