"""Transformer encoder of the generator and the discriminator.

Post-LayerNorm BERT layers (Devlin et al. 2018) as in google-research/electra `model/modeling.py`, with a fused
query-key-value projection. A row may hold several examples; attention never crosses from one to another
(kernels/attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.model.kernels import fused_layers
from electra_composer.model.kernels.attention import AttentionPattern, attention
from electra_composer.model.kernels.dropout import Dropout
from electra_composer.model.kernels.fused_layers import Hidden

EMBEDDING_ROWS_MULTIPLE = 64
"""Embedding tables are padded to a multiple of this many rows: for tensor cores, for kernels/sampling.py, and because
FSDP2 loses updates to tied parameters whose shards differ in size between ranks (pytorch#176076)."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of one encoder, derived by :mod:`electra_composer.model.sizes`."""

    vocab_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    dropout: float
    attention_dropout: float
    initializer_range: float
    layer_norm_eps: float
    type_vocab_size: int = 2

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding table; those from `vocab_size` on are zero and never used."""
        return -(-self.vocab_size // EMBEDDING_ROWS_MULTIPLE) * EMBEDDING_ROWS_MULTIPLE


Tables = tuple[Tensor, Tensor, Tensor]
"""Of tokens, positions and token types."""


class Embeddings(nn.Module):
    """Sum of token, position and token-type embeddings, LayerNorm, dropout.

    Attributes:
        fused: whether Triton kernels are used, as in :class:`Layer` (kernels/fused_layers.py).
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.fused = False
        self.word = nn.Embedding(config.padded_vocab_size, config.embedding_size)
        self.position = nn.Embedding(config.max_positions, config.embedding_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor | Hidden:
        """Three times integers `[rows, length]` → floats `[rows, length, embedding_size]`; twice if `fused`."""
        return _embed(self.tables(), (input_ids, position_ids, token_type_ids), self.norm, self.dropout, self.fused)

    def tables(self) -> Tables:
        """Return the tables of tokens, positions and token types, floats `[entries, embedding_size]` each."""
        return self.word.weight, self.position.weight, self.token_type.weight


class DisentangledEmbeddings(nn.Module):
    """Embeddings whose tables are those of other embeddings, without gradient, plus trainable differences.

    Gradient-disentangled embedding sharing (DeBERTaV3, He et al. 2021, arXiv 2111.09543, section 3.3):
    `E_D = stop_gradient(E_G) + E_Δ`, where E_Δ is zero at first. E_G is trained by the losses of its own network alone,
    E_Δ by those of this one, which also has a LayerNorm of its own.

    Args:
        config: sizes; those of the tables must equal those of `base`.
        base: embeddings with E_G. No submodule: its parameters have their names in another network.

    Attributes:
        word_delta, position_delta, token_type_delta: E_Δ, fp32 `[entries, embedding_size]`.
        fused: as in :class:`Embeddings`.
    """

    def __init__(self, config: EncoderConfig, base: Embeddings):
        super().__init__()
        self.fused = False
        self.word_delta = nn.Parameter(torch.zeros(config.padded_vocab_size, config.embedding_size))
        self.position_delta = nn.Parameter(torch.zeros(config.max_positions, config.embedding_size))
        self.token_type_delta = nn.Parameter(torch.zeros(config.type_vocab_size, config.embedding_size))
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)
        self._base = (base,)  # a tuple hides it from nn.Module, which would register it

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor | Hidden:
        """Same as :meth:`Embeddings.forward`, with the sums as tables."""
        return _embed(self.tables(), (input_ids, position_ids, token_type_ids), self.norm, self.dropout, self.fused)

    def tables(self) -> Tables:
        """Compute the sums E_D; see :meth:`Embeddings.tables`."""
        word, position, token_type = (table.detach() for table in self._base[0].tables())
        return word + self.word_delta, position + self.position_delta, token_type + self.token_type_delta


def _embed(tables: Tables, ids: Tables, norm: nn.LayerNorm, dropout: Dropout, fused: bool) -> Tensor | Hidden:
    """Look up tokens, positions and token types; sum, LayerNorm, dropout."""
    if fused:
        seed = fused_layers.draw_seeds(1, ids[0].device)[0] if dropout.is_active else None
        return fused_layers.embed(tables, ids, norm, seed, dropout.p)
    word, position, token_type = (F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
    return dropout(norm(word + position + token_type))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values, and one for the output."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, pattern: AttentionPattern) -> Tensor:
        """`hidden [rows, length, hidden_size]` → the same shape; `pattern`: which tokens attend to each other."""
        return self.out(self.attend(hidden, pattern))

    def attend(self, hidden: Tensor, pattern: AttentionPattern) -> Tensor:
        """Same as the forward, without the output matrix."""
        return attention(self.qkv(hidden), pattern, self.num_heads, self.dropout if self.training else 0.0)


class Layer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm; exact GELU (erf).

    Attributes:
        fused: whether Triton kernels are used; :func:`fused_layers.use_layer_kernels` sets it for a model.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.fused = False
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, hidden: Tensor | Hidden, pattern: AttentionPattern, seeds: tuple[Tensor | None, ...] = (None, None)
    ) -> Tensor | Hidden:
        """`hidden [rows, length, hidden_size]` → the same shape; if `fused`, twice, with two seeds of dropout."""
        if isinstance(hidden, tuple):
            return self._fused_forward(*hidden, pattern, *seeds)
        hidden = self.attention_norm(self.dropout(self.attention(hidden, pattern), residual=hidden))
        return self.mlp_norm(self.dropout(self.down(F.gelu(self.up(hidden))), residual=hidden))

    def _fused_forward(
        self, stream: Tensor, hidden: Tensor, pattern: AttentionPattern, first: Tensor | None, second: Tensor | None
    ) -> Hidden:
        linear_norm, out, p = fused_layers.linear_norm, self.attention.out, self.dropout.p
        attended = self.attention.attend(hidden, pattern)
        stream, hidden = linear_norm(attended, out, stream, self.attention_norm, first, p)
        inner = fused_layers.linear_gelu(hidden, self.up)
        return linear_norm(inner, self.down, stream, self.mlp_norm, second, p)


class Encoder(nn.Module):
    """Projection from embedding size to hidden size, if they differ, and the layers."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.project = (
            nn.Linear(config.embedding_size, config.hidden_size)
            if config.embedding_size != config.hidden_size
            else None
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(self, embedded: Tensor | Hidden, pattern: AttentionPattern) -> Tensor:
        """`embedded [rows, length, embedding_size]` → last hidden state `[rows, length, hidden_size]`."""
        if isinstance(embedded, tuple):
            return self._fused_forward(embedded, pattern)
        hidden = embedded if self.project is None else self.project(embedded)
        patterns = pattern.of_layers(len(self.layers), self.config.attention_dropout if self.training else 0.0)
        for layer, of_layer in zip(self.layers, patterns, strict=True):
            hidden = layer(hidden, of_layer)
        return hidden

    def _fused_forward(self, hidden: Hidden, pattern: AttentionPattern) -> Tensor:
        if self.project is not None:
            hidden = (self.project(hidden[1]),) * 2
        count = 2 * len(self.layers)
        drops = self.training and self.config.dropout > 0.0
        seeds = fused_layers.draw_seeds(count, hidden[0].device) if drops else (None,) * count
        patterns = pattern.of_layers(len(self.layers), self.config.attention_dropout if self.training else 0.0)
        for layer, of_layer, *its_seeds in zip(self.layers, patterns, seeds[::2], seeds[1::2], strict=True):
            hidden = layer(hidden, of_layer, its_seeds)
        return hidden[1]


def init_weights(module: nn.Module, initializer_range: float, truncated: bool = True) -> None:
    """Initialise weights from a normal distribution, biases to 0, LayerNorm to the identity.

    Args:
        initializer_range: standard deviation of the normal distribution.
        truncated: whether it is cut at two standard deviations, as by `create_initializer` in google-research/electra
            `model/modeling.py`; False: as by `_init_weights` of transformers' ELECTRA.
    """
    limit = 2 * initializer_range
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            if truncated:
                nn.init.trunc_normal_(part.weight, std=initializer_range, a=-limit, b=limit)
            else:
                nn.init.normal_(part.weight, std=initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
