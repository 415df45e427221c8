"""Trainable parameters stored in a few flat buffers, with flat gradients.

ELECTRA-Small has 306 trainable tensors. Gradient norm, clipping, AdamW, zeroing, averaging over ranks and the casts of
autocast cost one kernel, or one turn of a Python loop, for each of them. With :class:`FlatParameters` they cost one for
each buffer, of which there are four: with and without weight decay, and of each of these the parameters of linear
layers, which autocast casts, and the others.

The buffers are the leaves of the autograd graph. In a forward, every module uses views of the buffers, so that the
backward writes the gradient of a buffer with one concatenation and the buffers of the linear layers are cast once. The
model's parameters remain what checkpoints, exports and callbacks see, with their names and shapes: they are views of
the same memory, and so are their gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Elements to whose multiple every parameter's start is rounded up: 128 bytes in bf16, as tensor cores prefer."""


@torch.library.custom_op("electra_composer::concatenate", mutates_args=())
def concatenate(pieces: list[Tensor]) -> Tensor:
    """Concatenate vectors; opaque to `torch.compile`, which would make one kernel for each of them."""
    return torch.cat(pieces)


@concatenate.register_fake
def _(pieces: list[Tensor]) -> Tensor:
    return pieces[0].new_empty(sum(piece.numel() for piece in pieces))


class _Pieces(torch.autograd.Function):
    """Same as `split_with_sizes` of a vector, with :func:`concatenate` in the backward."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return flat.split_with_sizes(sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return concatenate([gradient.contiguous() for gradient in gradients]), None


class FlatBuffer:
    """Parameters of one optimizer group that are cast alike, one after another in one tensor.

    Args:
        parameters: fp32 on one device; their storage is replaced.
        dtype: to which a forward casts the buffer; None: not at all.

    Attributes:
        flat: fp32 `[elements]`, the leaf of the autograd graph. After a backward, the `grad` of every parameter is a
            view of its `grad`.
        copies_gradients: whether the backward's gradient is copied before it becomes `grad`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None):
        self.parameters = list(parameters)
        self.dtype = dtype
        self.copies_gradients = False
        # Of parameters and of the gaps between them. Where there is no gap there is no piece: the backward of a split
        # makes zeros for each piece that is not used.
        self.sizes: list[int] = []
        self.places: list[int] = []  # of the parameters among the pieces
        for parameter in self.parameters:
            self.places.append(len(self.sizes))
            self.sizes += [size for size in (parameter.numel(), -parameter.numel() % ALIGNMENT) if size]
        first = self.parameters[0]
        self.flat = torch.zeros(sum(self.sizes), dtype=first.dtype, device=first.device)
        for parameter, view in zip(self.parameters, self.views(self.flat), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.flat.requires_grad_()
        self.flat.register_post_accumulate_grad_hook(self.show_gradients)

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Split a tensor with the elements of `flat` into views with the shapes of the parameters."""
        compiled = torch.compiler.is_compiling() and tensor.requires_grad
        pieces = _Pieces.apply(tensor, self.sizes) if compiled else tensor.split_with_sizes(self.sizes)
        return [
            pieces[place].view(parameter.shape) for place, parameter in zip(self.places, self.parameters, strict=True)
        ]

    def show_gradients(self, flat: Tensor) -> None:
        """Let the parameters have views of the gradient of `flat`, which is :attr:`flat`."""
        assert flat.grad is not None
        first = self.parameters[0].grad
        if first is None or first.data_ptr() != flat.grad.data_ptr():  # another backward adds in place
            if self.copies_gradients:
                flat.grad = flat.grad.clone()
            for parameter, view in zip(self.parameters, self.views(flat.grad), strict=True):
                parameter.grad = view

    def zero_grad(self) -> None:
        """Set the gradients to None: until the next backward has them, their memory is free for activations."""
        self.flat.grad = None
        for parameter in self.parameters:
            parameter.grad = None


class FlatParameters:
    """The trainable parameters of a module in flat buffers.

    Args:
        module: on its device. Parameters of no group, such as frozen ones, stay as they are.
        groups: parameters of each optimizer group.
        product_dtype: dtype of matrix products under autocast; None: fp32.

    Attributes:
        buffers: for each group, those of its parameters.
    """

    def __init__(
        self, module: nn.Module, groups: Sequence[Sequence[nn.Parameter]], product_dtype: torch.dtype | None = None
    ):
        self.places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                self.places.setdefault(parameter, []).append((owner, name))
        self.buffers: list[list[FlatBuffer]] = []
        for group in groups:
            cast = [parameter for parameter in group if product_dtype is not None and self._is_of_product(parameter)]
            ids = {id(parameter) for parameter in cast}
            rest = [parameter for parameter in group if id(parameter) not in ids]
            self.buffers.append(
                [FlatBuffer(part, dtype) for part, dtype in ((cast, product_dtype), (rest, None)) if part]
            )

    def _is_of_product(self, parameter: nn.Parameter) -> bool:
        return all(isinstance(owner, nn.Linear) for owner, _ in self.places[parameter])

    @property
    def flats(self) -> list[Tensor]:
        """The buffers' tensors: leaves of the autograd graph, with flat gradients after a backward."""
        return [buffer.flat for buffers in self.buffers for buffer in buffers]

    def show_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Let every buffer and its parameters have these gradients, for which nothing is done where they have them."""
        buffers = (buffer for buffers in self.buffers for buffer in buffers)
        for buffer, gradient in zip(buffers, gradients, strict=True):
            if buffer.flat.grad is not gradient:
                buffer.zero_grad()
                if gradient is not None:
                    buffer.flat.grad = gradient
                    buffer.show_gradients(buffer.flat)

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        for buffers in self.buffers:
            for buffer in buffers:
                buffer.zero_grad()

    def use_in_cuda_graphs(self) -> None:
        """Prepare for a forward and backward that `torch.compile` records as CUDA graphs. Call before the first step.

        The buffers are marked as never moving, or every replay would copy them to static inputs. Gradients are copied,
        since the memory that a graph writes them to is written again by the backward of the next microbatch
        (pytorch#169545).
        """
        for flat in self.flats:
            torch._dynamo.mark_static_address(flat)
        for buffers in self.buffers:
            for buffer in buffers:
                buffer.copies_gradients = True

    def attach(self, module: nn.Module) -> None:
        """Replace the forward of `module`, which contains the parameters, by one that uses views of the buffers."""
        forward: Callable[..., Any] = module.forward

        def flat_forward(*args: Any, **kwargs: Any) -> Any:
            with self.in_modules():
                return forward(*args, **kwargs)

        module.forward = flat_forward

    @contextlib.contextmanager
    def in_modules(self) -> Iterator[None]:
        """Let all modules use views of the buffers, through which gradients reach them."""
        replaced: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        for buffers in self.buffers:
            for buffer in buffers:
                flat = buffer.flat if buffer.dtype is None else buffer.flat.to(buffer.dtype)
                for parameter, view in zip(buffer.parameters, buffer.views(flat), strict=True):
                    for owner, name in self.places[parameter]:
                        owner._parameters[name] = view  # type: ignore[assignment]
                        replaced.append((owner._parameters, name, parameter))
        try:
            yield
        finally:
            for parameters, name, parameter in replaced:
                parameters[name] = parameter
