"""ELECTRA pretraining model (Clark et al., ICLR 2020, arXiv 2003.10555): replaced-token detection.

:class:`ElectraForPretraining` implements section 2 of the paper: a generator trained by masked language modelling fills
masked positions with samples, and a discriminator predicts for every token whether it was replaced. Both are trained
jointly; no gradient passes through the sampling. The code does not depend on Composer. Finetuning models are in
finetuning.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.model import masking
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm
from electra_composer.model.masker import Masked, Masker, SpecialIds
from electra_composer.model.networks import ElectraNetworks
from electra_composer.model.sizes import check_sizes


class ElectraForPretraining(ElectraNetworks):
    """Generator and discriminator with their joint objective.

    Args:
        model: sizes.
        objective: masking, sampling and loss.
        vocab_size: entries of the tokenizer's vocabulary.
        special_ids: of the tokenizer.
        max_seq_length: tokens per row.

    Raises:
        UserError: a value out of range, or sizes that contradict each other.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        vocab_size: int,
        special_ids: SpecialIds,
        max_seq_length: int,
    ):
        check_sizes(model, objective, max_seq_length)
        super().__init__(model, vocab_size)
        self.objective = objective
        self.special_ids = special_ids
        self.masker = Masker(objective, special_ids, vocab_size, max_seq_length)
        self.attention_path = "sdpa"  # see kernels/attention.py; set for the device before training
        self.slots = self.masker.slots

    def mask_counts(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """Number of slots that will be used in each row, integers `[rows]`; see :meth:`Masker.counts`."""
        return self.masker.counts(input_ids, sequence_ids)

    def draw_noise(self, input_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the uniform numbers of one forward, fp32 `[rows, noise_width]`."""
        width = masking.noise_width(input_ids.shape[1], self.slots)
        return torch.rand(len(input_ids), width, device=input_ids.device, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        noise: Tensor | None = None,
        most_examples: int | None = None,
        mask_counts: Tensor | None = None,
    ) -> dict[str, Any]:
        """Mask, generate, sample, discriminate.

        Args:
            input_ids, token_type_ids, position_ids, sequence_ids: integers `[rows, length]`, as batched by shards.py.
            noise: uniform numbers from :meth:`draw_noise`, for a reproducible forward; samples then come from the
                inverse CDF. By default they are drawn from torch's default generator.
            most_examples: bound of the examples in the batch, for the attention path `varlen`.
            mask_counts: output of :meth:`mask_counts` for these rows, for `mask_draw: bernoulli`. By default the noise
                decides for each token whether it is masked.

        Returns:
            `mlm_loss`, `rtd_loss`: fp32 sums over masked and over non-padding tokens, to be divided by the counts of
            the complete batch; `rtd_logits [rows, length]` fp32, `replaced [rows, length]` booleans; `stats`: sums for
            the metrics, fp32 scalars without gradient (see :func:`statistics`); and for inspection `mlm_features` (see
            :meth:`mlm_logits`), `masked_positions`, `masked_weights`, `sampled_ids`, `corrupted_ids`.
        """
        gumbel = noise is None and self.objective.sampling == "gumbel"
        if noise is None:
            noise = self.draw_noise(input_ids)
        *mask_noise, sample_noise = masking.split_noise(noise, self.slots)
        pattern = pattern_of(sequence_ids, self.attention_path, most_examples)
        tokens = sequence_ids > 0

        masked = self.masker.mask(input_ids, sequence_ids, mask_counts, *mask_noise)
        mlm_features = self.generate(masked.input_ids, masked.positions, token_type_ids, position_ids, pattern)
        mlm, sampled_ids = self.sample(mlm_features, masked, sample_noise, gumbel)
        corrupted_ids = input_ids.scatter(1, masked.positions, sampled_ids)
        replaced = masking.replaced_labels(corrupted_ids, input_ids, sequence_ids)
        rtd_logits = self.discriminate(corrupted_ids, token_type_ids, position_ids, pattern)

        outputs: dict[str, Any] = {
            "mlm_loss": mlm.loss,
            "rtd_loss": rtd_loss(rtd_logits, replaced, tokens, self.objective),
            "rtd_logits": rtd_logits.detach(),
            "replaced": replaced,
            "mlm_features": mlm_features.detach(),
            "masked_positions": masked.positions,
            "masked_weights": masked.weights,
            "sampled_ids": sampled_ids,
            "corrupted_ids": corrupted_ids,
        }
        outputs["stats"] = statistics(outputs, masked.originals, mlm.correct.view_as(sampled_ids), tokens)
        return outputs

    def sample(self, mlm_features: Tensor, masked: Masked, noise: Tensor, gumbel: bool) -> tuple[MaskedLM, Tensor]:
        """L_MLM = Σ -log p_G(x_i | x^masked) over i in m, and samples x̂_i ~ p_G(x_i | x^masked), without gradient.

        p_G is the softmax over the vocabulary of e(x)ᵀ h_G (paper, section 2). The two are one operation because the
        logits `[rows × N, vocab_size]` are never stored (kernels/masked_lm.py).

        Args:
            mlm_features: output of :meth:`generate`, `[rows, N, embedding_size]`.
            masked: output of :meth:`Masker.mask`.
            noise: uniform numbers for the inverse CDF, fp32 `[rows, N]`; unused with `gumbel`.
            gumbel: sample by Gumbel noise from torch's default generator.

        Returns:
            Loss and per-position results, flattened to `[rows × N]`; sampled ids `[rows, N]`. Every masked position is
            sampled, including those that kept their token in x^masked. Unused slots keep the original. A position that
            was drawn more than once has one sample; google-research/electra takes the mean of the ids of several.
        """
        objective = self.objective
        mlm = masked_lm(
            mlm_features.flatten(0, 1),
            self.embeddings_of_generator.word.weight,
            self.mlm_head.bias,
            masked.originals.flatten(),
            masked.weights.flatten(),
            noise.flatten(),
            self.vocab_size,
            temperature=objective.temperature,
            disallow_correct=objective.disallow_correct,
            label_smoothing=objective.mlm_label_smoothing,
            gumbel=gumbel,
            implementation=objective.masked_lm,
        )
        sampled = torch.where(masked.weights > 0, mlm.sampled.view_as(masked.originals), masked.originals)
        return mlm, sampled if masked.first is None else sampled.gather(1, masked.first)


def rtd_loss(logits: Tensor, replaced: Tensor, tokens: Tensor, objective: ObjectiveConfig) -> Tensor:
    """L_Disc (paper, section 2): binary cross entropy summed over all tokens, `[CLS]` and `[SEP]` included.

    Args:
        logits: output of :meth:`ElectraForPretraining.discriminate`, fp32 `[rows, length]`.
        replaced: labels, booleans `[rows, length]`.
        tokens: False for padding, booleans `[rows, length]`.
        objective: `rtd_label_smoothing`, `s`, and its style. `one_sided`: the target of original tokens is `s`, that of
            replaced ones 1 (`disc_smooth_label` of richarddwang/electra_pytorch); `symmetric`: `s / 2` and `1 - s / 2`.

    Returns:
        fp32 scalar.
    """
    smoothing = objective.rtd_label_smoothing
    if objective.rtd_label_smoothing_style == "one_sided":
        targets = replaced.float().clamp(min=smoothing)
    else:
        targets = replaced.float() * (1.0 - smoothing) + 0.5 * smoothing
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * tokens).sum()


@torch.no_grad()
def statistics(outputs: dict[str, Tensor], originals: Tensor, mlm_correct: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Compute the sums from which every training metric follows; they add up over microbatches and ranks.

    Args:
        outputs: of the forward.
        originals: ids at the masked positions, integers `[rows, N]`.
        mlm_correct: whether no token is more likely than the original, booleans `[rows, N]`.
        tokens: False for padding, booleans `[rows, length]`.

    Returns:
        fp32 scalars.
    """
    weights, replaced = outputs["masked_weights"], outputs["replaced"]
    predicted = (outputs["rtd_logits"] > 0) & tokens
    counted = torch.stack([tokens, replaced, predicted, predicted & replaced]).flatten(1).sum(1).float()
    num_tokens, num_replaced, num_predicted, true_positive = counted.unbind()
    false_negative = num_replaced - true_positive
    return {
        "masked": weights.sum(),
        "mlm_correct": (mlm_correct * weights).sum(),
        "sampled_correct": ((outputs["sampled_ids"] == originals) * weights).sum(),
        "tokens": num_tokens.clone(),
        "replaced": num_replaced.clone(),
        "true_positive": true_positive.clone(),
        "false_positive": num_predicted - true_positive,
        "false_negative": false_negative,
        "true_negative": num_tokens - num_predicted - false_negative,
        # Cloned: an output that shares memory with another keeps a compiled graph out of autograd's cache.
        "mlm_loss_sum": outputs["mlm_loss"].detach().clone(),
        "rtd_loss_sum": outputs["rtd_loss"].detach().clone(),
    }
