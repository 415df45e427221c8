"""ELECTRA pretraining model (Clark et al., ICLR 2020, arXiv 2003.10555): replaced-token detection.

:class:`ElectraForPretraining` implements section 2 of the paper: a generator trained by masked language modelling fills
masked positions with samples, and a discriminator predicts for every token whether it was replaced. Both are trained
jointly; no gradient passes through the sampling. The code does not depend on Composer. Other generators are in
generators.py, the paper's other objectives in objectives.py, and finetuning models in finetuning.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.model import masking
from electra_composer.model.generators import (
    Draw,
    FixedDistribution,
    Inputs,
    Samples,
    cloze_samples,
    generator_terms,
    masked_lm_samples,
)
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.losses import OF_TERM, LossTerm, Over, in_order
from electra_composer.model.masker import Masked, Masker, SpecialIds
from electra_composer.model.networks import ElectraNetworks
from electra_composer.model.sizes import check_sizes


class ElectraForPretraining(ElectraNetworks):
    """Networks with their joint objective; this class implements `objective.kind: electra` and `electra_15`.

    Args:
        model: sizes.
        objective: masking, sampling and loss.
        vocab_size: entries of the tokenizer's vocabulary.
        special_ids: of the tokenizer.
        max_seq_length: tokens per row.

    Raises:
        UserError: a value out of range, or sizes or keys that contradict each other.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        vocab_size: int,
        special_ids: SpecialIds,
        max_seq_length: int,
    ):
        objective = objective.resolved()
        check_sizes(model, objective, max_seq_length)
        super().__init__(model, vocab_size, objective)
        self.objective = objective
        self.special_ids = special_ids
        self.masker = Masker(objective, special_ids, vocab_size, max_seq_length)
        self.attention_path = "sdpa"  # see kernels/attention.py; set for the device before training
        self.slots = self.masker.slots
        has_network = objective.kind == "mlm" or objective.generator not in ("uniform", "unigram")
        self.distribution = None if has_network else FixedDistribution(vocab_size, objective)
        if objective.generator == "frozen":
            for module in self.modules_of_generator:
                module.requires_grad_(False).eval()

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Losses that the forward returns: λ of the paper is the weight of the discriminator's."""
        over: Over = "masked" if self.objective.kind == "electra_15" else "tokens"
        return (*generator_terms(self.objective), LossTerm("rtd", self.objective.disc_weight, over))

    @property
    def stats(self) -> tuple[str, ...]:
        """Names of the sums in `stats` of the forward, in the order of :data:`STATS`."""
        names = {"masked", "tokens", *(name for term in self.terms for name in OF_TERM[term.name])}
        if self.objective.kind != "mlm":
            names.add("sampled_correct")
        return in_order(names | ({"copied"} if self.copy_head is not None else set()))

    def counts(self, input_ids: Tensor, sequence_ids: Tensor) -> dict[str, Tensor]:
        """Count what the means of :attr:`terms` are over; see :meth:`Masker.counts`.

        Returns:
            `masked`, `tokens`, `candidates`: integers `[rows]`.
        """
        return {
            "masked": self.masker.counts(input_ids, sequence_ids),
            "tokens": (sequence_ids > 0).sum(1),
            "candidates": self.masker.candidates(input_ids, sequence_ids).sum(1),
        }

    def mask_counts(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """Number of slots that will be used in each row, integers `[rows]`; see :meth:`Masker.counts`."""
        return self.masker.counts(input_ids, sequence_ids)

    def draw_noise(self, input_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the uniform numbers of one forward, fp32 `[rows, noise_width]`."""
        width = masking.noise_width(input_ids.shape[1], self.slots)
        return torch.rand(len(input_ids), width, device=input_ids.device, generator=generator)

    def train(self, mode: bool = True) -> ElectraForPretraining:
        """Set the training mode; a frozen generator has no dropout."""
        super().train(mode)
        if self.objective.generator == "frozen":
            for module in self.modules_of_generator:
                module.eval()
        return self

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
            For each of :attr:`terms` its sum, to be divided by the count of the complete batch, fp32 scalars, such as
            `mlm_loss` and `rtd_loss`; `stats`: sums for the metrics, fp32 scalars without gradient (see losses.py);
            and for inspection `masked_positions`, `masked_weights`, `sampled_ids`, `corrupted_ids`, and what the
            generator and :meth:`train_on` add.
        """
        gumbel = noise is None and self.objective.sampling == "gumbel"
        if noise is None:
            noise = self.draw_noise(input_ids)
        *mask_noise, sample_noise = masking.split_noise(noise, self.slots)
        attention = (self.attention_path, most_examples)
        pattern = pattern_of(sequence_ids, *attention)
        inputs = Inputs(input_ids, token_type_ids, position_ids, sequence_ids, pattern, sequence_ids > 0)

        masked = self.masker.mask(input_ids, sequence_ids, mask_counts, *mask_noise)
        samples = self.generate_samples(inputs, masked, Draw(sample_noise, gumbel), attention)
        corrupted_ids = input_ids.scatter(1, masked.positions, samples.ids)
        outputs, stats = self.train_on(corrupted_ids, samples, inputs, masked)
        return {
            **samples.outputs,
            **outputs,
            "masked_positions": masked.positions,
            "masked_weights": masked.weights,
            "sampled_ids": samples.ids,
            "corrupted_ids": corrupted_ids,
            "stats": {**samples.stats, **stats},
        }

    def generate_samples(
        self, inputs: Inputs, masked: Masked, draw: Draw, attention: tuple[str, int | None]
    ) -> Samples:
        """Fill the masked positions by the generator; see generators.py for each of them."""
        if self.distribution is not None:
            return self.distribution(inputs, masked, draw)
        if self.towers is None:
            return masked_lm_samples(self, self.objective, inputs, masked, draw)
        may_mask = self.masker.candidates(inputs.ids, inputs.sequence_ids)
        return cloze_samples(self, self.objective, inputs, masked, may_mask, draw, attention)

    def train_on(
        self, corrupted_ids: Tensor, samples: Samples, inputs: Inputs, masked: Masked
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Compute the discriminator's loss.

        With `kind: electra_15` it is that of the masked positions alone, which separates the gain of learning from all
        tokens from that of detection (paper, section 3.4).

        Args:
            corrupted_ids: x^corrupt, integers `[rows, length]`.
            samples, inputs, masked: the generator's, the original batch, the masked positions.

        Returns:
            `rtd_loss`; `rtd_logits [rows, length]` fp32; `replaced`, `judged [rows, length]` booleans: labels, and the
            tokens that the loss is of; and the statistics.
        """
        replaced = masking.replaced_labels(corrupted_ids, inputs.ids, inputs.sequence_ids)
        logits = self.discriminate(corrupted_ids, inputs.token_type_ids, inputs.position_ids, inputs.pattern)
        judged, of_loss = inputs.tokens, (logits, replaced, inputs.tokens)
        if self.objective.kind == "electra_15":
            places, used = masked.positions, masked.weights > 0
            of_loss = (logits.gather(1, places), replaced.gather(1, places), used)
            judged = masked.places()
        loss = rtd_loss(*of_loss, self.objective)
        outputs = {"rtd_loss": loss, "rtd_logits": logits.detach(), "replaced": replaced, "judged": judged}
        return outputs, {"tokens": inputs.tokens.sum().float(), **rtd_stats(*of_loss, loss)}


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
def rtd_stats(logits: Tensor, replaced: Tensor, tokens: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Compute the sums from which the discriminator's metrics follow; they add up over microbatches and ranks.

    Args:
        logits, replaced, tokens: as for :func:`rtd_loss`.
        loss: its sum.

    Returns:
        fp32 scalars.
    """
    replaced = replaced & tokens
    predicted = (logits > 0) & tokens
    counted = torch.stack([tokens, replaced, predicted, predicted & replaced]).flatten(1).sum(1).float()
    num_tokens, num_replaced, num_predicted, true_positive = counted.unbind()
    false_negative = num_replaced - true_positive
    return {
        "replaced": num_replaced.clone(),
        "true_positive": true_positive.clone(),
        "false_positive": num_predicted - true_positive,
        "false_negative": false_negative,
        "true_negative": num_tokens - num_predicted - false_negative,
        # Cloned: an output that shares memory with another keeps a compiled graph out of autograd's cache.
        "rtd_loss_sum": loss.detach().clone(),
    }
