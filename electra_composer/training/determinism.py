"""Deterministic training on a GPU: `trainer.deterministic`, and the operators that need it.

Two runs with one seed have the same rows, masks, noise and dropout. Their losses are equal to the bit if all kernels
add in a fixed order. On a CPU they do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from composer.utils import reproducibility

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError, one_line

NONDETERMINISTIC = ("embedding_dense_backward",)
"""Operators of a pretraining step with `trainer.layer_kernels` torch that torch documents as not deterministic on CUDA,
without those of attention (with triton there are none, see embeddings_triton.py), and
without `scatter` and `scatter_add` at masked positions: of the addends of a position all but one are zero.
tests/training/test_determinism.py compares it with the operators of a step and with torch's documentation."""

NONDETERMINISTIC_ATTENTION = {
    "sdpa": "scaled_dot_product_attention's backward",
    "varlen": "_flash_attention_backward",
}
"""By attention path: its backward adds the parts of the queries' gradient with atomics."""


def use_deterministic_kernels(trainer: TrainerConfig) -> None:
    """Apply `trainer.deterministic`. Call it before anything else uses CUDA, which reads CUBLAS_WORKSPACE_CONFIG once.

    It is torch.use_deterministic_algorithms, with cuBLAS and cuDNN set accordingly.
    """
    if trainer.deterministic:
        reproducibility.configure_deterministic_mode()


def describe_nondeterminism(trainer: TrainerConfig, device: str, attention_path: str, layer_kernels: str) -> str | None:
    """Return a line that names what adds in no fixed order in a pretraining step; None if nothing does.

    Args:
        device: `cpu` or `gpu`.
        attention_path: of kernels/attention.py.
        layer_kernels: `torch` or `triton`.
    """
    if device == "cpu" or trainer.deterministic:
        return None
    of_layers = NONDETERMINISTIC if layer_kernels == "torch" else ()
    names = [*of_layers, *filter(None, [NONDETERMINISTIC_ATTENTION.get(attention_path)])]
    if not names:
        return None
    return (
        f"not deterministic: {', '.join(names)}; two runs with one seed differ by rounding unless "
        "trainer.deterministic=true (slower)"
    )


@contextlib.contextmanager
def explain_nondeterministic_operators() -> Iterator[None]:
    """Turn the error of an operator without a deterministic kernel into one line that names it.

    Raises:
        UserError: naming trainer.deterministic and the operator.
    """
    try:
        yield
    # Workaround (torch 2.7): it is a RuntimeError, recognizable by its text only; goes when torch has a class for it.
    except RuntimeError as error:
        found = re.search(r"(\S+) does not have a deterministic implementation", one_line(error))
        if found is None:
            raise
        raise UserError(
            f"trainer.deterministic is true, and torch has no deterministic kernel for {found[1]} on this device; "
            "set trainer.deterministic=false"
        ) from error
