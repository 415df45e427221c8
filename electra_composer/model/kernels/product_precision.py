"""Precision of fp32 products in the Triton kernels: the one that torch's own products are set to."""

from __future__ import annotations

import torch


def product_precision() -> str:
    """Return `tf32` or `ieee`, the value of `input_precision` of `tl.dot`. It has no effect on bf16 and fp16."""
    # Workaround (torch 2.9): `allow_tf32` was renamed and raises if `fp32_precision` was set; goes when torch 2.9 is
    # the oldest version supported.
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"
