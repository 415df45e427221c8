"""Triton kernels of embeddings_triton.py; tensors are contiguous, arithmetic is in fp32."""

import triton
import triton.language as tl

from electra_composer.model.kernels.layers_triton_kernels import (
    dropout_factors,
    load_gradient,
    load_normal,
    norm_gradient,
    row_statistics,
)


@triton.jit
def _load_rows(table, ids, rows, columns, is_row, mask, width):
    """Load the rows of an embedding table for a block of tokens."""
    index = tl.load(ids + rows, mask=is_row, other=0).to(tl.int64)
    return tl.load(table + index[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_sum(
    words, positions, types, word_ids, position_ids, type_ids, rows, columns, is_row, mask, width
):  # fmt: skip
    value = _load_rows(words, word_ids, rows, columns, is_row, mask, width)
    value += _load_rows(positions, position_ids, rows, columns, is_row, mask, width)
    return value + _load_rows(types, type_ids, rows, columns, is_row, mask, width)


@triton.jit
def embed(
    words, positions, types, word_ids, position_ids, type_ids, weight, shift, seed, stream, product, means, rstds,
    count, width, eps, threshold, scale, DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store `dropout(LayerNorm(word + position + type))` `[count, width]` twice, and the statistics `[count]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < count, columns < width
    mask = is_row[:, None] & is_column[None, :]
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    value = _load_sum(words, positions, types, word_ids, position_ids, type_ids, rows, columns, is_row, mask, width)
    mean, rstd = row_statistics(value, is_column, width, eps)
    w = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    b = tl.load(shift + columns, mask=is_column, other=0.0).to(tl.float32)
    out = (value - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    if DROPOUT:
        out *= dropout_factors(seed, rows, threshold, scale, ROWS, BLOCK)
    tl.store(stream + place, out.to(stream.dtype.element_ty), mask=mask)
    tl.store(product + place, out.to(product.dtype.element_ty), mask=mask)
    tl.store(means + rows, mean, mask=is_row)
    tl.store(rstds + rows, rstd, mask=is_row)


@triton.jit
def embed_gradient(
    words, positions, types, word_ids, position_ids, type_ids, weight, seed, means, rstds, of_stream, of_product,
    of_sum, partials, count, width, rows_each, threshold, scale,
    DROPOUT: tl.constexpr, HAS_STREAM: tl.constexpr, HAS_PRODUCT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the sum of the embeddings for `rows_each` tokens, fp32 `[count, width]`, and the sums over
    these tokens of those of LayerNorm's weight and bias: `partials [2, programs, width]`."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    w = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    of_shift = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, rows_each, ROWS):
        rows = program * rows_each + start + tl.arange(0, ROWS)
        is_row = rows < count
        mask = is_row[:, None] & is_column[None, :]
        place = rows.to(tl.int64)[:, None] * width + columns[None, :]
        value = _load_sum(words, positions, types, word_ids, position_ids, type_ids, rows, columns, is_row, mask, width)
        normal, rstd = load_normal(value, means, rstds, rows, is_row, mask)
        gradient = load_gradient(of_stream, of_product, place, mask, HAS_STREAM, HAS_PRODUCT, ROWS, BLOCK)
        if DROPOUT:
            gradient *= dropout_factors(seed, rows, threshold, scale, ROWS, BLOCK)
        of_weight += gradient * normal
        of_shift += gradient
        tl.store(of_sum + place, norm_gradient(gradient, normal, w, rstd, width), mask=mask)
    own = partials + program.to(tl.int64) * width + columns
    tl.store(own, tl.sum(of_weight, axis=0), mask=is_column)
    tl.store(own + tl.num_programs(0).to(tl.int64) * width, tl.sum(of_shift, axis=0), mask=is_column)


@triton.jit
def sum_by_id(
    position_ids, type_ids, values, partials, count, width, num_positions, entries, tokens_each,
    TOKENS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of `values` fp32 `[count, width]` that have the same position, and those of the same type, for
    `tokens_each` of them: `partials [programs, entries, width]`, first the positions, then the types.

    The sum is a product with a matrix of zeros and ones, which says whether a token has a position or type.
    """
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < width
    total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
    for start in range(0, tokens_each, TOKENS):
        tokens = tl.program_id(0) * tokens_each + start + tl.arange(0, TOKENS)
        is_token = tokens < count
        position = tl.load(position_ids + tokens, mask=is_token, other=-1)
        entry_of_type = tl.load(type_ids + tokens, mask=is_token, other=0) + num_positions
        mask = is_token[:, None] & is_column[None, :]
        value = tl.load(values + tokens.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
        has = (entry[:, None] == position[None, :]) | (entry[:, None] == entry_of_type[None, :])
        # Three products in tf32 are as exact as one in fp32, and are made by the tensor cores.
        total = tl.dot(has.to(tl.float32), value, total, input_precision="tf32x3")
    place = (tl.program_id(0) * entries + entry).to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(partials + place, total, mask=(entry < entries)[:, None] & is_column[None, :])
