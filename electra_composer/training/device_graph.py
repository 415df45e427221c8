"""Sequences of a device's operations that are recorded once and launched as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class DeviceGraph(Protocol):
    """A sequence of operations of a device that can be repeated."""

    def run(self, function: Callable[[], T]) -> T:
        """Run a function without recording it, in a way that allows to record it later."""

    def record(self, function: Callable[[], T]) -> T:
        """Record the operations of a function, which are not carried out yet. Each launch writes what it returns."""

    def launch(self) -> None:
        """Carry out the recorded operations, on the same memory each time."""


class CudaGraph:
    """A :class:`DeviceGraph` of `torch.cuda.CUDAGraph`.

    All graphs, and the steps before them, use one stream of their own: autograd accumulates gradients on the stream of
    the first backward, and a recording may not wait for another stream. Random numbers are those of the default
    generator at the launch, which PyTorch registers with every graph.
    """

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.stream = _stream(torch.cuda.current_device())

    def run(self, function: Callable[[], T]) -> T:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], T]) -> T:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.get_state()
        try:
            # Only this thread's calls count: the loader's thread allocates pinned memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                return function()
        except BaseException:
            # Workaround (torch 2.7): after a recording that failed, the generator takes itself to be in a recording and
            # refuses to draw, so it gets a new state with the old content; goes when a failed recording ends.
            fresh = torch.Generator(generator.device)
            fresh.set_state(before)
            generator.graphsafe_set_state(fresh)
            raise

    def launch(self) -> None:
        self.graph.replay()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


GRAPHS: dict[str, type[DeviceGraph]] = {"gpu": CudaGraph}
"""Kind of graph for each of Composer's devices that has one."""
