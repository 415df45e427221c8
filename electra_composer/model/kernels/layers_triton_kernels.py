"""Triton kernels of layers_triton.py: dropout, residual and LayerNorm; bias and GELU; sums over blocks of rows.

Tensors are contiguous, `[count, width]` unless said otherwise. Arithmetic is in fp32. Sums over rows are made in two
steps without atomics: every program stores the sum of its rows, then :func:`sum_partials` adds these in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def dropout_factors(seed, rows, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return `[ROWS, BLOCK]`: 0 where an element is dropped, `scale` where it is kept.

    Depends on the seed, the row and the column only, so that the backward recomputes it. A call of Philox gives 128
    bits, 16 for each of eight neighbouring columns; of their 2^16 values, `threshold` mean "drop".
    """
    zeros = tl.zeros((ROWS, BLOCK // 8), dtype=tl.int32)
    columns = zeros + tl.arange(0, BLOCK // 8)[None, :]
    a, b, c, d = tl.philox(tl.load(seed), columns, zeros + rows[:, None], zeros, zeros)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK // 2))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (ROWS, BLOCK)).to(tl.int32)
    return tl.where(bits >= threshold, scale, 0.0)


@triton.jit
def _load_sum(
    x, bias, residual, place, columns, is_column, mask, factors,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Load `residual + dropout(x + bias)` of a block of rows; zero outside of the mask."""
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        value *= factors
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def row_statistics(value, is_column, width, eps):
    """Return mean and 1 / standard deviation of every row of `[ROWS, BLOCK]`."""
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(is_column[None, :], value - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)


@triton.jit
def norm_gradient(gradient, normal, weight, rstd, width):
    """Return the gradient of LayerNorm's input.

    `gradient`, `normal` (the normalised input) `[ROWS, BLOCK]`, zero beyond the width; `weight [BLOCK]`; `rstd [ROWS]`.
    """
    scaled = gradient * weight[None, :]
    mean = tl.sum(scaled, axis=1) / width
    slope = tl.sum(scaled * normal, axis=1) / width
    return (scaled - mean[:, None] - normal * slope[:, None]) * rstd[:, None]


@triton.jit
def add_norm(
    x, bias, residual, weight, shift, seed, stream, product, means, rstds,
    count, width, eps, threshold, scale,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `LayerNorm(residual + dropout(x + bias))` twice, and the mean and 1 / standard deviation `[count]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < count, columns < width
    mask = is_row[:, None] & is_column[None, :]
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    factors = dropout_factors(seed, rows, threshold, scale, ROWS, BLOCK) if DROPOUT else scale
    value = _load_sum(x, bias, residual, place, columns, is_column, mask, factors, HAS_BIAS, HAS_RESIDUAL, DROPOUT)
    mean, rstd = row_statistics(value, is_column, width, eps)
    w = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=is_column, other=0.0).to(tl.float32)
    out = (value - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(stream + place, out.to(stream.dtype.element_ty), mask=mask)
    tl.store(product + place, out.to(product.dtype.element_ty), mask=mask)
    tl.store(means + rows, mean, mask=is_row)
    tl.store(rstds + rows, rstd, mask=is_row)


@triton.jit
def load_normal(value, means, rstds, rows, is_row, mask):
    """Return the rows without mean and with variance 1, zero outside of the mask, and 1 / standard deviation."""
    mean = tl.load(means + rows, mask=is_row, other=0.0)
    rstd = tl.load(rstds + rows, mask=is_row, other=0.0)
    return tl.where(mask, (value - mean[:, None]) * rstd[:, None], 0.0), rstd


@triton.jit
def load_gradient(
    of_stream, of_product, place, mask,
    HAS_STREAM: tl.constexpr, HAS_PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the sum of the gradients of a result that was stored twice, of those that there are."""
    gradient = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if HAS_STREAM:
        gradient += tl.load(of_stream + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_PRODUCT:
        gradient += tl.load(of_product + place, mask=mask, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def add_norm_gradient(
    x, bias, residual, weight, seed, means, rstds, of_stream, of_product, of_x, of_residual, partials,
    count, width, rows_each, threshold, scale,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_STREAM: tl.constexpr, HAS_PRODUCT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of `x` and `residual` for `rows_each` rows, and the sums over these rows of those of
    LayerNorm's weight, its bias and `bias`: `partials [3, programs, width]`."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    w = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_shift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, rows_each, ROWS):
        rows = program * rows_each + start + tl.arange(0, ROWS)
        is_row = rows < count
        mask = is_row[:, None] & is_column[None, :]
        place = rows.to(tl.int64)[:, None] * width + columns[None, :]
        factors = dropout_factors(seed, rows, threshold, scale, ROWS, BLOCK) if DROPOUT else scale
        value = _load_sum(x, bias, residual, place, columns, is_column, mask, factors, HAS_BIAS, HAS_RESIDUAL, DROPOUT)
        normal, rstd = load_normal(value, means, rstds, rows, is_row, mask)
        gradient = load_gradient(of_stream, of_product, place, mask, HAS_STREAM, HAS_PRODUCT, ROWS, BLOCK)
        of_weight += gradient * normal
        of_shift += gradient
        result = norm_gradient(gradient, normal, w, rstd, width)
        if HAS_RESIDUAL:
            tl.store(of_residual + place, result.to(of_residual.dtype.element_ty), mask=mask)
        if DROPOUT:
            result *= factors
        tl.store(of_x + place, result.to(of_x.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            of_bias += tl.where(mask, result, 0.0)
    step = tl.num_programs(0).to(tl.int64) * width
    own = partials + program.to(tl.int64) * width + columns
    tl.store(own, tl.sum(of_weight, axis=0), mask=is_column)
    tl.store(own + step, tl.sum(of_shift, axis=0), mask=is_column)
    if HAS_BIAS:
        tl.store(own + 2 * step, tl.sum(of_bias, axis=0), mask=is_column)


@triton.jit
def sum_partials(partials, first, second, third, programs, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `partials [n, programs, width]` over programs, into `first`, `second` and `third [width]` for n = 1, 2, 3."""
    which = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    total = tl.zeros((PARTS, BLOCK), dtype=tl.float32)
    for start in range(0, programs, PARTS):
        parts = start + tl.arange(0, PARTS)
        place = (which * programs + parts).to(tl.int64)[:, None] * width + columns[None, :]
        total += tl.load(partials + place, mask=(parts[:, None] < programs) & is_column[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first + columns, result.to(first.dtype.element_ty), mask=is_column)
    elif which == 1:
        tl.store(second + columns, result.to(second.dtype.element_ty), mask=is_column)
    else:
        tl.store(third + columns, result.to(third.dtype.element_ty), mask=is_column)


@triton.jit
def gelu(x, bias, out, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Store the exact GELU of `x + bias`, z Φ(z)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    mask = (rows < count)[:, None] & is_column[None, :]
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, (0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_gradient(
    x, bias, of_out, of_x, partials, count, width, rows_each, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Store the gradient of `x` for `rows_each` rows and a block of columns, and its sum over these rows, which is
    the gradient of `bias`: `partials [1, programs, width]`. The derivative is Φ(z) + z φ(z)."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    b = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, rows_each, ROWS):
        rows = program * rows_each + start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & is_column[None, :]
        place = rows.to(tl.int64)[:, None] * width + columns[None, :]
        z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + b[None, :]
        gradient = tl.load(of_out + place, mask=mask, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        gradient *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
        tl.store(of_x + place, gradient.to(of_x.dtype.element_ty), mask=mask)
        of_bias += gradient
    tl.store(partials + program.to(tl.int64) * width + columns, tl.sum(of_bias, axis=0), mask=is_column)
