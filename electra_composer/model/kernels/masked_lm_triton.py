"""The CUDA side of masked_lm.py, in Triton: nothing of size `[masked, vocabulary]` for the whole batch is ever stored.

Forward, two kernels. `_sweep` multiplies a block of rows with tiles of 128 tokens and keeps, of each row and tile, the
largest logit and the sum of exponentials: `[M, tiles]`, 239 tiles for 30,522 tokens. From these `_finish` takes each
row's log-sum-exp and, with one uniform number, the tile in which the sample lies; it computes that one tile again and
finds the token. Backward: logits again, a chunk of rows at a time, turned into their gradient before they leave the
registers, then two products by cuBLAS. Same numbers in, same sample out as the twin, but for rounding.

With `gumbel` the sweep adds noise and keeps each tile's best token: Philox, keyed by a seed from torch's generator and
counted by (token, row), so that it does not depend on how the work is split.

Nothing here waits for the device or depends on its values: it can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_composer.model.kernels.sampling import BELOW_ONE

BLOCK_M, TILE = 64, 128
"""Rows and tokens of one product: an accumulator of 64 registers a thread with four warps."""

TILES_PER_PROGRAM = 4
"""Tiles for which a program of the sweep reads its rows of features once."""

BACKWARD_CHUNK_BYTES = 64 * 2**20
"""Most that is alive of the gradient of the logits: little memory, and products that still fill the device."""


@triton.jit
def _logits_tile(
    features, table, bias, rows, tokens, count, vocab_size, width,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a block of rows and a tile of tokens in fp32; minus infinity where there is no token."""
    logits = tl.zeros((BLOCK_M, TILE), dtype=tl.float32)
    row_starts = rows.to(tl.int64)[:, None] * width
    for start in range(0, width, BLOCK_E):
        columns = start + tl.arange(0, BLOCK_E)
        f = tl.load(
            features + row_starts + columns[None, :],
            mask=(rows[:, None] < count) & (columns[None, :] < width),
            other=0.0,
        )
        w = tl.load(
            table + tokens[None, :] * width + columns[:, None],
            mask=(tokens[None, :] < vocab_size) & (columns[:, None] < width),
            other=0.0,
        )
        logits = tl.dot(f, w, logits, input_precision=PRECISION)
    is_token = tokens < vocab_size
    logits += tl.load(bias + tokens, mask=is_token, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_token[None, :], logits, float("-inf"))


@triton.jit
def _largest_and_sum(values):
    """Of each row the largest value and the sum of `exp(value - largest)`; 0 where all are minus infinity."""
    largest = tl.max(values, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - shift[:, None]), axis=1)


@triton.jit
def _sweep(
    features, table, bias, targets, seed,
    largest, total, draw_largest, draw_total, draw_token, of_target,
    count, vocab_size, width, row_blocks, tiles, inverse_temperature,
    OWN_DRAW: tl.constexpr, DISALLOW: tl.constexpr, GUMBEL: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics `[count, tiles]` of some tiles for a block of rows, and the target's logit, `of_target [count]`."""
    # Rows vary fastest: programs that run together share a tile's rows of the table.
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_tile = tl.program_id(0) // row_blocks * TILES_PER_PROGRAM
    in_batch = rows < count
    target = tl.load(targets + rows, mask=in_batch, other=-1)
    for index in range(0, TILES_PER_PROGRAM):
        tile = first_tile + index
        tokens = tile * TILE + tl.arange(0, TILE)
        place = rows.to(tl.int64) * tiles + tile
        stored = in_batch & (tile < tiles)
        logits = _logits_tile(
            features, table, bias, rows, tokens, count, vocab_size, width, BLOCK_M, TILE, BLOCK_E, PRECISION
        )
        is_target = tokens[None, :] == target[:, None]
        tile_largest, tile_total = _largest_and_sum(logits)
        tl.store(largest + place, tile_largest, mask=stored)
        tl.store(total + place, tile_total, mask=stored)
        z_target = tl.sum(tl.where(is_target, logits, 0.0), axis=1)
        has_target = (target >= tile * TILE) & (target < tile * TILE + TILE)
        tl.store(of_target + rows, z_target, mask=in_batch & has_target)
        if OWN_DRAW:
            draw = logits * inverse_temperature
            if DISALLOW:
                draw = tl.where(is_target, float("-inf"), draw)
            if GUMBEL:
                zeros = tl.zeros((BLOCK_M, TILE), dtype=tl.int32)
                random, _, _, _ = tl.philox(tl.load(seed), zeros + tokens[None, :], zeros + rows[:, None], zeros, zeros)
                draw -= tl.log(-tl.log(tl.maximum(tl.uint_to_uniform_float(random), 1e-10)))
                best = tl.argmax(draw, axis=1) + tile * TILE
                tl.store(draw_largest + place, tl.max(draw, axis=1), mask=stored)
                tl.store(draw_token + place, best, mask=stored)
            else:
                tile_largest, tile_total = _largest_and_sum(draw)
                tl.store(draw_largest + place, tile_largest, mask=stored)
                tl.store(draw_total + place, tile_total, mask=stored)


@triton.jit
def _first_above(weights, cumulative, threshold, SIZE: tl.constexpr):
    """As its twin in masked_lm.py, for one row."""
    columns = tl.arange(0, SIZE)
    first = tl.min(tl.where((cumulative > threshold) & (weights > 0.0), columns, SIZE), axis=0)
    return tl.where(first < SIZE, first, tl.argmax(weights, axis=0))


@triton.jit
def _finish(
    features, table, bias, targets, noise,
    largest, total, draw_largest, draw_total, draw_token, of_target, normalizer, correct, sampled,
    vocab_size, width, tiles, inverse_temperature, below_one,
    DISALLOW: tl.constexpr, GUMBEL: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, whether the target is the most likely token, and the sample, of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILES)
    place = row * tiles + columns
    there = columns < tiles
    tile_largest = tl.load(largest + place, mask=there, other=float("-inf"))
    highest = tl.max(tile_largest, axis=0)
    sums = tl.load(total + place, mask=there, other=0.0) * tl.exp(tile_largest - highest)
    tl.store(normalizer + row, highest + tl.log(tl.sum(sums, axis=0)))
    tl.store(correct + row, tl.load(of_target + row) >= highest)

    draws = tl.load(draw_largest + place, mask=there, other=float("-inf"))
    if GUMBEL:
        token = tl.load(draw_token + row * tiles + tl.argmax(draws, axis=0))
    else:
        shift = tl.max(draws, axis=0)
        sums = tl.load(draw_total + place, mask=there, other=0.0) * tl.exp(draws - shift)
        cumulative = tl.cumsum(sums, axis=0)
        threshold = tl.minimum(tl.load(noise + row), below_one) * tl.max(cumulative, axis=0)
        tile = _first_above(sums, cumulative, threshold, TILES)
        rest = threshold - tl.sum(tl.where(columns == tile, cumulative - sums, 0.0), axis=0)

        tokens = tile * TILE + tl.arange(0, TILE)
        is_token = tokens < vocab_size
        logits = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, width, BLOCK_E):
            inner = start + tl.arange(0, BLOCK_E)
            f = tl.load(features + row * width + inner, mask=inner < width, other=0.0).to(tl.float32)
            w = tl.load(
                table + tokens[:, None] * width + inner[None, :],
                mask=is_token[:, None] & (inner[None, :] < width),
                other=0.0,
            ).to(tl.float32)
            logits += tl.sum(w * f[None, :], axis=1)
        logits += tl.load(bias + tokens, mask=is_token, other=0.0).to(tl.float32)
        weights = tl.where(is_token, tl.exp(logits * inverse_temperature - shift), 0.0)
        if DISALLOW:
            weights = tl.where(tokens == tl.load(targets + row), 0.0, weights)
        cumulative = tl.cumsum(weights, axis=0)
        # The tile's sum and its cumulative sum are rounded differently: stay within the tile.
        threshold = tl.minimum(tl.maximum(rest, 0.0), tl.max(cumulative, axis=0) * below_one)
        token = tile * TILE + _first_above(weights, cumulative, threshold, TILE)
    # Where logits are NaN the loss says so; the sample is looked up as an id before anyone reads it.
    tl.store(sampled + row, tl.minimum(token, vocab_size - 1))


@triton.jit
def _gradient_of_logits(
    features, table, bias, targets, row_weights, normalizer, grad_loss, gradient, bias_parts,
    first, end, vocab_size, padded, width, row_blocks, label_smoothing,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gradient [end - first, padded]` of the logits of these rows, and its sums over blocks of rows, `bias_parts
    [row_blocks, padded]`; zero where there is no token."""
    block = tl.program_id(0) % row_blocks
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + local
    tokens = tl.program_id(0) // row_blocks * TILE + tl.arange(0, TILE)
    in_batch = rows < end
    logits = _logits_tile(
        features, table, bias, rows, tokens, end, vocab_size, width, BLOCK_M, TILE, BLOCK_E, PRECISION
    )
    target = tl.load(targets + rows, mask=in_batch, other=-1)
    scale = tl.load(row_weights + rows, mask=in_batch, other=0.0) * tl.load(grad_loss)
    probability = tl.exp(logits - tl.load(normalizer + rows, mask=in_batch, other=0.0)[:, None])
    wanted = tl.where(tokens[None, :] == target[:, None], 1.0 - label_smoothing, 0.0) + label_smoothing / vocab_size
    is_entry = in_batch[:, None] & (tokens[None, :] < vocab_size)
    value = tl.where(is_entry, scale[:, None] * (probability - wanted), 0.0)
    place = local.to(tl.int64)[:, None] * padded + tokens[None, :]
    is_column = tokens < padded
    tl.store(gradient + place, value.to(gradient.dtype.element_ty), mask=in_batch[:, None] & is_column[None, :])
    tl.store(bias_parts + block.to(tl.int64) * padded + tokens, tl.sum(value, axis=0), mask=is_column)


def _sizes(features: Tensor) -> dict[str, object]:
    """Tiles, and how fp32 is multiplied: as torch's own products are told to."""
    block_e = min(64 if features.dtype != torch.float32 else 32, max(16, triton.next_power_of_2(features.shape[1])))
    # torch 2.9 renamed the switch, and refuses to read the old name where the new one was set.
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return {"BLOCK_M": BLOCK_M, "TILE": TILE, "BLOCK_E": block_e, "PRECISION": "tf32" if tf32 else "ieee"}


@torch.library.custom_op(
    "electra_composer::masked_lm_triton",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor bias, Tensor targets, Tensor row_weights, Tensor noise, "
    "Tensor seed, int vocab_size, float temperature, bool disallow_correct, float label_smoothing, bool gumbel) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `masked_lm.masked_lm`, with a `seed [1]`, int64, for `gumbel`.

    Returns:
        `loss`, `token_losses`, `sampled`, `correct`, and the log-sum-exp `[M]` that the backward pass needs.
    """
    features, table, bias, targets, noise = _contiguous(features, weight.to(features.dtype), bias, targets, noise)
    count, width = features.shape
    row_blocks, tiles = triton.cdiv(count, BLOCK_M), triton.cdiv(vocab_size, TILE)
    own_draw = temperature != 1.0 or disallow_correct or gumbel
    # Largest and sum of each tile for the loss, the same for the draw where it differs, and the draw's best tokens.
    pairs = [features.new_empty(count, tiles, dtype=torch.float32) for _ in range(4 if own_draw else 2)]
    statistics = [*pairs[:2], *pairs[-2:], targets.new_empty(count, tiles if gumbel else 1, dtype=torch.int32)]
    of_target, normalizer = (features.new_empty(count, dtype=torch.float32) for _ in range(2))
    correct, sampled = torch.empty_like(targets, dtype=torch.bool), torch.empty_like(targets)
    sizes = _sizes(features)
    _sweep[(row_blocks * triton.cdiv(tiles, TILES_PER_PROGRAM),)](
        features, table, bias, targets, seed, *statistics, of_target,
        count, vocab_size, width, row_blocks, tiles, 1.0 / temperature,
        OWN_DRAW=own_draw, DISALLOW=disallow_correct, GUMBEL=gumbel, TILES_PER_PROGRAM=TILES_PER_PROGRAM,
        num_warps=4, **sizes,
    )  # fmt: skip
    _finish[(count,)](
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


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The kernels know no strides."""
    return tuple(tensor.contiguous() for tensor in tensors)


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


@torch.library.custom_op(
    "electra_composer::masked_lm_triton_backward",
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor bias, Tensor targets, Tensor row_weights, Tensor normalizer, "
    "Tensor grad_loss, int vocab_size, float label_smoothing) -> (Tensor, Tensor, Tensor)",
)
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
    """Gradients of features, embeddings and bias, in their dtypes."""
    features, table, bias, targets, row_weights, normalizer = _contiguous(
        features, weight.to(features.dtype), bias, targets, row_weights, normalizer
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
            _gradient_of_logits[(row_blocks * triton.cdiv(padded, TILE),)](
                features, table, bias, targets, row_weights, normalizer, grad_loss, gradient, bias_parts,
                start, start + chunk.shape[0], vocab_size, padded, width, row_blocks, label_smoothing,
                num_warps=4, **sizes,
            )  # fmt: skip
            torch.mm(gradient, table, out=grad_features[start : start + rows])
            grad_weight += gradient.t() @ chunk
            grad_bias += bias_parts[:row_blocks].sum(0)
    return grad_features, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _rows_per_chunk(count: int, row_bytes: int) -> int:
    """As few chunks as fit into `BACKWARD_CHUNK_BYTES` each, all but the last of one size: a multiple of `BLOCK_M`."""
    most = max(BLOCK_M, BACKWARD_CHUNK_BYTES // row_bytes // BLOCK_M * BLOCK_M)
    return triton.cdiv(triton.cdiv(count, triton.cdiv(count, most)), BLOCK_M) * BLOCK_M


@_backward_kernel.register_fake
def _(features, weight, bias, *options):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (features, weight, bias))


def _setup_context(ctx, inputs, output):
    features, weight, bias, targets, row_weights, _, _, vocab_size, _, _, label_smoothing, _ = inputs
    ctx.save_for_backward(features, weight, bias, targets, row_weights, output[4])
    ctx.vocab_size, ctx.label_smoothing = vocab_size, label_smoothing
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    gradients = _backward_kernel(*ctx.saved_tensors, grad_loss.contiguous(), ctx.vocab_size, ctx.label_smoothing)
    return (*gradients, *[None] * 9)


masked_lm_triton.register_autograd(_backward, setup_context=_setup_context)
