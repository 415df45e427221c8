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
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from electra_composer.errors import UserError

IMPLEMENTATIONS = ("auto", "chunked", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None

SAMPLING_BLOCK = 64
"""Tokens whose probabilities are summed before the cumulative sum; embedding tables have a multiple of it as rows."""

CHUNK_BYTES = 16 * 2**20
"""Size of a chunk's fp32 logits: small enough for a last-level cache, large enough for products at full speed."""

BELOW_ONE = 1.0 - 2.0**-22
"""Rounding may carry uniform number × total up to the total itself, beyond which there is no token: stay below it."""


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
        from electra_composer.kernels.masked_lm_triton import masked_lm_triton

        # A seed on the device costs no wait for it; without `gumbel` nothing reads it.
        seed = torch.randint(2**31, (1,), device=features.device) if gumbel else targets
        loss, token_losses, sampled, correct, _ = masked_lm_triton(
            features, weight, bias, targets, row_weights, noise, seed, *options
        )
        return MaskedLM(loss, token_losses, sampled, correct)
    with_gradients = torch.is_grad_enabled() and (features.requires_grad or weight.requires_grad or bias.requires_grad)
    outputs = _chunked(features, weight, bias, targets, row_weights, noise, *options, with_gradients)
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


# An opaque operator: `torch.compile` calls it instead of unrolling its loop, and gradients stay where they were made.
@torch.library.custom_op(
    "electra_composer::masked_lm_chunked",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor bias, Tensor targets, Tensor row_weights, Tensor noise, "
    "int vocab_size, float temperature, bool disallow_correct, float label_smoothing, bool gumbel, "
    "bool with_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _chunked(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    noise: Tensor,
    vocab_size: int,
    temperature: float,
    disallow_correct: bool,
    label_smoothing: float,
    gumbel: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`loss`, `token_losses`, `sampled`, `correct`; the fp32 gradients of `loss` (empty without `with_gradients`)."""
    count, padded = features.shape[0], weight.shape[0]
    token_losses = features.new_empty(count, dtype=torch.float32)
    sampled, correct = torch.empty_like(targets), torch.empty_like(targets, dtype=torch.bool)
    gradients = _empty_gradients(features, weight, bias, with_gradients)
    grad_features, grad_weight, grad_bias = (gradient.zero_() for gradient in gradients)
    # Padding rows of the table are no tokens: minus infinity keeps them out of everything below.
    offsets = bias.float().masked_fill(torch.arange(padded, device=bias.device) >= vocab_size, -math.inf)
    table = weight.to(features.dtype)
    mean_row = table[:vocab_size].mean(0, dtype=torch.float32) if label_smoothing else None
    mean_bias = bias[:vocab_size].mean(dtype=torch.float32)
    rows = max(16, CHUNK_BYTES // (4 * padded))
    buffer = features.new_empty(min(rows, count), padded, dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, count, rows):
            piece = slice(start, min(start + rows, count))
            chunk, target = features[piece], targets[piece, None]
            logits = buffer[: chunk.shape[0]]
            if chunk.dtype == torch.float32:
                torch.addmm(offsets, chunk, table.t(), out=logits)
            else:
                torch.add(chunk @ table.t(), offsets, out=logits)
            of_target, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
            correct[piece] = (of_target >= largest).squeeze(1)
            drawn = _draw(logits, largest, target, noise[piece], temperature, disallow_correct, gumbel)
            # From here on the buffer holds probabilities before their division by `total`.
            weights = logits.sub_(largest).exp_()
            block_sums = _block_sums(weights)
            total = block_sums.sum(-1, keepdim=True)
            sampled[piece] = _inverse_cdf(weights, block_sums, noise[piece]) if drawn is None else drawn
            normalizer = largest + total.log()
            losses = normalizer - of_target
            if mean_row is not None:
                mean_logits = chunk.float() @ mean_row[:, None] + mean_bias
                losses = (1 - label_smoothing) * losses + label_smoothing * (normalizer - mean_logits)
            token_losses[piece] = losses.squeeze(1)
            if not with_gradients:
                continue
            # d loss / d logits = row_weight × (probability - target); the division goes to the thin side.
            scale = row_weights[piece, None] / total
            thin = torch.cat([chunk.float() * scale, scale], dim=1)
            thick = weights.to(chunk.dtype)
            grad_features[piece] = (thick @ table).float().mul_(scale)
            if chunk.dtype == torch.float32:
                grad_weight.addmm_(thick.t(), thin[:, :-1])
                grad_bias.addmv_(thick.t(), thin[:, -1])
            else:
                grad_weight.add_(thick.t() @ thin[:, :-1].to(chunk.dtype))
                grad_bias.add_(thick.t() @ thin[:, -1].to(chunk.dtype))
        if with_gradients:
            _subtract_targets(gradients, features, table, targets, row_weights, vocab_size, label_smoothing, mean_row)
    return (token_losses * row_weights).sum(), token_losses, sampled, correct, *gradients


def _empty_gradients(
    features: Tensor, weight: Tensor, bias: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of all three, fp32: they are scaled by the loss's gradient before they are rounded."""
    features, weight, bias = (
        tensor.new_empty(tensor.shape if with_gradients else 0, dtype=torch.float32)
        for tensor in (features, weight, bias)
    )
    return features, weight, bias


def _subtract_targets(
    gradients: tuple[Tensor, Tensor, Tensor],
    features: Tensor,
    table: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    vocab_size: int,
    label_smoothing: float,
    mean_row: Tensor | None,
) -> None:
    """The target's part of d loss / d logits, which is sparse, and flat over the vocabulary where it is smoothed."""
    grad_features, grad_weight, grad_bias = gradients
    kept = (row_weights * (1 - label_smoothing))[:, None]
    grad_features.sub_(table[targets].float().mul_(kept))
    grad_weight.index_add_(0, targets, features.float() * -kept)
    grad_bias.index_add_(0, targets, -kept.squeeze(1))
    if mean_row is not None:
        spread = row_weights[:, None] * label_smoothing
        grad_features.sub_(spread * mean_row)
        grad_weight[:vocab_size] -= (features.float() * spread).sum(0) / vocab_size
        grad_bias[:vocab_size] -= spread.sum() / vocab_size


@_chunked.register_fake
def _(features, weight, bias, targets, row_weights, noise, *options):
    return (
        features.new_empty((), dtype=torch.float32),
        features.new_empty(features.shape[0], dtype=torch.float32),
        torch.empty_like(targets),
        torch.empty_like(targets, dtype=torch.bool),
        *_empty_gradients(features, weight, bias, options[-1]),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    gradients = [(saved * grad_loss).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return (*gradients, *[None] * 9)


_chunked.register_autograd(_backward, setup_context=_setup_context)


def _draw(
    logits: Tensor,
    largest: Tensor,
    target: Tensor,
    noise: Tensor,
    temperature: float,
    disallow_correct: bool,
    gumbel: bool,
) -> Tensor | None:
    """A draw that needs weights of its own; none where the loss's own probabilities serve."""
    if temperature == 1.0 and not disallow_correct and not gumbel:
        return None
    if disallow_correct:
        logits = logits.scatter(1, target, -math.inf)
        largest = logits.amax(1, keepdim=True)
    weights = (logits - largest).mul_(1.0 / temperature).exp_()
    if gumbel:
        # The largest of logits + Gumbel noise in its ratio form, which needs no logarithm of a uniform zero.
        return weights.div_(torch.empty_like(weights).exponential_()).argmax(1)
    return _inverse_cdf(weights, _block_sums(weights), noise)


def _block_sums(weights: Tensor) -> Tensor:
    """`[R, P]` → `[R, P / SAMPLING_BLOCK]`."""
    return weights.view(weights.shape[0], -1, SAMPLING_BLOCK).sum(-1)


def _inverse_cdf(weights: Tensor, block_sums: Tensor, noise: Tensor) -> Tensor:
    """The first token at which the cumulative weight exceeds `noise` × total; never one of weight zero.

    `weights [R, P]` fp32, not negative; `block_sums` of them; `noise [R]` in [0, 1) → int64 `[R]`.
    """
    block, rest = choose_block(block_sums, noise)
    blocks = weights.view(weights.shape[0], -1, SAMPLING_BLOCK)
    within = blocks[torch.arange(len(blocks), device=block.device), block.squeeze(1)]
    cumulative = within.cumsum(1)
    # The block's sum and its cumulative sum are rounded differently: stay within the block.
    token = _first_above(cumulative, within, torch.minimum(rest, cumulative[:, -1:] * BELOW_ONE))
    return (block * SAMPLING_BLOCK + token).squeeze(1)


def choose_block(block_sums: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Where `noise` × total falls: the block, int64 `[R, 1]`, and the weight that is left to pass in it, fp32 `[R, 1]`.

    `block_sums [R, B]` fp32, not negative; `noise [R]` in [0, 1).
    """
    cumulative = block_sums.cumsum(1)
    threshold = noise.clamp(max=BELOW_ONE)[:, None] * cumulative[:, -1:]
    block = _first_above(cumulative, block_sums, threshold)
    return block, (threshold - cumulative.gather(1, block) + block_sums.gather(1, block)).clamp(min=0.0)


def _first_above(cumulative: Tensor, weights: Tensor, threshold: Tensor) -> Tensor:
    """The first column at which `cumulative [R, C]`, the sums of `weights`, exceeds `threshold [R, 1]`: int64 `[R, 1]`.

    A parallel scan, as on CUDA, may rise by rounding where the weight is zero, and NaN exceeds nothing: then it is the
    column of largest weight (or NaN), so that no token without probability and no id out of range gets through.
    """
    column = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
    return torch.where(weights.gather(1, column) > 0, column, weights.argmax(1, keepdim=True))
