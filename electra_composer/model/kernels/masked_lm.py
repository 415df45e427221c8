"""Masked-language-model loss and sample in one operation, without logits for the complete batch.

The generator's output layer produces logits `[masked, vocabulary]`, from which a loss and one sample per row are
computed. This would be the largest tensor of a step (ELECTRA-Small at 128 × 128: 2,432 × 30,522, 300 MB in fp32,
several times over in an autograd graph), and everything derived from it is read once. So it is computed in pieces, each
of which is consumed at once for the loss, the sample and the gradients of features, embeddings and bias.

:func:`masked_lm` selects one of two implementations with the same semantics:

* `chunked`: plain PyTorch over chunks of rows, with gradients computed in the forward while a chunk is in the cache.
  Used on CPUs, and as the reference for tests of the other.
* `triton`: CUDA, see masked_lm_triton.py.

Samples come from the inverse CDF in two steps, from one uniform number per row: first the block of 64 tokens in which
the cumulative probability exceeds the number, then the token in the block. Only block sums are accumulated.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from electra_composer.errors import UserError
from electra_composer.model.kernels.masked_lm_chunked import masked_lm_chunked
from electra_composer.model.kernels.sampling import SAMPLING_BLOCK

IMPLEMENTATIONS = ("auto", "chunked", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


class MaskedLM(NamedTuple):
    """Output of :func:`masked_lm` for `M` masked positions."""

    loss: Tensor
    """fp32 scalar: sum of `row_weights` × losses. The only output with a gradient."""
    token_losses: Tensor
    """fp32 `[M]`, without gradient."""
    sampled: Tensor
    """int64 `[M]`."""
    correct: Tensor
    """Booleans `[M]`: no token is more likely than the original."""


def masked_lm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    noise: Tensor,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
    label_smoothing: float = 0.0,
    gumbel: bool = False,
    implementation: str = "auto",
) -> MaskedLM:
    """Compute the cross entropy of `softmax(features · weightᵀ + bias)` with `targets`, and one sample from it per row.

    Under autocast the products use its dtype; probabilities, losses and sums are always fp32.

    Args:
        features: `[M, E]`, floats.
        weight: token embeddings `[P, E]`, floats; `P` is a multiple of :data:`SAMPLING_BLOCK`, at least `vocab_size`.
            Rows from `vocab_size` on are never sampled and get a gradient of zero.
        bias: `[P]`, floats.
        targets: original ids `[M]`, int64, below `vocab_size`.
        row_weights: `[M]`, fp32: 1 for a position in use, 0 for an unused one.
        noise: `[M]`, fp32, uniform in [0, 1), for the inverse CDF. Not read with `gumbel`.
        vocab_size: rows of `weight` that are tokens.
        temperature: the sample is from `softmax(logits / temperature)`; the loss does not depend on it.
        disallow_correct: never sample the original token.
        label_smoothing: fraction of the target spread evenly over the vocabulary, as in `F.cross_entropy`.
        gumbel: sample by Gumbel noise over the vocabulary, from torch's default generator, as the paper's code does.
        implementation: `chunked`, `triton`, or `auto`: triton on CUDA, chunked elsewhere.

    Returns:
        See :class:`MaskedLM`. Gradients are summed in fp32 and have the dtypes of `features`, `weight` and `bias`.

    Raises:
        UserError: an implementation that does not support this device or these sizes.
        ValueError: an embedding table without the required padding.
    """
    if weight.shape[0] % SAMPLING_BLOCK or weight.shape[0] < vocab_size:
        raise ValueError(
            f"{weight.shape[0]} rows of embeddings for {vocab_size} tokens; expected at least as many and a multiple "
            f"of {SAMPLING_BLOCK}: pad the table"
        )
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type):
        features = features.to(torch.get_autocast_dtype(device_type))
    tensors = (features, weight, bias, targets, row_weights, noise)
    options = (vocab_size, temperature, disallow_correct, label_smoothing, gumbel)
    if resolve_implementation(implementation, device_type, *weight.shape) == "triton":
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        # Drawing the seed on the device needs no synchronisation; without `gumbel` it is not read.
        seed = torch.randint(2**31, (1,), device=features.device) if gumbel else targets
        return MaskedLM(*masked_lm_triton(*tensors, seed, *options)[:4])
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, weight, bias))
    return MaskedLM(*masked_lm_chunked(*tensors, *options, with_gradients)[:4])


def resolve_implementation(name: str, device_type: str, rows: int, width: int) -> str:
    """Return `chunked` or `triton` for a value of `objective.masked_lm`.

    Raises:
        UserError: an unknown name, Triton without CUDA or not installed, or embeddings too large for its offsets.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"objective.masked_lm is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "auto":
        name = "triton" if device_type == "cuda" else "chunked"
    if name == "triton":
        # Triton's interpreter, for tests on the CPU, replaces a GPU.
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"objective.masked_lm is triton on {device_type}; it needs CUDA: set objective.masked_lm=chunked"
            )
        if not HAS_TRITON:
            raise UserError(
                "objective.masked_lm is triton, the default on CUDA, and the package triton is missing; "
                "install it, or set objective.masked_lm=chunked (slower)"
            )
        if rows * width >= 2**31:
            raise UserError(
                f"token embeddings of {rows} × {width} are too large for objective.masked_lm=triton; expected fewer "
                "than 2^31 numbers: set objective.masked_lm=chunked, or a smaller model.embedding_size"
            )
    return name
