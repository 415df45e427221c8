"""Masked-language-model loss and sample in one operation, without logits for the complete batch.

The generator's output layer produces logits `[masked, vocabulary]`, from which a loss and one sample per row are
computed. This would be the largest tensor of a step (ELECTRA-Small at 128 × 128: 2,432 × 30,522, 300 MB in fp32,
several times over in an autograd graph), and everything derived from it is read once. So it is computed in pieces, each
of which is consumed at once for the loss, the sample and the gradients of features, embeddings and bias.

:func:`masked_lm` selects one of two implementations with the same semantics:

* `chunked`: plain PyTorch over chunks of rows, with gradients computed in the forward while a chunk is in the cache.
  Used on CPUs, and as the reference for tests of the other.
* `triton`: CUDA, see masked_lm_triton.py.

With the logits of a copy mechanism the distribution is a mixture of the softmax and the input token, for models that
predict every token: copy_mechanism.py.

Samples come from the inverse CDF in two steps, from one uniform number per row: first the block of 64 tokens in which
the cumulative probability exceeds the number, then the token in the block. Only block sums are accumulated.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from electra_composer.errors import UserError
from electra_composer.model.kernels.copy_mechanism import log_odds_of_copies, mixture_losses
from electra_composer.model.kernels.masked_lm_chunked import masked_lm_chunked
from electra_composer.model.kernels.sampling import SAMPLING_BLOCK

IMPLEMENTATIONS = ("auto", "chunked", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None


class MaskedLM(NamedTuple):
    """Output of :func:`masked_lm` for `M` positions."""

    loss: Tensor
    """fp32 scalar: sum of `row_weights` × losses. The only output with a gradient."""
    token_losses: Tensor
    """fp32 `[M]`, without gradient."""
    sampled: Tensor
    """int64 `[M]`."""
    correct: Tensor
    """Booleans `[M]`: no token is more likely than the original. With a copy mechanism: the prediction is the original,
    where it is the input token if the copy probability exceeds 1/2, and the softmax's most likely token otherwise."""


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
    copy_logits: Tensor | None = None,
    copied: Tensor | None = None,
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
        copy_logits: `[M]`, floats c. The losses are then -log(D [x = t] + (1 - D) p(t)) with D = sigmoid(c), softmax p,
            target t and input token x (paper, section 3.4). The samples remain those of p.
        copied: `[M]`, booleans x = t; with `copy_logits`.

    Returns:
        See :class:`MaskedLM`. Gradients are summed in fp32 and have the dtypes of their inputs.

    Raises:
        UserError: an implementation that does not support this device or these sizes.
        ValueError: an embedding table without the required padding; `copy_logits` with label smoothing, or one of
            `copy_logits` and `copied` alone.
    """
    _check(weight.shape[0], vocab_size, label_smoothing, copy_logits, copied)
    device_type = features.device.type
    if torch.is_autocast_enabled(device_type):
        features = features.to(torch.get_autocast_dtype(device_type))
    tensors = (features, weight, bias, targets, row_weights, noise)
    options = (vocab_size, temperature, disallow_correct, label_smoothing, gumbel)
    implementation = resolve_implementation(implementation, device_type, *weight.shape)
    if copy_logits is None or copied is None:
        return _launch(implementation, tensors, options)
    outputs = _launch(implementation, tensors, options, log_odds_of_copies(copy_logits, copied))
    return _of_mixture(outputs, row_weights, copy_logits, copied)


def _check(
    rows: int, vocab_size: int, label_smoothing: float, copy_logits: Tensor | None, copied: Tensor | None
) -> None:
    """Raise the `ValueError`s of :func:`masked_lm`."""
    if rows % SAMPLING_BLOCK or rows < vocab_size:
        raise ValueError(
            f"{rows} rows of embeddings for {vocab_size} tokens; expected at least as many and a multiple "
            f"of {SAMPLING_BLOCK}: pad the table"
        )
    if (copy_logits is None) != (copied is None):
        raise ValueError("one of copy_logits and copied; expected both or neither")
    if copy_logits is not None and label_smoothing:
        raise ValueError(f"label_smoothing is {label_smoothing} with copy_logits; expected 0")


def _launch(
    implementation: str,
    tensors: tuple[Tensor, ...],
    options: tuple[int, float, bool, float, bool],
    copy_log_odds: Tensor | None = None,
) -> MaskedLM:
    """Call the operator of an implementation; its losses are those of the softmax."""
    features, weight, bias, targets, *_ = tensors
    if implementation == "triton":
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        # Drawing the seed on the device needs no synchronisation; without `gumbel` it is not read.
        seed = torch.randint(2**31, (1,), device=features.device) if options[-1] else targets
        return MaskedLM(*masked_lm_triton(*tensors, seed, *options, copy_log_odds)[:4])
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (features, weight, bias))
    return MaskedLM(*masked_lm_chunked(*tensors, *options, with_gradients, copy_log_odds)[:4])


def _of_mixture(softmax: MaskedLM, row_weights: Tensor, copy_logits: Tensor, copied: Tensor) -> MaskedLM:
    """Replace the softmax's losses by those of the mixture, and whether the prediction is right."""
    losses = mixture_losses(softmax.token_losses, copy_logits, copied)
    # The value and the gradient of the copy logits from the first term; the other gradients from the operator, whose
    # value is subtracted.
    loss = (losses * row_weights).sum() + (softmax.loss - softmax.loss.detach())
    correct = torch.where(copy_logits > 0, copied, softmax.correct)
    return MaskedLM(loss, losses.detach(), softmax.sampled, correct)


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
