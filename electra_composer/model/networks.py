"""Generator and discriminator networks and the weights they share (arXiv 2003.10555, sections 2 and 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.model.encoder import DisentangledEmbeddings, Embeddings, Encoder, init_weights
from electra_composer.model.heads import MaskedLMHead, ReplacedTokenHead
from electra_composer.model.kernels.attention import AttentionPattern
from electra_composer.model.sizes import (
    check_same_encoder,
    detects,
    discriminator_config,
    generates,
    generator_config,
)
from electra_composer.model.two_towers import TwoTowers


class ElectraNetworks(nn.Module):
    """The networks of an objective, without masking, sampling and losses.

    The discriminator is the network that is finetuned; where the objective predicts tokens, it is a masked language
    model, with `lm_head` in place of `rtd_head`. A generator is a Transformer or two towers (two_towers.py); objectives
    without a network that generates have none.

    Tied modules exist once, so nothing has to be synchronised. `model.sharing: tied` ties the embedding tables (paper,
    section 3.2) and their LayerNorm (google-research/electra); `model.tie_encoder` also ties the layers.

    Attributes:
        embeddings: of the discriminator, whatever the sharing: call it, or take its `tables()`. It has parameters
            `word.weight`, … only if the sharing is not `gdes`.
        generator_embeddings: None when tied; see :attr:`embeddings_of_generator`.

    Args:
        model: sizes.
        vocab_size: entries of the tokenizer's vocabulary.
        objective: its kind and its generator; by default those of ELECTRA.

    Raises:
        UserError: sizes that contradict each other.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, objective: ObjectiveConfig | None = None):
        super().__init__()
        objective = (objective or ObjectiveConfig()).resolved()
        has_network, has_towers = generates(objective), objective.generator == "two_tower"
        discriminator, generator = discriminator_config(model, vocab_size), generator_config(model, vocab_size)
        if model.tie_encoder:
            check_same_encoder(model, generator, discriminator)
        self.vocab_size, self.config_of_generator = vocab_size, generator
        self.embeddings: Embeddings | DisentangledEmbeddings = Embeddings(discriminator)
        self.generator_embeddings = Embeddings(generator) if has_network and model.sharing != "tied" else None
        if self.generator_embeddings is not None and model.sharing == "gdes":
            self.embeddings = DisentangledEmbeddings(discriminator, self.generator_embeddings)
        self.generator = Encoder(generator) if has_network and not (has_towers or model.tie_encoder) else None
        self.towers = TwoTowers(generator) if has_towers else None
        self.discriminator = Encoder(discriminator)
        width = generator.hidden_size if self.towers is None else self.towers.output_size
        self.mlm_head = MaskedLMHead(generator, width) if has_network else None
        self.rtd_head = ReplacedTokenHead(discriminator) if detects(objective) else None
        self.lm_head = None if detects(objective) else MaskedLMHead(discriminator)
        self.copy_head = nn.Linear(discriminator.hidden_size, 1) if objective.kind == "all_tokens_mlm" else None
        init_weights(self, model.initializer_range, truncated=model.init == "google")
        if model.init == "google":
            self._draw_defaults_of_tensorflow()
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Embeddings):
                    module.word.weight[vocab_size:] = 0.0

    def _draw_defaults_of_tensorflow(self) -> None:
        """Draw the weights for which google-research/electra names no initializer: TensorFlow's is Glorot-uniform.

        Source: `embeddings_project` in `model/modeling.py`, and the output layer of `_get_discriminator_output` in
        `run_pretraining.py`.
        """
        towers = [] if self.towers is None else [self.towers.left, self.towers.right]
        for encoder in (self.discriminator, self.generator, *towers):
            if encoder is not None and encoder.project is not None:
                nn.init.xavier_uniform_(encoder.project.weight)
        if self.rtd_head is not None:
            nn.init.xavier_uniform_(self.rtd_head.out.weight)

    @property
    def embeddings_of_generator(self) -> Embeddings:
        """Embeddings of the generator, also its output weights; those of the discriminator when tied."""
        if self.generator_embeddings is not None:
            return self.generator_embeddings
        assert isinstance(self.embeddings, Embeddings)
        return self.embeddings

    @property
    def modules_of_generator(self) -> list[nn.Module]:
        """Modules that the discriminator does not share."""
        parts = (self.generator_embeddings, self.generator, self.towers, self.mlm_head)
        return [part for part in parts if part is not None]

    @property
    def encoder_of_generator(self) -> Encoder:
        """Layers of the generator; those of the discriminator when tied, or where there is no generator."""
        return self.discriminator if self.generator is None else self.generator

    def generate(
        self,
        masked_ids: Tensor,
        positions: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        pattern: AttentionPattern,
    ) -> Tensor:
        """Compute the generator's features h_G(x^masked)_i at the masked positions i, after the MLM head's own layers.

        Args:
            masked_ids: x^masked, integers `[rows, length]`.
            positions: m, integers `[rows, N]`.
            token_type_ids, position_ids: integers `[rows, length]`.
            pattern: which tokens attend to each other.

        Returns:
            Floats `[rows, N, e]`, e the width of the generator's embeddings. Their product with its token embeddings
            gives the logits of p_G.
        """
        hidden = self.encoder_of_generator(
            self.embeddings_of_generator(masked_ids, token_type_ids, position_ids), pattern
        )
        assert self.mlm_head is not None
        return self.mlm_head(at(hidden, positions))

    def encode(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """Compute the discriminator's last hidden states.

        Args:
            input_ids, token_type_ids, position_ids: integers `[rows, length]`.
            pattern: which tokens attend to each other.

        Returns:
            Floats `[rows, length, hidden_size]`.
        """
        return self.discriminator(self.embeddings(input_ids, token_type_ids, position_ids), pattern)

    def discriminate(
        self, corrupted_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """Compute the discriminator's logits for x^corrupt; positive means replaced.

        The sign is that of google-research/electra; D of the paper is the probability of an original token. With
        `kind: electric` they are energies.

        Args:
            corrupted_ids: x^corrupt, integers `[rows, length]`.
            token_type_ids, position_ids: integers `[rows, length]`.
            pattern: which tokens attend to each other.

        Returns:
            fp32 `[rows, length]`.
        """
        assert self.rtd_head is not None
        return self.rtd_head(self.encode(corrupted_ids, token_type_ids, position_ids, pattern)).float()

    @torch.no_grad()
    def mlm_logits(self, mlm_features: Tensor) -> Tensor:
        """Compute the generator's logits from the output of :meth:`generate` and the current weights.

        `[rows, N, e]` → fp32 `[rows, N, vocab_size]`, all at once: for inspection, not for training.
        """
        assert self.mlm_head is not None
        return self._logits(mlm_features, self.embeddings_of_generator.word.weight, self.mlm_head)

    @torch.no_grad()
    def lm_logits(self, lm_features: Tensor) -> Tensor:
        """Same as :meth:`mlm_logits` for the features of `lm_head`, where the discriminator predicts tokens."""
        assert self.lm_head is not None
        return self._logits(lm_features, self.embeddings.tables()[0], self.lm_head)

    def _logits(self, features: Tensor, table: Tensor, head: MaskedLMHead) -> Tensor:
        return F.linear(features, table[: self.vocab_size], head.bias[: self.vocab_size]).float()


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Select hidden states: `[rows, length, width]` at `positions [rows, N]` → `[rows, N, width]`."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
