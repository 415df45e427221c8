"""Masked-LM loss, sample and gradients for CUDA, in Triton; see masked_lm.py.

No array of size `[masked, vocabulary]` is stored for all rows. The forward has two kernels, defined in
masked_lm_triton_kernels.py. `tile_statistics` multiplies a block of rows with tiles of 128 tokens. For each row and
tile it stores the largest logit and the sum of exponentials: `[M, tiles]`, 239 tiles for 30,522 tokens. From these,
`combine_tiles` computes each row's log-sum-exp and, with one uniform number, the tile that contains the sample; it
recomputes that tile and finds the token. The backward recomputes the logits, a chunk of rows at a time, and turns them
into their gradient in registers (`logits_gradient`); two cuBLAS products follow. The same inputs give the same samples
as masked_lm_chunked.py, except for rounding.

With `gumbel`, `tile_statistics` adds noise and stores the best token of each tile. The noise is Philox, keyed by a seed
from torch's generator and counted by (token, row), so it does not depend on how the work is split.

Nothing here synchronises with the device or depends on its values, so it can be captured in a CUDA graph.
"""

import torch
import triton
from torch import Tensor

from electra_composer.model.kernels.copy_mechanism import softmax_shares
from electra_composer.model.kernels.masked_lm_triton_kernels import (
    BLOCK_M,
    TILE,
    TILES_PER_PROGRAM,
    combine_tiles,
    logits_gradient,
    tile_statistics,
)
from electra_composer.model.kernels.product_precision import product_precision
from electra_composer.model.kernels.sampling import BELOW_ONE

BACKWARD_CHUNK_BYTES = 64 * 2**20
"""Upper limit for the chunk of the logits' gradient that is in memory: small, but products still fill the device."""


def _sizes(features: Tensor) -> dict[str, object]:
    """Choose tile sizes, and the fp32 precision that torch's own matrix products are set to."""
    block_e = min(64 if features.dtype != torch.float32 else 32, max(16, triton.next_power_of_2(features.shape[1])))
    return {"BLOCK_M": BLOCK_M, "TILE": TILE, "BLOCK_E": block_e, "PRECISION": product_precision()}


@torch.library.custom_op("electra_composer::masked_lm_triton", mutates_args=())
def masked_lm_triton(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    noise: Tensor,
    seed: Tensor,
    vocab_size: int,
    temperature: float,
    disallow_correct: bool,
    label_smoothing: float,
    gumbel: bool,
    copy_log_odds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute loss and samples; arguments as for :func:`masked_lm.masked_lm`, and `seed [1]`, int64, for `gumbel`.

    With `copy_log_odds` (copy_mechanism.py) the gradients are those of the mixture; the losses remain the softmax's.

    Returns:
        `loss`, `token_losses`, `sampled`, `correct`, and the log-sum-exp `[M]` for the backward.
    """
    features, table, bias, targets, noise = (
        tensor.contiguous() for tensor in (features, weight.to(features.dtype), bias, targets, noise)
    )
    count, width = features.shape
    row_blocks, tiles = triton.cdiv(count, BLOCK_M), triton.cdiv(vocab_size, TILE)
    own_draw = temperature != 1.0 or disallow_correct or gumbel
    # Largest and sum of each tile for the loss, the same for the draw if it differs, and the draw's best tokens.
    pairs = [features.new_empty(count, tiles, dtype=torch.float32) for _ in range(4 if own_draw else 2)]
    statistics = [*pairs[:2], *pairs[-2:], targets.new_empty(count, tiles if gumbel else 1, dtype=torch.int32)]
    of_target, normalizer = (features.new_empty(count, dtype=torch.float32) for _ in range(2))
    correct, sampled = torch.empty_like(targets, dtype=torch.bool), torch.empty_like(targets)
    sizes = _sizes(features)
    tile_statistics[(row_blocks * triton.cdiv(tiles, TILES_PER_PROGRAM),)](
        features, table, bias, targets, seed, *statistics, of_target,
        count, vocab_size, width, row_blocks, tiles, 1.0 / temperature,
        OWN_DRAW=own_draw, DISALLOW=disallow_correct, GUMBEL=gumbel, TILES_PER_PROGRAM=TILES_PER_PROGRAM,
        num_warps=8 if gumbel else 4, **sizes,  # the random numbers need registers: four warps spill some on sm_80
    )  # fmt: skip
    combine_tiles[(count,)](
        features, table, bias, targets, noise, *statistics, of_target, normalizer, correct, sampled,
        vocab_size, width, tiles, 1.0 / temperature, BELOW_ONE,
        DISALLOW=disallow_correct, GUMBEL=gumbel, TILES=max(16, triton.next_power_of_2(tiles)), TILE=TILE,
        BLOCK_E=sizes["BLOCK_E"], num_warps=4,
    )  # fmt: skip
    token_losses = normalizer - of_target
    if label_smoothing:
        with torch.autocast(features.device.type, enabled=False):
            mean_row = table[:vocab_size].mean(0, dtype=torch.float32)
            mean_logits = features.float() @ mean_row + bias[:vocab_size].mean(dtype=torch.float32)
        token_losses = (1 - label_smoothing) * token_losses + label_smoothing * (normalizer - mean_logits)
    return (token_losses * row_weights).sum(), token_losses, sampled, correct, normalizer


@masked_lm_triton.register_fake
def _(features, weight, bias, targets, *options):
    per_row = features.new_empty(features.shape[0], dtype=torch.float32)
    return (
        features.new_empty((), dtype=torch.float32),
        per_row,
        torch.empty_like(targets, memory_format=torch.contiguous_format),
        torch.empty_like(targets, dtype=torch.bool, memory_format=torch.contiguous_format),
        torch.empty_like(per_row),
    )


@torch.library.custom_op("electra_composer::masked_lm_triton_backward", mutates_args=())
def _backward_kernel(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    normalizer: Tensor,
    grad_loss: Tensor,
    vocab_size: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of features, embeddings and bias, in their dtypes."""
    features, table, bias, targets, row_weights, normalizer = (
        tensor.contiguous() for tensor in (features, weight.to(features.dtype), bias, targets, row_weights, normalizer)
    )
    (count, width), padded = features.shape, weight.shape[0]
    grad_features = torch.empty_like(features)
    grad_weight, grad_bias = (tensor.new_zeros(tensor.shape, dtype=torch.float32) for tensor in (table, bias))
    sizes = _sizes(features)
    rows = _rows_per_chunk(count, features.element_size() * padded)
    buffer = features.new_empty(min(rows, count), padded)
    bias_parts = features.new_empty(rows // BLOCK_M, padded, dtype=torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, count, rows):
            chunk = features[start : start + rows]
            gradient, row_blocks = buffer[: chunk.shape[0]], triton.cdiv(chunk.shape[0], BLOCK_M)
            logits_gradient[(row_blocks * triton.cdiv(padded, TILE),)](
                features, table, bias, targets, row_weights, normalizer, grad_loss, gradient, bias_parts,
                start, start + chunk.shape[0], vocab_size, padded, width, row_blocks, label_smoothing,
                num_warps=4, **sizes,
            )  # fmt: skip
            torch.mm(gradient, table, out=grad_features[start : start + rows])
            grad_weight += gradient.t() @ chunk
            grad_bias += bias_parts[:row_blocks].sum(0)
    return grad_features, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _rows_per_chunk(count: int, row_bytes: int) -> int:
    """Rows per chunk, a multiple of `BLOCK_M`, for the fewest chunks of at most `BACKWARD_CHUNK_BYTES`."""
    most = max(BLOCK_M, BACKWARD_CHUNK_BYTES // row_bytes // BLOCK_M * BLOCK_M)
    return triton.cdiv(triton.cdiv(count, triton.cdiv(count, most)), BLOCK_M) * BLOCK_M


@_backward_kernel.register_fake
def _(features, weight, bias, *options):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (features, weight, bias))


def _setup_context(ctx, inputs, output):
    features, weight, bias, targets, row_weights, _, _, vocab_size, _, _, label_smoothing, _, copy_log_odds = inputs
    of_copies = (output[1], copy_log_odds) if copy_log_odds is not None else ()
    ctx.save_for_backward(features, weight, bias, targets, row_weights, output[4], *of_copies)
    ctx.vocab_size, ctx.label_smoothing = vocab_size, label_smoothing
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or the backward fills a tensor with zeros for each of these


def _backward(ctx, grad_loss, *_):
    features, weight, bias, targets, row_weights, normalizer, *of_copies = ctx.saved_tensors
    if of_copies:
        row_weights = row_weights * softmax_shares(*of_copies)
    tensors = (features, weight, bias, targets, row_weights, normalizer, grad_loss.contiguous())
    return (*_backward_kernel(*tensors, ctx.vocab_size, ctx.label_smoothing), *[None] * 10)


masked_lm_triton.register_autograd(_backward, setup_context=_setup_context)
