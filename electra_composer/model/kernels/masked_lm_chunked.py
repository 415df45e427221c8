"""Masked-LM loss, sample and gradients in plain PyTorch, over chunks of rows that fit into a cache.

Gradients are computed in the forward pass, while the logits of a chunk are in the cache. This is the implementation for
CPUs and the reference for masked_lm_triton.py.
"""

import math

import torch
from torch import Tensor

from electra_composer.model.kernels.copy_mechanism import softmax_shares
from electra_composer.model.kernels.sampling import inverse_cdf, sum_blocks

CHUNK_BYTES = 16 * 2**20
"""Size of a chunk's fp32 logits: small enough for a last-level cache, large enough for products at full speed."""


# An opaque operator: `torch.compile` calls it instead of unrolling its loop, and keeps the gradients in the forward.
@torch.library.custom_op("electra_composer::masked_lm_chunked", mutates_args=())
def masked_lm_chunked(
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
    copy_log_odds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute loss, samples and gradients; arguments as for :func:`masked_lm.masked_lm`.

    With `copy_log_odds` (copy_mechanism.py) the gradients are those of the mixture; the losses remain the softmax's.

    Returns:
        `loss`, `token_losses`, `sampled`, `correct`, and the fp32 gradients of `loss` with respect to features, weight
        and bias (empty without `with_gradients`).
    """
    count, padded = features.shape[0], weight.shape[0]
    token_losses = features.new_empty(count, dtype=torch.float32)
    sampled, correct = torch.empty_like(targets), torch.empty_like(targets, dtype=torch.bool)
    gradients = [gradient.zero_() for gradient in _empty_gradients(features, weight, bias, with_gradients)]
    grad_losses = row_weights if copy_log_odds is None else torch.empty_like(token_losses)
    # Padding rows of the table are not tokens: minus infinity excludes them from everything below.
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
            logits = _store_logits(chunk, table, offsets, buffer[: chunk.shape[0]])
            of_target, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
            correct[piece] = (of_target >= largest).squeeze(1)
            drawn = _draw(logits, largest, target, noise[piece], temperature, disallow_correct, gumbel)
            # From here on the buffer holds probabilities before their division by `total`.
            weights = logits.sub_(largest).exp_()
            block_sums = sum_blocks(weights)
            total = block_sums.sum(-1, keepdim=True)
            sampled[piece] = inverse_cdf(weights, block_sums, noise[piece]) if drawn is None else drawn
            normalizer = largest + total.log()
            mean_logits = None if mean_row is None else chunk.float() @ mean_row[:, None] + mean_bias
            token_losses[piece] = _losses(normalizer, of_target, mean_logits, label_smoothing).squeeze(1)
            if copy_log_odds is not None:
                grad_losses[piece] = row_weights[piece] * softmax_shares(token_losses[piece], copy_log_odds[piece])
            if with_gradients:
                _add_softmax(gradients, piece, chunk, table, weights, grad_losses[piece, None] / total)
        if with_gradients:
            _subtract_targets(gradients, features, table, targets, grad_losses, vocab_size, label_smoothing, mean_row)
    loss = (token_losses * row_weights).sum()
    return loss, token_losses, sampled, correct, gradients[0], gradients[1], gradients[2]


def _store_logits(chunk: Tensor, table: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """Write the logits of one chunk to `logits`, fp32, and return it."""
    if chunk.dtype == torch.float32:
        return torch.addmm(offsets, chunk, table.t(), out=logits)
    return torch.add(chunk @ table.t(), offsets, out=logits)


def _losses(normalizer: Tensor, of_target: Tensor, mean_logits: Tensor | None, label_smoothing: float) -> Tensor:
    """Compute the cross entropies of one chunk; `mean_logits` is None without label smoothing."""
    losses = normalizer - of_target
    if mean_logits is None:
        return losses
    return (1 - label_smoothing) * losses + label_smoothing * (normalizer - mean_logits)


def _draw(
    logits: Tensor,
    largest: Tensor,
    target: Tensor,
    noise: Tensor,
    temperature: float,
    disallow_correct: bool,
    gumbel: bool,
) -> Tensor | None:
    """Sample from weights other than the loss's probabilities; None if those can be used."""
    if temperature == 1.0 and not disallow_correct and not gumbel:
        return None
    if disallow_correct:
        logits = logits.scatter(1, target, -math.inf)
        largest = logits.amax(1, keepdim=True)
    weights = (logits - largest).mul_(1.0 / temperature).exp_()
    if gumbel:
        # argmax of logits + Gumbel noise in its ratio form, which avoids the logarithm of a uniform zero.
        return weights.div_(torch.empty_like(weights).exponential_()).argmax(1)
    return inverse_cdf(weights, sum_blocks(weights), noise)


def _add_softmax(
    gradients: list[Tensor], piece: slice, chunk: Tensor, table: Tensor, weights: Tensor, scale: Tensor
) -> None:
    """Add the softmax part of d loss / d logits = row_weight × (probability - target) for one chunk.

    Probabilities are `weights` / total; the division is in `scale`, row_weight / total `[R, 1]`, on the narrow side of
    each product.
    """
    grad_features, grad_weight, grad_bias = gradients
    thin = torch.cat([chunk.float() * scale, scale], dim=1)
    thick = weights.to(chunk.dtype)
    grad_features[piece] = (thick @ table).float().mul_(scale)
    if chunk.dtype == torch.float32:
        grad_weight.addmm_(thick.t(), thin[:, :-1])
        grad_bias.addmv_(thick.t(), thin[:, -1])
    else:
        grad_weight.add_(thick.t() @ thin[:, :-1].to(chunk.dtype))
        grad_bias.add_(thick.t() @ thin[:, -1].to(chunk.dtype))


def _subtract_targets(
    gradients: list[Tensor],
    features: Tensor,
    table: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    vocab_size: int,
    label_smoothing: float,
    mean_row: Tensor | None,
) -> None:
    """Subtract the target part of d loss / d logits: one entry per row, plus a constant for label smoothing."""
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


def _empty_gradients(features: Tensor, weight: Tensor, bias: Tensor, with_gradients: bool) -> list[Tensor]:
    """Allocate the three gradients in fp32: they are scaled by the loss's gradient before they are rounded."""
    tensors = (features, weight, bias)
    return [tensor.new_empty(tensor.shape if with_gradients else 0, dtype=torch.float32) for tensor in tensors]


@masked_lm_chunked.register_fake
def _(features, weight, bias, targets, row_weights, noise, *options):
    return (
        features.new_empty((), dtype=torch.float32),
        features.new_empty(features.shape[0], dtype=torch.float32),
        torch.empty_like(targets),
        torch.empty_like(targets, dtype=torch.bool),
        *_empty_gradients(features, weight, bias, with_gradients=options[5]),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[4:])
    ctx.dtypes = [tensor.dtype for tensor in inputs[:3]]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    gradients = [(saved * grad_loss).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
    return (*gradients, *[None] * 10)


masked_lm_chunked.register_autograd(_backward, setup_context=_setup_context)
