"""Masked-language-model loss and sample in one, without logits for the whole batch.

A generator's last product meets the vocabulary: `[masked, vocabulary]` logits, a loss over them and one draw from them.
That tensor is larger than all others of a step together (ELECTRA-Small at 128 × 128: 2,432 × 30,522, 300 MB in fp32,
and an autograd graph holds it several times over), and everything made from it is read once. So it is made in pieces
which are used up at once: loss, sample, and the gradients of features, embeddings and bias.

:func:`masked_lm` is what the model calls. Two implementations stand behind it, with one signature and one meaning:

* `chunked`: plain PyTorch over chunks of rows, gradients taken in the forward pass while a chunk is in the cache. It
  serves the CPU, and is what the other is tested against.
* `triton`: CUDA, see masked_lm_triton.py.

Sampling is by inverse CDF in two steps, from one uniform number per row: first the block of 64 tokens in which the
cumulative probability passes the number, then the token in the block. Only block sums are ever accumulated.
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
    """What comes out of :func:`masked_lm`, for `M` masked positions."""

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
    """Cross entropy of `softmax(features · weightᵀ + bias)` against `targets`, and one draw from it, for every row.

    Under autocast the products are computed in its dtype; probabilities, losses and sums are fp32 always.

    Args:
        features: `[M, E]`, floats.
        weight: token embeddings `[P, E]`, floats; `P` is a multiple of :data:`SAMPLING_BLOCK`, at least `vocab_size`.
            Rows from `vocab_size` on are never drawn and get a gradient of zero.
        bias: `[P]`, floats.
        targets: original ids `[M]`, int64, below `vocab_size`.
        row_weights: `[M]`, fp32: 1 for a position in use, 0 for an unused one.
        noise: `[M]`, fp32, uniform in [0, 1): the sample's number. Not read where `gumbel` is set.
        vocab_size: rows of `weight` that are tokens.
        temperature: the sample is drawn from `softmax(logits / temperature)`; the loss knows nothing of it.
        disallow_correct: never draw the original token.
        label_smoothing: share of the target spread evenly over the vocabulary, as in `F.cross_entropy`.
        gumbel: draw by noise over the whole vocabulary, from torch's default generator, as the paper's code does.
        implementation: `chunked`, `triton`, or `auto`: triton on CUDA, chunked elsewhere.

    Returns:
        See :class:`MaskedLM`. Gradients are summed in fp32 and have the dtypes of `features`, `weight` and `bias`.

    Raises:
        UserError: an implementation that cannot serve this device or these sizes.
        ValueError: a table of embeddings without the padding that this needs.
    """
    if weight.shape[0] % SAMPLING_BLOCK or weight.shape[0] < vocab_size:
        raise ValueError(
            f"{weight.shape[0]} rows of embeddings for {vocab_size} tokens; expected at least as many and a multiple "
            f"of {SAMPLING_BLOCK}: pad the table"
        )
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type):
        features = features.to(torch.get_autocast_dtype(device_type))
    options = (vocab_size, temperature, disallow_correct, label_smoothing, gumbel)
    if resolve_implementation(implementation, device_type, weight.shape[0], weight.shape[1]) == "triton":
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        # A seed on the device costs no wait for it; without `gumbel` nothing reads it.
        seed = torch.randint(2**31, (1,), device=features.device) if gumbel else targets
        loss, token_losses, sampled, correct, _ = masked_lm_triton(
            features, weight, bias, targets, row_weights, noise, seed, *options
        )
        return MaskedLM(loss, token_losses, sampled, correct)
    with_gradients = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or bias.requires_grad)
    outputs = masked_lm_chunked(features, weight, bias, targets, row_weights, noise, *options, with_gradients)
    return MaskedLM(*outputs[:4])


def resolve_implementation(name: str, device_type: str, rows: int, width: int) -> str:
    """`chunked` or `triton` for a name of the configuration.

    Raises:
        UserError: an unknown name, Triton without CUDA or not installed, or embeddings beyond the kernel's offsets.
    """
    if name not in IMPLEMENTATIONS:
        raise UserError(f"objective.masked_lm is {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "auto":
        name = "triton" if device_type == "cuda" else "chunked"
    if name == "triton":
        if device_type != "cuda" and not _interpreted():
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
                f"token embeddings of {rows} × {width} are too many for objective.masked_lm=triton; expected less than "
                "2^31 numbers: set objective.masked_lm=chunked, or a smaller model.embedding_size"
            )
    return name


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU: tests on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
