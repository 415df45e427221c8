"""Finetuning models built on a pretrained discriminator: sequence classification and replaced-token detection."""

from __future__ import annotations

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
