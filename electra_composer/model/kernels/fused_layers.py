"""Choice between PyTorch's operators and Triton kernels around the matrix products of a Transformer layer.

* `torch`: LayerNorm, GELU, dropout and embedding lookups by PyTorch. Any device; the reference for tests.
* `triton`: CUDA, see layers_triton.py and embeddings_triton.py. The bias of a linear layer is added by the kernel that
  follows, so that its gradient is one of the sums that kernel's backward makes.

Under autocast, `triton` keeps activations, the residual stream included, in the dtype of the matrix products, as
Composer's `LowPrecisionLayerNorm` does; sums, statistics and LayerNorm's weights are fp32, and each result is rounded
once. `torch` does the same on a CPU; on CUDA, autocast runs LayerNorm in fp32 and its result is cast for the next
product.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.errors import UserError
from electra_composer.model.kernels.masked_lm import HAS_TRITON

IMPLEMENTATIONS = ("auto", "torch", "triton")

Hidden = tuple[Tensor, Tensor]
"""Hidden states `[rows, length, width]` twice: for the next residual and for the next matrix product. The backward of
the operator that returns both gets both gradients and adds them, which would otherwise take a kernel."""


def resolve_layer_kernels(name: str, device_type: str) -> str:
    """Return `torch` or `triton` for a value of `trainer.layer_kernels`.

    Raises:
        UserError: an unknown name, or Triton without CUDA or not installed.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"trainer.layer_kernels is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "auto":
        name = "triton" if device_type == "cuda" else "torch"
    # Triton's interpreter, for tests on the CPU, replaces a GPU.
    if name == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"trainer.layer_kernels is triton on {device_type}; it needs CUDA: set trainer.layer_kernels=torch"
        )
    if name == "triton" and not HAS_TRITON:
        raise UserError(
            "trainer.layer_kernels is triton, the default on CUDA, and the package triton is missing; "
            "install it, or set trainer.layer_kernels=torch (slower)"
        )
    return name


def use_layer_kernels(model: nn.Module, name: str) -> None:
    """Set the implementation of all embeddings, layers and heads of a model: `torch` or `triton`."""
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = name == "triton"  # type: ignore[assignment]


def draw_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Draw seeds of dropout, int64 `[1]` each, from torch's generator of the device, without waiting for it."""
    return torch.randint(2**62, (count,), device=device).split(1)


def linear_norm(
    x: Tensor, linear: nn.Linear, residual: Tensor, norm: nn.LayerNorm, seed: Tensor | None, p: float
) -> Hidden:
    """Compute `norm(residual + dropout(linear(x)))`; without a seed there is no dropout.

    `x [..., inputs]`, `residual [..., outputs]`; see :func:`layers_triton.add_norm`.
    """
    from electra_composer.model.kernels.layers_triton import add_norm

    product = F.linear(x, linear.weight)
    return add_norm(product, linear.bias, residual, norm.weight, norm.bias, seed, p, norm.eps)[:2]


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Compute `norm(x)` in the dtype of `x`."""
    from electra_composer.model.kernels.layers_triton import add_norm

    return add_norm(x, None, None, norm.weight, norm.bias, None, 0.0, norm.eps)[1]


def linear_gelu(x: Tensor, linear: nn.Linear) -> Tensor:
    """Compute `gelu(linear(x))`, exact: `[..., inputs]` → `[..., outputs]`."""
    from electra_composer.model.kernels.layers_triton import gelu_bias

    return gelu_bias(F.linear(x, linear.weight), linear.bias)


def embed(
    tables: tuple[Tensor, Tensor, Tensor],
    ids: tuple[Tensor, Tensor, Tensor],
    norm: nn.LayerNorm,
    seed: Tensor | None,
    p: float,
) -> Hidden:
    """Compute `dropout(norm(sum of embeddings))` in autocast's dtype.

    `tables`, floats `[entries, width]`, and `ids`, integers `[rows, length]`: of tokens, positions and token types.
    """
    from electra_composer.model.kernels import embeddings_triton

    device_type = ids[0].device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tables[0].dtype
    return embeddings_triton.embed(*tables, *ids, norm.weight, norm.bias, seed, p, norm.eps, dtype)[:2]
