"""Objectives whose discriminator predicts tokens instead of replacements (arXiv 2003.10555, section 3.4).

* :class:`MaskedLMForPretraining`: BERT's masked language model (Devlin et al. 2018). No generator.
* :class:`ReplaceMLM`: masked positions hold samples of a generator instead of `[MASK]`, so that pretraining and
  finetuning see the same kind of text; the originals are predicted there.
* :class:`AllTokensMLM`: the same, but the tokens of all positions are predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.generators import Draw, Inputs, Samples, generator_terms, mlm_stats
from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm
from electra_composer.model.losses import LossTerm
from electra_composer.model.masker import Masked
from electra_composer.model.networks import at


class MaskedLMForPretraining(ElectraForPretraining):
    """`objective.kind: mlm`."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Losses that the forward returns."""
        return (LossTerm("mlm", 1.0, "masked"),)

    def generate_samples(
        self, inputs: Inputs, masked: Masked, draw: Draw, attention: tuple[str, int | None]
    ) -> Samples:
        """Fill the masked positions as in x^masked."""
        return Samples(masked.input_ids.gather(1, masked.positions), {}, {"masked": masked.weights.sum()})

    def train_on(
        self, corrupted_ids: Tensor, samples: Samples, inputs: Inputs, masked: Masked
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute the loss at the masked positions.

        Returns:
            `mlm_loss`; for inspection `lm_features [rows, N, embedding_size]`, see :meth:`lm_logits`, and their
            positions `lm_positions [rows, N]`; and the statistics.
        """
        mlm, inspected = predict_masked(self, corrupted_ids, inputs, masked)
        return {"mlm_loss": mlm.loss, **inspected}, {"tokens": inputs.tokens.sum().float(), **mlm_stats(mlm, masked)}


class ReplaceMLM(ElectraForPretraining):
    """`objective.kind: replace_mlm`."""

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Losses that the forward returns."""
        return (*generator_terms(self.objective), LossTerm("lm", 1.0, "masked"))

    def train_on(
        self, corrupted_ids: Tensor, samples: Samples, inputs: Inputs, masked: Masked
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute the loss at the masked positions.

        Returns:
            `lm_loss`, otherwise as :meth:`MaskedLMForPretraining.train_on`.
        """
        lm, inspected = predict_masked(self, corrupted_ids, inputs, masked)
        with torch.no_grad():
            stats = {
                "tokens": inputs.tokens.sum().float(),
                "predicted": masked.weights.sum(),
                "lm_correct": (lm.correct.view_as(masked.originals) * masked.weights).sum(),
                "lm_loss_sum": lm.loss.detach().clone(),
            }
        return {"lm_loss": lm.loss, **inspected}, stats


class AllTokensMLM(ElectraForPretraining):
    """`objective.kind: all_tokens_mlm`.

    The output distribution of a token is D on the input token plus 1 - D times the softmax over the vocabulary; D, the
    copy probability, is a sigmoid of one logit per token (paper, section 3.4).
    """

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Losses that the forward returns."""
        return (*generator_terms(self.objective), LossTerm("lm", 1.0, "tokens"))

    def train_on(
        self, corrupted_ids: Tensor, samples: Samples, inputs: Inputs, masked: Masked
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute the loss of all tokens, `[CLS]` and `[SEP]` included, as the discriminator's of ELECTRA.

        Returns:
            `lm_loss`; for inspection `copy_logits [rows, length]` fp32, and `lm_features` and `lm_positions` of all
            tokens, as :meth:`MaskedLMForPretraining.train_on`; and the statistics.
        """
        assert self.lm_head is not None
        assert self.copy_head is not None
        tokens, ids = inputs.tokens, inputs.ids
        hidden = self.encode(corrupted_ids, inputs.token_type_ids, inputs.position_ids, inputs.pattern)
        features, copy_logits = self.lm_head(hidden), self.copy_head(hidden).squeeze(-1).float()
        lm = masked_lm(
            features.flatten(0, 1),
            self.embeddings.tables()[0],
            self.lm_head.bias,
            ids.flatten(),
            tokens.float().flatten(),
            copy_logits.detach().flatten(),  # no samples are needed: any numbers
            self.vocab_size,
            implementation=self.objective.masked_lm,
            copy_logits=copy_logits.flatten(),
            copied=(corrupted_ids == ids).flatten(),
        )
        with torch.no_grad():
            stats = {
                "tokens": tokens.sum().float(),
                "predicted": tokens.sum().float(),
                "lm_correct": (lm.correct.view_as(ids) & tokens).sum().float(),
                "copied": ((copy_logits > 0) & tokens).sum().float(),
                "lm_loss_sum": lm.loss.detach().clone(),
            }
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        inspected = {"copy_logits": copy_logits.detach(), "lm_features": features.detach(), "lm_positions": places}
        return {"lm_loss": lm.loss, **inspected}, stats


def predict_masked(
    model: ElectraForPretraining, input_ids: Tensor, inputs: Inputs, masked: Masked
) -> tuple[MaskedLM, dict[str, Tensor]]:
    """Predict the originals at the masked positions by the discriminator's `lm_head`.

    Args:
        input_ids: what the discriminator reads, integers `[rows, length]`.
        inputs, masked: the original batch and its masked positions.

    Returns:
        Loss and per-position results, flattened to `[rows × N]`; `lm_features` and `lm_positions`.
    """
    assert model.lm_head is not None
    hidden = model.encode(input_ids, inputs.token_type_ids, inputs.position_ids, inputs.pattern)
    features = model.lm_head(at(hidden, masked.positions))
    lm = masked_lm(
        features.flatten(0, 1),
        model.embeddings.tables()[0],
        model.lm_head.bias,
        masked.originals.flatten(),
        masked.weights.flatten(),
        masked.weights.flatten(),  # no samples are needed: any numbers
        model.vocab_size,
        label_smoothing=model.objective.mlm_label_smoothing,
        implementation=model.objective.masked_lm,
    )
    return lm, {"lm_features": features.detach(), "lm_positions": masked.positions}
