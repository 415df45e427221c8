"""Triton kernels of attention_triton.py; shapes and launches are there.

`ids [rows, length]` are the numbers of the examples, `logsumexp [rows, heads, length]` fp32 is in base 2, and all
tensors are contiguous. Scores of a pair that may not attend are set to a finite number: a row of scores without any
pair, as in a tile of other examples, then has no infinite maximum, and its terms vanish when the maximum of a tile with
pairs replaces it.
"""

import triton
import triton.language as tl

MAX_LENGTH = tl.constexpr(512)
"""Tokens of the longest row; the counters of the random numbers have room for as many keys per query."""

ROUNDS = tl.constexpr(7)
"""Of Philox: the fewest that pass the tests of TestU01's BigCrush (Salmon et al. 2011); FlashAttention has as many."""

PADDING, OUTSIDE = tl.constexpr(2**30), tl.constexpr(2**30 + 1)
"""Ids of padding and of places beyond the row, so that ids do not decrease along a row."""

MASKED = tl.constexpr(-1e30)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_tile(base, places, length, stride, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a head's numbers at these places of a row, `[places, BLOCK_D]`; zero outside."""
    columns = tl.arange(0, BLOCK_D)
    inside = (places[:, None] < length) & (columns[None, :] < HEAD_SIZE)
    return tl.load(base + places[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(base, values, places, length, stride, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (places[:, None] < length) & (columns[None, :] < HEAD_SIZE)
    tl.store(base + places[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_ids(ids, places, length):
    loaded = tl.load(ids + places, mask=places < length, other=0).to(tl.int32)
    return tl.where(places < length, tl.where(loaded == 0, PADDING, loaded), OUTSIDE)


@triton.jit
def _range_of_examples(ids, some, length, STEP: tl.constexpr, BLOCK_L: tl.constexpr):
    """Return a range of places, from a multiple of `STEP`, that contains all examples whose ids are in `some`."""
    places = tl.arange(0, BLOCK_L)
    known = _load_ids(ids, places, length)
    meets = (known >= tl.min(some, axis=0)) & (known <= tl.max(some, axis=0))
    first = tl.min(tl.where(meets, places, BLOCK_L), axis=0)
    return first // STEP * STEP, tl.max(tl.where(meets, places, -1), axis=0) + 1


@triton.jit
def _is_kept(
    seed, stream, first_query, first_key, threshold,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return which probabilities of a tile of queries (a multiple of 16) and keys (a multiple of 32) dropout keeps.

    Booleans `[QUERIES, KEYS]`, or transposed. They depend on the seed, the stream (the number of row and head) and the
    places of query and key alone, not on how the work is split. A call of Philox gives 16 bits to each of 8 pairs:
    queries i and i + 8 of 16, keys j, j + 8, j + 16 and j + 24 of 32. These are in one thread of a product's result.
    """
    queries = first_query // 2 + tl.arange(0, QUERIES // 2)
    keys = first_key // 4 + tl.arange(0, KEYS // 4)
    if TRANSPOSED:
        count = queries[None, :] * (MAX_LENGTH // 4) + keys[:, None]
    else:
        count = queries[:, None] * (MAX_LENGTH // 4) + keys[None, :]
    zeros = count * 0
    a, b, c, d = tl.philox(seed, count, zeros + stream, zeros, zeros, n_rounds=ROUNDS)
    bits = _two_bits(a, threshold) | _two_bits(b, threshold) << 2
    bits |= _two_bits(c, threshold) << 4 | _two_bits(d, threshold) << 6
    of_key, of_query = tl.arange(0, 4), tl.arange(0, 2)
    if TRANSPOSED:
        bits = tl.reshape(bits, (KEYS // 32, 8, QUERIES // 16, 8))[:, None, :, :, None, :]
        bits >>= of_key[None, :, None, None, None, None] * 2 + of_query[None, None, None, None, :, None]
        bits = tl.reshape(bits & 1, (KEYS, QUERIES))
    else:
        bits = tl.reshape(bits, (QUERIES // 16, 8, KEYS // 32, 8))[:, None, :, :, None, :]
        bits >>= of_key[None, None, None, None, :, None] * 2 + of_query[None, :, None, None, None, None]
        bits = tl.reshape(bits & 1, (QUERIES, KEYS))
    return bits != 0


@triton.jit
def _two_bits(random, threshold):
    """Whether the lower and the upper 16 bits are at least the threshold, as two bits."""
    lower, upper = (random & 0xFFFF).to(tl.int32), (random >> 16).to(tl.int32)
    return (lower >= threshold).to(tl.int32) | (upper >= threshold).to(tl.int32) << 1


@triton.jit(do_not_specialize_on_alignment=["seed"])
def forward(
    qkv, ids, seed, out, logsumexp, length, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    BLOCK_L: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store attention's result and the log-sum-exp for a block of queries of one row and head."""
    HIDDEN: tl.constexpr = HEADS * HEAD_SIZE
    stream = tl.program_id(0) // blocks
    row, head = (stream // HEADS).to(tl.int64), stream % HEADS
    first_query = tl.program_id(0) % blocks * BLOCK
    queries = first_query + tl.arange(0, BLOCK)
    source, ids = qkv + row * length * 3 * HIDDEN + head * HEAD_SIZE, ids + row * length
    q = _load_tile(source, queries, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    query_ids = _load_ids(ids, queries, length)
    number = tl.load(seed)
    attended = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    largest = tl.full((BLOCK,), MASKED, dtype=tl.float32)
    if BLOCK_L == STEP:
        first, end = 0, STEP
    else:
        first, end = _range_of_examples(ids, query_ids, length, STEP, BLOCK_L)
    for start in range(first, end, STEP):
        keys = start + tl.arange(0, STEP)
        k = _load_tile(source + HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
        v = _load_tile(source + 2 * HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = tl.where(query_ids[:, None] == _load_ids(ids, keys, length)[None, :], scores, MASKED)
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        terms = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(terms, axis=1)
        if DROPOUT:
            terms = tl.where(_is_kept(number, stream, first_query, start, threshold, BLOCK, STEP, False), terms, 0.0)
        attended = tl.dot(terms.to(v.dtype), v, attended * shrink[:, None], input_precision=PRECISION)
        largest = larger
    attended *= (keep_scale / total)[:, None]
    _store_tile(out + row * length * HIDDEN + head * HEAD_SIZE, attended, queries, length, HIDDEN, HEAD_SIZE, BLOCK_D)
    tl.store(logsumexp + stream.to(tl.int64) * length + queries, largest + tl.log2(total), mask=queries < length)


@triton.jit(do_not_specialize_on_alignment=["seed"])
def backward_of_tile(
    qkv, ids, seed, logsumexp, grad_out, grad_qkv, length, scale, threshold, keep_scale,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one row and head, of at most `BLOCK` tokens."""
    HIDDEN: tl.constexpr = HEADS * HEAD_SIZE
    stream = tl.program_id(0)
    row, head = (stream // HEADS).to(tl.int64), stream % HEADS
    places = tl.arange(0, BLOCK)
    place = row * length * 3 * HIDDEN + head * HEAD_SIZE
    qkv, grad_qkv, ids = qkv + place, grad_qkv + place, ids + row * length
    grad_out += row * length * HIDDEN + head * HEAD_SIZE
    q = _load_tile(qkv, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    k = _load_tile(qkv + HIDDEN, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    v = _load_tile(qkv + 2 * HIDDEN, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    upstream = _load_tile(grad_out, places, length, HIDDEN, HEAD_SIZE, BLOCK_D)
    known = _load_ids(ids, places, length)
    normalizer = tl.load(logsumexp + stream.to(tl.int64) * length + places, mask=places < length, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    chances = tl.where(known[:, None] == known[None, :], tl.exp2(scores - normalizer[:, None]), 0.0)
    dropped = chances * keep_scale
    if DROPOUT:
        is_kept = _is_kept(tl.load(seed), stream, 0, 0, threshold, BLOCK, BLOCK, False)
        dropped = tl.where(is_kept, dropped, 0.0)
    grad_v = tl.dot(tl.trans(dropped.to(q.dtype)), upstream, input_precision=PRECISION)
    _store_tile(grad_qkv + 2 * HIDDEN, grad_v, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    of_chances = tl.dot(upstream, tl.trans(v), input_precision=PRECISION) * keep_scale
    if DROPOUT:
        of_chances = tl.where(is_kept, of_chances, 0.0)
    of_chances -= tl.sum(chances * of_chances, axis=1)[:, None]
    of_scores = (chances * of_chances).to(q.dtype)
    grad_k = tl.dot(tl.trans(of_scores), q, input_precision=PRECISION) * scale
    _store_tile(grad_qkv + HIDDEN, grad_k, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    grad_q = tl.dot(of_scores, k, input_precision=PRECISION) * scale
    _store_tile(grad_qkv, grad_q, places, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)


@triton.jit
def _gradients_as_keys(
    qkv, ids, number, out, logsumexp, grad_out, grad_qkv, stream, first_place, own_ids, first, end,
    length, scale, threshold, keep_scale,
    HIDDEN: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of keys and values."""
    BLOCK: tl.constexpr = own_ids.shape[0]
    keys = first_place + tl.arange(0, BLOCK)
    k = _load_tile(qkv + HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    v = _load_tile(qkv + 2 * HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    grad_k, grad_v = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32), tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(first, end, STEP):
        queries = start + tl.arange(0, STEP)
        q = _load_tile(qkv, queries, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
        upstream = _load_tile(grad_out, queries, length, HIDDEN, HEAD_SIZE, BLOCK_D)
        mean = _row_products(_load_tile(out, queries, length, HIDDEN, HEAD_SIZE, BLOCK_D), upstream)
        normalizer = tl.load(logsumexp + queries, mask=queries < length, other=0.0)
        # `[keys, queries]`, because a left factor that has to be transposed goes through shared memory.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        meets = own_ids[:, None] == _load_ids(ids, queries, length)[None, :]
        chances = tl.where(meets, tl.exp2(scores - normalizer[None, :]), 0.0)
        of_chances = tl.dot(v, tl.trans(upstream), input_precision=PRECISION) * keep_scale
        dropped = chances * keep_scale
        if DROPOUT:
            is_kept = _is_kept(number, stream, start, first_place, threshold, STEP, BLOCK, True)
            dropped, of_chances = tl.where(is_kept, dropped, 0.0), tl.where(is_kept, of_chances, 0.0)
        grad_v = tl.dot(dropped.to(q.dtype), upstream, grad_v, input_precision=PRECISION)
        of_scores = (chances * (of_chances - mean[None, :])).to(q.dtype)
        grad_k = tl.dot(of_scores, q, grad_k, input_precision=PRECISION)
    _store_tile(grad_qkv + HIDDEN, grad_k * scale, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    _store_tile(grad_qkv + 2 * HIDDEN, grad_v, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)


@triton.jit
def _gradient_as_queries(
    qkv, ids, number, out, logsumexp, grad_out, grad_qkv, stream, first_place, own_ids, first, end,
    length, scale, threshold, keep_scale,
    HIDDEN: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of queries."""
    BLOCK: tl.constexpr = own_ids.shape[0]
    queries = first_place + tl.arange(0, BLOCK)
    q = _load_tile(qkv, queries, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
    upstream = _load_tile(grad_out, queries, length, HIDDEN, HEAD_SIZE, BLOCK_D)
    mean = _row_products(_load_tile(out, queries, length, HIDDEN, HEAD_SIZE, BLOCK_D), upstream)
    normalizer = tl.load(logsumexp + queries, mask=queries < length, other=0.0)
    grad_q = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(first, end, STEP):
        keys = start + tl.arange(0, STEP)
        k = _load_tile(qkv + HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
        v = _load_tile(qkv + 2 * HIDDEN, keys, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        meets = own_ids[:, None] == _load_ids(ids, keys, length)[None, :]
        chances = tl.where(meets, tl.exp2(scores - normalizer[:, None]), 0.0)
        of_chances = tl.dot(upstream, tl.trans(v), input_precision=PRECISION) * keep_scale
        if DROPOUT:
            is_kept = _is_kept(number, stream, first_place, start, threshold, BLOCK, STEP, False)
            of_chances = tl.where(is_kept, of_chances, 0.0)
        of_scores = (chances * (of_chances - mean[:, None])).to(k.dtype)
        grad_q = tl.dot(of_scores, k, grad_q, input_precision=PRECISION)
    _store_tile(grad_qkv, grad_q * scale, queries, length, 3 * HIDDEN, HEAD_SIZE, BLOCK_D)


@triton.jit
def _row_products(left, right):
    """Sum the products of two tiles over columns: for the result and its gradient, Σ probability × its gradient."""
    return tl.sum(left.to(tl.float32) * right.to(tl.float32), axis=1)


@triton.jit(do_not_specialize_on_alignment=["seed"])
def backward(
    qkv, ids, seed, out, logsumexp, grad_out, grad_qkv, length, blocks, scale, threshold, keep_scale,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    BLOCK_L: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block of tokens of one row and head: as keys and values, then as queries.

    The scores are computed twice, so that no two programs add to the same gradient.
    """
    HIDDEN: tl.constexpr = HEADS * HEAD_SIZE
    stream = tl.program_id(0) // blocks
    row, head = (stream // HEADS).to(tl.int64), stream % HEADS
    first_place = tl.program_id(0) % blocks * BLOCK
    ids += row * length
    place = row * length * HIDDEN + head * HEAD_SIZE
    out, grad_out = out + place, grad_out + place
    place = row * length * 3 * HIDDEN + head * HEAD_SIZE
    qkv, grad_qkv = qkv + place, grad_qkv + place
    logsumexp += stream.to(tl.int64) * length
    number = tl.load(seed)
    own_ids = _load_ids(ids, first_place + tl.arange(0, BLOCK), length)
    first, end = _range_of_examples(ids, own_ids, length, STEP, BLOCK_L)
    _gradients_as_keys(
        qkv, ids, number, out, logsumexp, grad_out, grad_qkv, stream, first_place, own_ids, first, end,
        length, scale, threshold, keep_scale, HIDDEN, HEAD_SIZE, BLOCK_D, STEP, DROPOUT, PRECISION,
    )  # fmt: skip
    _gradient_as_queries(
        qkv, ids, number, out, logsumexp, grad_out, grad_qkv, stream, first_place, own_ids, first, end,
        length, scale, threshold, keep_scale, HIDDEN, HEAD_SIZE, BLOCK_D, STEP, DROPOUT, PRECISION,
    )  # fmt: skip
