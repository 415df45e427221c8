"""`torch.compile`: checks before the model is built, compilation of the model, and its errors in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from composer.models import ComposerModel
from torch._dynamo.exc import TorchDynamoException

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import Layer
from electra_composer.model.flat_parameters import FlatParameters
from electra_composer.training.devices import resolve_device

MODES_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile(trainer: TrainerConfig) -> None:
    """Refuse unknown modes of `torch.compile`, and a CPU without a C++ compiler.

    Raises:
        UserError: naming trainer.compile.
    """
    if isinstance(trainer.compile, str) and trainer.compile not in COMPILE_MODES:
        raise UserError(
            f"trainer.compile is {trainer.compile!r}; expected true, false or one of {', '.join(COMPILE_MODES)}"
        )
    if trainer.compile and resolve_device(trainer)[0] == "cpu":
        # Workaround (torch 2.7): only private modules tell before compilation whether there is a C++ compiler; goes
        # when torch.compiler does.
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise UserError(
                "trainer.compile needs a C++ compiler on a CPU, and there is none; "
                "install g++ or set trainer.compile=false"
            ) from error


def compile_config(trainer: TrainerConfig, static_shapes: bool) -> dict[str, Any] | None:
    """Return the arguments of `torch.compile`, with which a graph break is an error; None: do not compile."""
    if not trainer.compile:
        return None
    mode = {"mode": trainer.compile} if isinstance(trainer.compile, str) else {}
    return {"fullgraph": True, "dynamic": not static_shapes, **mode}


def compile_model(
    model: ComposerModel, trainer: TrainerConfig, static_shapes: bool, flat: FlatParameters | None = None
) -> None:
    """Compile the model in place if `trainer.compile` is set. Call before the trainer wraps the model.

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
