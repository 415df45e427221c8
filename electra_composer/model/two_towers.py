"""Two-tower cloze transformer, the noise distribution of Electric (Clark et al., EMNLP 2020, arXiv 2012.08561).

A masked language model gives the probability of a token only where the token is masked. Electric needs that of every
token of the text, in one pass: one Transformer reads from left to right, another from right to left, and the prediction
for token t comes from the left one at t - 1 and the right one at t + 1 (section 2 of the paper; class
`TwoTowerClozeTransformer` of google-research/electra `run_pretraining.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.model.encoder import Embeddings, Encoder, EncoderConfig
from electra_composer.model.kernels.attention import pattern_of


class TwoTowers(nn.Module):
    """Hidden states that know a token's context, but not the token.

    Both towers have the sizes of `config`, each with its own projection and layers; embeddings are shared, and their
    dropout is drawn for each tower, as by google-research/electra.

    Attributes:
        left: reads each example from left to right.
        right: reads each example from right to left.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.left = Encoder(config)
        self.right = Encoder(config)

    @property
    def output_size(self) -> int:
        """Width of the hidden states of both towers together."""
        return 2 * self.config.hidden_size

    def forward(
        self,
        embeddings: Embeddings,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        attention_path: str = "sdpa",
        most_examples: int | None = None,
    ) -> Tensor:
        """Compute the hidden states of the left context and of the right context of every token.

        Args:
            embeddings: of the generator.
            input_ids, token_type_ids, position_ids: integers `[rows, length]`; nothing needs to be masked.
            sequence_ids: integers `[rows, length]`; 0 for padding, otherwise the example's number in the row, from 1.
            attention_path, most_examples: `path` and `most_examples` of :func:`attention.pattern_of`. The path `triton`
                has no causal kernel; the towers then take `sdpa`, on any device.

        Returns:
            Floats `[rows, length, 2 * hidden_size]`. The first half at t is the left tower's state at t - 1, zeros for
            the first token of an example; the second half is the right tower's at t + 1, zeros for the last token. For
            padding the result has no meaning, but is finite.
        """
        tokens = [input_ids, token_type_ids, position_ids, sequence_ids]
        left = _read(self.left, embeddings, tokens, attention_path, most_examples)
        # Reversed rows make the second tower causal in the same direction, the only one that flash attention has.
        reverse = [of_tokens.flip(1) for of_tokens in tokens]
        right = _read(self.right, embeddings, reverse, attention_path, most_examples).flip(1)
        return torch.cat([left, right], dim=-1)


def _read(
    tower: Encoder, embeddings: Embeddings, tokens: list[Tensor], attention_path: str, most_examples: int | None
) -> Tensor:
    """Return a tower's states of the tokens before each token, `[rows, length, hidden_size]`.

    `tokens`: ids, token types, positions and examples, in the order in which the tower reads.
    """
    *ids, sequence_ids = tokens
    pattern = pattern_of(sequence_ids, attention_path, most_examples, causal=True)
    return _of_previous(tower(embeddings(*ids), pattern), sequence_ids)


def _of_previous(hidden: Tensor, sequence_ids: Tensor) -> Tensor:
    """Shift hidden states `[rows, length, hidden_size]` by one token within examples; the first tokens get zeros.

    google-research/electra rolls over the complete row instead: the first token gets the state of the row's last place,
    which has read all tokens, and in the right tower the last token that of the row's first place or of padding, whose
    softmax has no key that is allowed and hence all keys. Its predictions for `[CLS]` and the last `[SEP]` therefore
    know these tokens. Neither is ever sampled, but the discriminator's loss of Electric reads their probabilities.
    """
    begins = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return F.pad(hidden[:, :-1].masked_fill(begins[..., None], 0.0), (0, 0, 1, 0))
