"""Triton kernels of masked_lm_triton.py; shapes and launches are there.

`[count, tiles]` arrays hold one number per row and tile of :data:`TILE` tokens. The kernels assume contiguous tensors.
"""

import triton
import triton.language as tl

BLOCK_M, TILE = 64, 128
"""Rows and tokens of one product: an accumulator of 64 registers per thread with four warps."""

TILES_PER_PROGRAM = 4
"""Tiles for which a program of :func:`tile_statistics` reads its rows of features once."""


@triton.jit
def _logits_tile(
    features, table, bias, rows, tokens, count, vocab_size, width,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the fp32 logits of a block of rows and a tile of tokens; minus infinity beyond the vocabulary."""
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
    """Compute each row's largest value and sum of `exp(value - largest)`; the sum is 0 if all are minus infinity."""
    largest = tl.max(values, axis=1)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(tl.exp(values - shift[:, None]), axis=1)


@triton.jit
def tile_statistics(
    features, table, bias, targets, seed,
    largest, total, draw_largest, draw_total, draw_token, of_target,
    count, vocab_size, width, row_blocks, tiles, inverse_temperature,
    OWN_DRAW: tl.constexpr, DISALLOW: tl.constexpr, GUMBEL: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the statistics `[count, tiles]` of `TILES_PER_PROGRAM` tiles for a block of rows, and `of_target [count]`,
    the target's logit."""
    # Rows vary fastest, so that programs that run together share a tile's rows of the table.
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first_tile = tl.program_id(0) // row_blocks * TILES_PER_PROGRAM
    in_batch = rows < count
    target = tl.load(targets + rows, mask=in_batch, other=-1)
    for index in range(0, TILES_PER_PROGRAM):
        tile = first_tile + index
        tokens = tile * TILE + tl.arange(0, TILE)
        place = rows.to(tl.int64) * tiles + tile
        # Workaround (triton 3.9): the interpreter broadcasts a scalar int1 as int32, which it refuses in a mask, so
        # `in_batch & (tile < tiles)` is written with integers; goes when the interpreter broadcasts int1 as bool.
        stored = rows < tl.where(tile < tiles, count, 0)
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
    """Same as `sampling._first_above`, for one row."""
    columns = tl.arange(0, SIZE)
    first = tl.min(tl.where((cumulative > threshold) & (weights > 0.0), columns, SIZE), axis=0)
    return tl.where(first < SIZE, first, tl.argmax(weights, axis=0))


@triton.jit
def combine_tiles(
    features, table, bias, targets, noise,
    largest, total, draw_largest, draw_total, draw_token, of_target, normalizer, correct, sampled,
    vocab_size, width, tiles, inverse_temperature, below_one,
    DISALLOW: tl.constexpr, GUMBEL: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Store the log-sum-exp, whether no token is more likely than the target, and the sample; one row per program."""
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
        # The tile's sum and its cumulative sum round differently: stay within the tile.
        threshold = tl.minimum(tl.maximum(rest, 0.0), tl.max(cumulative, axis=0) * below_one)
        token = tile * TILE + _first_above(weights, cumulative, threshold, TILE)
    # NaN logits are reported by the loss; the sample must be a valid id until then, because it is embedded first.
    tl.store(sampled + row, tl.minimum(token, vocab_size - 1))


@triton.jit
def logits_gradient(
    features, table, bias, targets, row_weights, normalizer, grad_loss, gradient, bias_parts,
    first, end, vocab_size, padded, width, row_blocks, label_smoothing,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the logits of these rows, `gradient [end - first, padded]`, and its sums over blocks of
    rows, `bias_parts [row_blocks, padded]`; zero beyond the vocabulary."""
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
