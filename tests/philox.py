"""The random numbers of attention's dropout in Triton, in NumPy: Philox 4x32 with 7 rounds (Salmon et al. 2011)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOW = np.uint64(0xFFFFFFFF)


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """`counter [..., 4]` uint32 → uint32 of the same shape."""
    a, b, c, d = (counter[..., part].astype(np.uint64) for part in range(4))
    first, second = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(rounds):
        left, right = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = right >> 32 ^ b ^ first, right & LOW, left >> 32 ^ d ^ second, left & LOW
        first, second = first + np.uint64(0x9E3779B9) & LOW, second + np.uint64(0xBB67AE85) & LOW
    return np.stack([a, b, c, d], -1).astype(np.uint32)


def keep_factors(seed: int, rows: int, heads: int, length: int, p: float) -> Tensor:
    """What dropout multiplies the probabilities by, `[rows, heads, length, length]` in double precision.

    A call decides for 8 pairs of query and key: the queries i and i + 8 of 16, and the keys j, j + 8, j + 16 and j + 24
    of 32, each pair of 16-bit halves for one key.
    """
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    call = (query // 16 * 8 + query % 8) * 128 + key // 32 * 8 + key % 8
    stream = np.arange(rows * heads).reshape(rows, heads, 1, 1)
    counter = np.zeros((rows, heads, length, length, 4), dtype=np.uint32)
    counter[..., 0], counter[..., 1] = call, stream
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    word = np.take_along_axis(words, np.broadcast_to(key // 8 % 4, words.shape[:-1])[..., None], -1)[..., 0]
    half = word >> (query // 8 % 2 * 16).astype(np.uint32) & 0xFFFF
    threshold = round(p * 2**16)
    return torch.from_numpy((half >= threshold) / (1 - threshold / 2**16))
