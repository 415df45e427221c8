"""A stand-in on the CPU for a CUDA graph: records operators and repeats them on the same memory.

What it has in common with `torch.cuda.CUDAGraph`, and so can be tested without a GPU: Python runs only while recording;
recording changes no tensor that existed before; each launch reads and writes the addresses of the recording; numbers of
the host are those of the recording; random numbers are those of the default generator at the launch; and an operator
that waits for the device cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

T = TypeVar("T")

WAITING = {
    "aten::_local_scalar_dense",  # item, int, float, bool, tolist
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}


class NoHost(TorchFunctionMode):
    """Refuses what copies a tensor to the host, which for a tensor on the CPU is no operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Carries out operators, and keeps them with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.results: dict[int, Tensor] = {}  # by the address of their storage; kept, so that addresses stay theirs
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}  # of storages that were there before: tensor and its copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in written(func, args, kwargs):
            if address(tensor) not in self.results and address(tensor) not in self.saved:
                whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
                self.saved[address(tensor)] = (whole, whole.clone())
        result = func(*args, **kwargs)
        inputs = {address(tensor) for tensor in tensors_in((args, kwargs))}
        made = [tensor for tensor in tensors_in(result) if address(tensor) not in inputs]
        self.calls.append((func, args, kwargs, tensors_in(result) if made else []))
        for tensor in made:
            self.results[address(tensor)] = tensor
        return result

    def restore(self) -> None:
        for tensor, copy in self.saved.values():
            tensor.copy_(copy)

    def repeat(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(results, tensors_in(again), strict=False):
                old.copy_(new)


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operator would wait for a GPU."""
    if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return func._schema.name in WAITING


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape:
    """A :class:`~electra_composer.training.device_graph.DeviceGraph` that repeats operators.

    Attributes:
        launches: how often all tapes were launched.
        runs: how often all have run a function without recording it.
    """

    launches = 0
    runs = 0

    def __init__(self) -> None:
        self.recorder = Recorder()

    def run(self, function: Callable[[], T]) -> T:
        Tape.runs += 1
        return function()

    def record(self, function: Callable[[], T]) -> T:
        random = torch.get_rng_state()
        try:
            with NoHost(), self.recorder:
                return function()
        finally:
            self.recorder.restore()
            torch.set_rng_state(random)

    def launch(self) -> None:
        Tape.launches += 1
        with torch.no_grad():
            self.recorder.repeat()
