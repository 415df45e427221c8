"""Sum of token, position and token-type embeddings, LayerNorm and dropout as one operator, for CUDA, in Triton.

The forward is one kernel, in embeddings_triton_kernels.py. No gradient is summed by atomics, so that the same inputs
give the same bits, and thousands of tokens that share an entry do not wait for each other:

* token table: `embedding_dense_backward`, which sorts the ids on CUDA and sums the rows of each, in its deterministic
  form: in newer versions of torch the other one adds rows by atomics where few ids are frequent (pytorch#172454);
* position and token-type tables: sums over blocks of tokens as products (`sum_by_id`), then over the blocks.

They are made in an operator of their own, because `torch.compile` would replace the first by an indexed addition with
atomics.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from electra_composer.model.kernels.embeddings_triton_kernels import embed as embed_kernel
from electra_composer.model.kernels.embeddings_triton_kernels import embed_gradient, sum_by_id
from electra_composer.model.kernels.layers_triton import PROGRAMS, add_partials, block_sizes, dropout_arguments, split

TOKENS, ENTRIES, COLUMNS = 32, 64, 64
"""Tokens, table entries and columns of one product of `sum_by_id`."""

TOKEN_BLOCKS = 16
"""Most blocks of tokens whose sums are stored."""


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let torch choose deterministic kernels, whatever its global setting is, and leave new tensors unfilled."""
    before = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic
    fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        settings.fill_uninitialized_memory = fills


@torch.library.custom_op("electra_composer::embed", mutates_args=())
def embed(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    word_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `dropout(LayerNorm(words[word_ids] + positions[position_ids] + types[type_ids]))`.

    Args:
        words, positions, types: embedding tables, floats `[entries, width]`.
        word_ids, position_ids, type_ids: integers `[rows, length]`, below the entries of their tables.
        weight, shift: of LayerNorm, `[width]`.
        seed: int64, one number on the device; None: no dropout.
        p: probability of dropout.
        eps: of LayerNorm.
        dtype: of the result.

    Returns:
        The result `[rows, length, width]` twice, as by :func:`layers_triton.add_norm`; mean and 1 / standard deviation
        of every token, fp32, for the backward.
    """
    word_ids, position_ids, type_ids = (ids.contiguous() for ids in (word_ids, position_ids, type_ids))
    count, width = word_ids.numel(), words.shape[1]
    stream, product = (words.new_empty(*word_ids.shape, width, dtype=dtype) for _ in range(2))
    means, rstds = (words.new_empty(count, dtype=torch.float32) for _ in range(2))
    sizes = block_sizes(width)
    embed_kernel[(triton.cdiv(count, sizes["ROWS"]),)](
        words.contiguous(), positions.contiguous(), types.contiguous(), word_ids, position_ids, type_ids,
        weight, shift, word_ids if seed is None else seed, stream, product, means, rstds,
        count, width, eps, *dropout_arguments(p), DROPOUT=seed is not None, num_warps=4, **sizes,
    )  # fmt: skip
    return stream, product, means, rstds


@embed.register_fake
def _(words, positions, types, word_ids, position_ids, type_ids, weight, shift, seed, p, eps, dtype):
    stream = words.new_empty(*word_ids.shape, words.shape[1], dtype=dtype)
    means = words.new_empty(word_ids.numel(), dtype=torch.float32)
    return stream, torch.empty_like(stream), means, torch.empty_like(means)


@torch.library.custom_op("electra_composer::embed_backward", mutates_args=())
def embed_backward(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    word_ids: Tensor,
    position_ids: Tensor,
    type_ids: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    means: Tensor,
    rstds: Tensor,
    of_stream: Tensor | None,
    of_product: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the token table, of the two others in one tensor, and of LayerNorm's weight and bias."""
    word_ids, position_ids, type_ids = (ids.contiguous() for ids in (word_ids, position_ids, type_ids))
    of_stream, of_product = (None if t is None else t.contiguous() for t in (of_stream, of_product))
    count, width = word_ids.numel(), words.shape[1]
    sizes = block_sizes(width)
    each, programs = split(count, sizes["ROWS"], PROGRAMS)
    of_sum = words.new_empty(count, width, dtype=torch.float32)
    partials = words.new_empty(2, programs, width, dtype=torch.float32)
    embed_gradient[(programs,)](
        words.contiguous(), positions.contiguous(), types.contiguous(), word_ids, position_ids, type_ids, weight,
        word_ids if seed is None else seed, means, rstds, of_sum if of_stream is None else of_stream,
        of_sum if of_product is None else of_product, of_sum, partials, count, width, each, *dropout_arguments(p),
        DROPOUT=seed is not None, HAS_STREAM=of_stream is not None, HAS_PRODUCT=of_product is not None,
        num_warps=4, **sizes,
    )  # fmt: skip
    of_weight, of_shift = torch.empty_like(weight), torch.empty_like(weight)
    add_partials(partials, of_weight, of_shift)
    with deterministic_kernels():
        of_words = torch.ops.aten.embedding_dense_backward(of_sum, word_ids.flatten(), words.shape[0], -1, False)
    of_others = _sum_by_id(position_ids, type_ids, of_sum, positions, types)
    return of_words.to(words.dtype), of_others, of_weight, of_shift


@embed_backward.register_fake
def _(words, positions, types, word_ids, position_ids, type_ids, weight, *options):
    of_others = positions.new_empty(positions.shape[0] + types.shape[0], positions.shape[1])
    of_words, *of_norm = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (words, weight, weight)
    )
    return of_words, of_others, *of_norm


def _sum_by_id(position_ids: Tensor, type_ids: Tensor, values: Tensor, positions: Tensor, types: Tensor) -> Tensor:
    """Sum the rows of `values` fp32 `[count, width]` by position and by type: `[positions + types, width]`."""
    (count, width), entries = values.shape, positions.shape[0] + types.shape[0]
    each, blocks = split(count, TOKENS, TOKEN_BLOCKS)
    partials = values.new_empty(1, blocks, entries * width)
    out = positions.new_empty(entries, width)
    sum_by_id[(blocks, triton.cdiv(entries, ENTRIES), triton.cdiv(width, COLUMNS))](
        position_ids, type_ids, values, partials, count, width, positions.shape[0], entries, each,
        TOKENS=TOKENS, ENTRIES=ENTRIES, BLOCK=COLUMNS, num_warps=4,
    )  # fmt: skip
    add_partials(partials, out)
    return out


def _setup_context(ctx, inputs, output):
    *tensors, _, seed, p, _, _ = inputs
    ctx.save_for_backward(*tensors, seed, *output[2:])
    ctx.p, ctx.types = p, tensors[2].shape[0]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, of_stream, of_product, *_):
    if of_stream is None and of_product is None:
        return (None,) * 12
    words, others, weight, shift = embed_backward(*ctx.saved_tensors, of_stream, of_product, ctx.p)
    positions = others.shape[0] - ctx.types
    return words, others[:positions], others[positions:], None, None, None, weight, shift, None, None, None, None


embed.register_autograd(_backward, setup_context=_setup_context)
