"""Finetuning models built on a pretrained discriminator: sequence classification and replaced-token detection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.model.encoder import Embeddings, Encoder, EncoderConfig, init_weights
from electra_composer.model.heads import ReplacedTokenHead
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.kernels.dropout import Dropout


class ElectraForReplacedTokens(nn.Module):
    """Discriminator with its replaced-token head.

    Args:
        config: sizes of the discriminator.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.attention_path = "sdpa"
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.rtd_head = ReplacedTokenHead(config)
        init_weights(self, config.initializer_range)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """Integers `[rows, length]` → logits, fp32 `[rows, length]`; positive means replaced."""
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        return self.rtd_head(self.encoder(embedded, pattern_of(sequence_ids, self.attention_path))).float()


class ElectraWithHead(nn.Module):
    """Discriminator encoder with dropout and a head.

    Args:
        config: sizes of the discriminator.
        head: last hidden states → outputs; it keeps its initial weights.
        dropout: dropout probability before the head.
        per_token: whether the head reads the states of all tokens, `[rows, length, hidden]`, instead of those of
            `[CLS]`, `[rows, hidden]`.
    """

    def __init__(self, config: EncoderConfig, head: nn.Module, dropout: float = 0.1, per_token: bool = False):
        super().__init__()
        self.attention_path = "sdpa"
        self.per_token = per_token
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.dropout = Dropout(dropout)
        init_weights(self, config.initializer_range)
        self.head = head

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, sequence_ids: Tensor, *more: Tensor
    ) -> Any:
        """Integers `[rows, length]`, one example per row → what the head returns; it receives `more` too."""
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        hidden = self.encoder(embedded, pattern_of(sequence_ids, self.attention_path))
        return self.head(self.dropout(hidden if self.per_token else hidden[:, 0]), *more)


def linear_head(hidden_size: int, outputs: int) -> nn.Linear:
    """Build a linear head as google-research/electra does: weight Xavier-uniform, bias zero."""
    head = nn.Linear(hidden_size, outputs)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class TransformersHead(nn.Module):
    """Head of transformers' `ElectraForSequenceClassification`, with its names: dense, GELU (erf), dropout, out_proj.

    Weights are drawn as those of the encoder, as transformers does.

    Args:
        config: sizes of the discriminator.
        outputs: number of outputs.
        dropout: dropout probability before the last layer.
    """

    def __init__(self, config: EncoderConfig, outputs: int, dropout: float = 0.1):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(dropout)
        self.out_proj = nn.Linear(config.hidden_size, outputs)
        init_weights(self, config.initializer_range)

    def forward(self, hidden: Tensor) -> Tensor:
        """Last hidden states `[rows, hidden]` → fp32 `[rows, outputs]`, without autocast: head_maps.py needs fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out_proj(self.dropout(F.gelu(self.dense(hidden.float()))))


class ElectraForClassification(nn.Module):
    """Discriminator encoder with the classification head of google-research/electra and richarddwang/electra_pytorch.

    Dropout and one linear layer on the last hidden state of `[CLS]`, without tanh or further layers. Weight
    Xavier-uniform, bias zero.

    Args:
        config: sizes of the discriminator.
        num_labels: number of outputs; 1 for regression.
        classifier_dropout: dropout probability before the head.
    """

    def __init__(self, config: EncoderConfig, num_labels: int, classifier_dropout: float = 0.1):
        super().__init__()
        self.attention_path = "sdpa"
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.dropout = Dropout(classifier_dropout)
        self.head = nn.Linear(config.hidden_size, num_labels)
        init_weights(self, config.initializer_range)
        nn.init.xavier_uniform_(self.head.weight)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """Integers `[rows, length]`, one example per row → fp32 `[rows, num_labels]`."""
        embedded = self.embeddings(input_ids, token_type_ids, position_ids)
        hidden = self.encoder(embedded, pattern_of(sequence_ids, self.attention_path))
        return self.head(self.dropout(hidden[:, 0])).float()
