"""Output heads of the generator and of the discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.kernels import fused_layers


class MaskedLMHead(nn.Module):
    """Linear layer to the embedding size, GELU and LayerNorm, followed by the token embeddings as output weights.

    The product with the embeddings is not part of the forward: kernels/masked_lm.py computes it together with the loss
    and the sample. `bias [padded_vocab_size]` belongs to that product.

    Args:
        config: sizes of the generator.
        width: of the hidden states, by default `config.hidden_size`; see :class:`two_towers.TwoTowers` for another.
    """

    def __init__(self, config: EncoderConfig, width: int | None = None):
        super().__init__()
        self.fused = False  # see kernels/fused_layers.py
        self.dense = nn.Linear(config.hidden_size if width is None else width, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[rows, N, width]` → features `[rows, N, embedding_size]`."""
        if self.fused:
            return fused_layers.layer_norm(fused_layers.linear_gelu(hidden, self.dense), self.norm)
        return self.norm(F.gelu(self.dense(hidden)))


class ReplacedTokenHead(nn.Module):
    """Linear layer, GELU and one logit per token."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.fused = False  # see kernels/fused_layers.py
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states `[rows, length, hidden_size]` → logits `[rows, length]`; positive means replaced."""
        inner = fused_layers.linear_gelu(hidden, self.dense) if self.fused else F.gelu(self.dense(hidden))
        return self.out(inner).squeeze(-1)
