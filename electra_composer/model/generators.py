"""Generators: what fills the masked positions (`objective.generator`).

* `trained`, `frozen`: a masked language model (paper, section 2).
* `uniform`: every token of the vocabulary alike (`uniform_generator` of google-research/electra).
* `unigram`: by the frequencies of the tokens in the shards.
* `two_tower`: a model that reads a token's context from both sides (`two_tower_generator`, two_towers.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_composer.config import ObjectiveConfig
from electra_composer.model.kernels.attention import AttentionPattern
from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm
from electra_composer.model.losses import LossTerm
from electra_composer.model.masker import Masked
from electra_composer.model.networks import ElectraNetworks, at

SMALLEST = 1e-20
"""Lower limit of probabilities whose logarithm is taken: a token that a generator never samples is surely original."""


class Inputs(NamedTuple):
    """A batch: ids, types, positions and examples, integers `[rows, length]`, and which tokens attend to each other."""

    ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    sequence_ids: Tensor
    pattern: AttentionPattern
    tokens: Tensor
    """False for padding, booleans `[rows, length]`; a field, since torch.compile knows no properties of tuples."""


class Draw(NamedTuple):
    """Random numbers for samples."""

    noise: Tensor
    """Uniform numbers for the inverse CDF, fp32 `[rows, N]`."""
    gumbel: bool
    """Sample a network's output by Gumbel noise from torch's default generator instead."""


class Samples(NamedTuple):
    """Output of a generator."""

    ids: Tensor
    """x̂ at the masked positions, integers `[rows, N]`, the original in unused slots."""
    outputs: dict[str, Any]
    """For the output of the forward: the loss, and tensors for inspection."""
    stats: dict[str, Tensor]
    """Sums for the metrics; see losses.py."""
    log_q: Tensor | None = None
    """log q(x_t | context) of the tokens of x^corrupt, fp32 `[rows, length]`, without gradient, where `q` gives a
    probability to every token of the text; see :mod:`electra_composer.model.electric`."""


class FixedDistribution(nn.Module):
    """A generator that ignores the context.

    Args:
        vocab_size: entries of the tokenizer's vocabulary.
        objective: `temperature` and `disallow_correct`.

    Attributes:
        probabilities: of the tokens, fp32 `[vocab_size]`, part of the state; uniform until :meth:`set_counts`.
    """

    probabilities: Tensor

    def __init__(self, vocab_size: int, objective: ObjectiveConfig):
        super().__init__()
        self.objective = objective
        self.register_buffer("probabilities", torch.full((vocab_size,), 1.0 / vocab_size))

    def set_counts(self, counts: Tensor) -> None:
        """Make the probabilities proportional to counts, numbers `[vocab_size]`."""
        weights = counts.double() ** (1.0 / self.objective.temperature)
        self.probabilities.copy_(weights / weights.sum())

    def sample(self, originals: Tensor, noise: Tensor) -> Tensor:
        """Sample by the inverse CDF.

        Args:
            originals: ids `[rows, N]`, never returned with `disallow_correct`.
            noise: uniform in [0, 1), fp32 `[rows, N]`.

        Returns:
            Ids `[rows, N]`.
        """
        last = self.probabilities.shape[0] - 1
        ends = self.probabilities.double().cumsum(0)  # of each token's part of [0, total)
        total = ends[-1]
        if not self.objective.disallow_correct:
            return torch.searchsorted(ends, noise.double() * total, right=True).clamp(max=last)
        own = self.probabilities[originals].double()  # leave out the original's part
        drawn = noise.double() * (total - own)
        drawn = torch.where(drawn >= ends[originals] - own, drawn + own, drawn)
        return torch.searchsorted(ends, drawn, right=True).clamp(max=last)

    def forward(self, inputs: Inputs, masked: Masked, draw: Draw) -> Samples:
        """Fill the masked positions of a batch."""
        sampled = fill(masked, self.sample(masked.originals, draw.noise))
        corrupted = inputs.ids.scatter(1, masked.positions, sampled)
        log_q = self.probabilities.clamp(min=SMALLEST).log()[corrupted]
        return Samples(sampled, {}, sampled_stats(sampled, masked), log_q)


def fill(masked: Masked, drawn: Tensor) -> Tensor:
    """Return the drawn ids `[rows, N]` in slots in use, the original in others, and one sample for each position.

    A position that was drawn more than once has that of its first slot; google-research/electra takes the mean of the
    ids of several.
    """
    sampled = torch.where(masked.weights > 0, drawn, masked.originals)
    return sampled if masked.first is None else sampled.gather(1, masked.first)


@torch.no_grad()
def sampled_stats(sampled: Tensor, masked: Masked) -> dict[str, Tensor]:
    """Return `masked` and `sampled_correct`."""
    return {"masked": masked.weights.sum(), "sampled_correct": ((sampled == masked.originals) * masked.weights).sum()}


def generator_terms(objective: ObjectiveConfig) -> tuple[LossTerm, ...]:
    """Losses of a generator; that of a frozen one is computed for the metrics alone."""
    if objective.generator in ("uniform", "unigram"):
        return ()
    if objective.generator == "two_tower":
        return (LossTerm("cloze", objective.gen_weight, "candidates"),)
    return (LossTerm("mlm", 0.0 if objective.generator == "frozen" else objective.gen_weight, "masked"),)


def masked_lm_samples(
    networks: ElectraNetworks, objective: ObjectiveConfig, inputs: Inputs, masked: Masked, draw: Draw
) -> Samples:
    """L_MLM = Σ -log p_G(x_i | x^masked) over i in m, and samples x̂_i ~ p_G(x_i | x^masked), without gradient.

    p_G is the softmax over the vocabulary of e(x)ᵀ h_G (paper, section 2). Loss and samples are one operation because
    the logits `[rows × N, vocab_size]` are never stored (kernels/masked_lm.py). Every masked position is sampled,
    including those that kept their token in x^masked.

    Args:
        networks: the generator's and, where they are shared, the discriminator's.
        objective: `temperature`, `disallow_correct`, `mlm_label_smoothing`, `masked_lm`.
        inputs: the batch.
        masked: output of :meth:`Masker.mask`.
        draw: random numbers.

    Returns:
        Samples with `mlm_loss` and, for inspection, `mlm_features` (see :meth:`ElectraNetworks.mlm_logits`).
    """
    assert networks.mlm_head is not None
    with torch.set_grad_enabled(torch.is_grad_enabled() and objective.generator != "frozen"):
        features = networks.generate(
            masked.input_ids, masked.positions, inputs.token_type_ids, inputs.position_ids, inputs.pattern
        )
        mlm = predict_tokens(
            features,
            networks.embeddings_of_generator.word.weight,
            networks.mlm_head.bias,
            masked.originals,
            masked.weights,
            draw,
            networks.vocab_size,
            objective,
        )
    sampled = fill(masked, mlm.sampled.view_as(masked.originals))
    stats = {**sampled_stats(sampled, masked), **mlm_stats(mlm, masked)}
    return Samples(sampled, {"mlm_loss": mlm.loss, "mlm_features": features.detach()}, stats)


def predict_tokens(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    draw: Draw,
    vocab_size: int,
    objective: ObjectiveConfig,
) -> MaskedLM:
    """Call :func:`masked_lm` on features `[rows, N, embedding_size]` with the settings of the objective.

    Returns:
        Per-position results are flattened, `[rows × N]`.
    """
    return masked_lm(
        features.flatten(0, 1),
        weight,
        bias,
        targets.flatten(),
        weights.flatten(),
        draw.noise.flatten(),
        vocab_size,
        temperature=objective.temperature,
        disallow_correct=objective.disallow_correct,
        label_smoothing=objective.mlm_label_smoothing,
        gumbel=draw.gumbel,
        implementation=objective.masked_lm,
    )


@torch.no_grad()
def mlm_stats(mlm: MaskedLM, masked: Masked) -> dict[str, Tensor]:
    """Return `mlm_correct` and `mlm_loss_sum`."""
    # Cloned: an output that shares memory with another keeps a compiled graph out of autograd's cache.
    correct = mlm.correct.view_as(masked.originals) * masked.weights
    return {"mlm_correct": correct.sum(), "mlm_loss_sum": mlm.loss.detach().clone()}


def cloze_samples(
    networks: ElectraNetworks,
    objective: ObjectiveConfig,
    inputs: Inputs,
    masked: Masked,
    candidates: Tensor,
    draw: Draw,
    attention: tuple[str, int | None],
) -> Samples:
    """Sample from two towers, which are trained on all tokens that may be masked (google-research/electra).

    Args:
        networks: with `towers`.
        objective, inputs, masked, draw: as for :func:`masked_lm_samples`; the towers read the batch unmasked.
        candidates: tokens that may be masked, booleans `[rows, length]`.
        attention: `attention_path` and `most_examples`.
    """
    assert networks.towers is not None
    assert networks.mlm_head is not None
    embeddings, ids = networks.embeddings_of_generator, inputs.ids
    hidden = networks.towers(
        embeddings, ids, inputs.token_type_ids, inputs.position_ids, inputs.sequence_ids, *attention
    )
    features, weight, bias = networks.mlm_head(hidden), embeddings.word.weight, networks.mlm_head.bias
    # Slots of one position write one number: which of several is kept would not be determined on a GPU.
    of_slots = draw.noise if masked.first is None else draw.noise.gather(1, masked.first)
    noise = torch.zeros_like(ids, dtype=of_slots.dtype).scatter(1, masked.positions, of_slots)
    everywhere = Draw(noise, draw.gumbel)
    cloze = predict_tokens(features, weight, bias, ids, candidates.float(), everywhere, networks.vocab_size, objective)
    sampled = fill(masked, cloze.sampled.view_as(ids).gather(1, masked.positions))
    with torch.no_grad():
        # Samples and originals have one normalisation: log q of a sample differs from that of the original as logits.
        of_samples = _logits(features, weight, bias, masked.positions, sampled)
        of_originals = _logits(features, weight, bias, masked.positions, masked.originals)
        log_q = -cloze.token_losses.view_as(ids)
        at_masked = log_q.gather(1, masked.positions) + of_samples - of_originals
        log_q = log_q.scatter(1, masked.positions, at_masked).clamp(min=math.log(SMALLEST))
        stats = {
            **sampled_stats(sampled, masked),
            "candidates": candidates.sum().float(),
            "cloze_correct": (cloze.correct.view_as(ids) & candidates).sum().float(),
            "cloze_loss_sum": cloze.loss.detach().clone(),
        }
    return Samples(sampled, {"cloze_loss": cloze.loss}, stats, log_q)


def _logits(features: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Compute the logits of one token for each position, fp32 `[rows, N]`."""
    return (at(features, positions).float() * weight[ids].float()).sum(-1) + bias[ids].float()
