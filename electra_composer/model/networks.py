"""Generator and discriminator networks and the weights they share (arXiv 2003.10555, sections 2 and 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.config import ModelConfig
from electra_composer.model.encoder import DisentangledEmbeddings, Embeddings, Encoder, init_weights
from electra_composer.model.heads import MaskedLMHead, ReplacedTokenHead
from electra_composer.model.kernels.attention import AttentionPattern
from electra_composer.model.sizes import check_same_encoder, discriminator_config, generator_config


class ElectraNetworks(nn.Module):
    """Generator and discriminator, without masking, sampling and losses.

    Tied modules exist once, so nothing has to be synchronised. `model.sharing: tied` ties the embedding tables (paper,
    section 3.2) and their LayerNorm (google-research/electra); `model.tie_encoder` also ties the layers.

    Attributes:
        embeddings: of the discriminator, whatever the sharing: call it, or take its `tables()`. It has parameters
            `word.weight`, … only if the sharing is not `gdes`.
        generator_embeddings: None when tied; see :attr:`embeddings_of_generator`.

    Args:
        model: sizes.
        vocab_size: entries of the tokenizer's vocabulary.

    Raises:
        UserError: sizes that contradict each other.
    """

    def __init__(self, model: ModelConfig, vocab_size: int):
        super().__init__()
        discriminator, generator = discriminator_config(model, vocab_size), generator_config(model, vocab_size)
        if model.tie_encoder:
            check_same_encoder(model, generator, discriminator)
        self.vocab_size = vocab_size
        self.embeddings: Embeddings | DisentangledEmbeddings = Embeddings(discriminator)
        self.generator_embeddings = None if model.sharing == "tied" else Embeddings(generator)
        if model.sharing == "gdes":
            assert self.generator_embeddings is not None
            self.embeddings = DisentangledEmbeddings(discriminator, self.generator_embeddings)
        self.generator = None if model.tie_encoder else Encoder(generator)
        self.discriminator = Encoder(discriminator)
        self.mlm_head = MaskedLMHead(generator)
        self.rtd_head = ReplacedTokenHead(discriminator)
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
        for encoder in (self.discriminator, self.generator):
            if encoder is not None and encoder.project is not None:
                nn.init.xavier_uniform_(encoder.project.weight)
        nn.init.xavier_uniform_(self.rtd_head.out.weight)

    @property
    def embeddings_of_generator(self) -> Embeddings:
        """Embeddings of the generator, also its output weights; those of the discriminator when tied."""
        if self.generator_embeddings is not None:
            return self.generator_embeddings
        assert isinstance(self.embeddings, Embeddings)
        return self.embeddings

    @property
    def encoder_of_generator(self) -> Encoder:
        """Layers of the generator; those of the discriminator when tied."""
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
        return self.mlm_head(hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])))

    def discriminate(
        self, corrupted_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, pattern: AttentionPattern
    ) -> Tensor:
        """Compute the discriminator's logits for x^corrupt; positive means replaced.

        The sign is that of google-research/electra; D of the paper is the probability of an original token.

        Args:
            corrupted_ids: x^corrupt, integers `[rows, length]`.
            token_type_ids, position_ids: integers `[rows, length]`.
            pattern: which tokens attend to each other.

        Returns:
            fp32 `[rows, length]`.
        """
        embedded = self.embeddings(corrupted_ids, token_type_ids, position_ids)
        return self.rtd_head(self.discriminator(embedded, pattern)).float()

    @torch.no_grad()
    def mlm_logits(self, mlm_features: Tensor) -> Tensor:
        """Compute the generator's logits from the output of :meth:`generate` and the current weights.

        `[rows, N, e]` → fp32 `[rows, N, vocab_size]`, all at once: for inspection, not for training.
        """
        weight = self.embeddings_of_generator.word.weight[: self.vocab_size]
        return F.linear(mlm_features, weight, self.mlm_head.bias[: self.vocab_size]).float()
