"""ELECTRA (Clark et al., ICLR 2020, arXiv 2003.10555): a generator, a discriminator, replaced-token detection.

:class:`ElectraForPretraining` is section 2 of the paper: a small masked language model proposes tokens, the
discriminator says of every token whether it was replaced, both are trained jointly, and no gradient passes through the
sampling.
What is made of a discriminator afterwards is in finetuning.py. Nothing here knows of Composer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model import masking
from electra_composer.model.encoder import Embeddings, Encoder, EncoderConfig, init_weights
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.kernels.masked_lm import masked_lm


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that have a role of their own."""

    pad: int
    cls: int
    sep: int
    mask: int


def discriminator_config(model: ModelConfig, vocab_size: int) -> EncoderConfig:
    """Sizes of the discriminator: those of the YAML, feed-forward 4 × hidden."""
    return _encoder_config(model, vocab_size, model.hidden_size, model.num_heads, model.num_layers, "model.")


def generator_config(model: ModelConfig, vocab_size: int) -> EncoderConfig:
    """Sizes of the generator, derived from the discriminator's.

    Hidden size `generator_size × hidden_size`, heads `max(1, hidden // 64)`, feed-forward 4 × hidden, as many layers as
    the discriminator unless `generator_layers` says otherwise (google-research/electra `util/training_utils.py`).
    """
    hidden_size = round(model.generator_size * model.hidden_size)
    layers = model.num_layers if model.generator_layers is None else model.generator_layers
    return _encoder_config(model, vocab_size, hidden_size, max(1, hidden_size // 64), layers, "generator of model.")


def _encoder_config(
    model: ModelConfig, vocab_size: int, hidden_size: int, num_heads: int, num_layers: int, whose: str
) -> EncoderConfig:
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "embedding_size": model.embedding_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{whose}{name} is {size}; expected at least 1")
    if hidden_size % num_heads:
        raise UserError(
            f"{whose}hidden_size {hidden_size} is not a multiple of its {num_heads} heads; change one of them"
        )
    return EncoderConfig(
        vocab_size=vocab_size,
        embedding_size=model.embedding_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=4 * hidden_size,
        max_positions=model.max_positions,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        initializer_range=model.initializer_range,
        layer_norm_eps=model.layer_norm_eps,
    )


def _check_ranges(model: ModelConfig, objective: ObjectiveConfig) -> None:
    """Refuse numbers that would end in NaN, or in an error that names no key."""
    for name, value, lowest, highest in (
        ("model.dropout", model.dropout, 0.0, 1.0),
        ("model.attention_dropout", model.attention_dropout, 0.0, 1.0),
        ("objective.gen_weight", objective.gen_weight, 0.0, math.inf),
        ("objective.disc_weight", objective.disc_weight, 0.0, math.inf),
        ("objective.temperature", objective.temperature, 0.01, math.inf),
        ("objective.mlm_label_smoothing", objective.mlm_label_smoothing, 0.0, 1.0),
        ("objective.rtd_label_smoothing", objective.rtd_label_smoothing, 0.0, 1.0),
    ):
        if not lowest <= value <= highest:
            raise UserError(f"{name} is {value}; expected a number from {lowest} to {highest}")


def _check_same_encoder(model: ModelConfig, generator: EncoderConfig, discriminator: EncoderConfig) -> None:
    """Refuse to tie layers that are not alike, or whose inputs are not."""
    if not model.tie_embeddings:
        raise UserError("model.tie_encoder is true, but model.tie_embeddings is false; set both, or neither")
    if generator != discriminator:
        differ = [name for name, size in vars(generator).items() if size != getattr(discriminator, name)]
        raise UserError(
            f"model.tie_encoder is true, but generator and discriminator differ in {', '.join(differ)}; expected "
            f"model.generator_size=1.0, model.generator_layers=null and model.num_heads={generator.num_heads}"
        )


class MaskedLMHead(nn.Module):
    """Dense to embedding size, GELU, LayerNorm; then the token embeddings are the output weights."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.vocab_size = config.vocab_size
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.padded_vocab_size))

    def features(self, hidden: Tensor) -> Tensor:
        """`[rows, N, hidden_size]` → `[rows, N, embedding_size]`: what meets the vocabulary (in training: kernels/)."""
        return self.norm(F.gelu(self.dense(hidden)))

    def logits(self, features: Tensor, word_embeddings: Tensor) -> Tensor:
        """`features [rows, N, embedding_size]`, `word_embeddings [padded_vocab_size, embedding_size]` → logits
        `[rows, N, vocab_size]`, all of them at once: to look at, not to train with."""
        return F.linear(features, word_embeddings[: self.vocab_size], self.bias[: self.vocab_size])

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """`hidden [rows, N, hidden_size]` → `logits` of its `features`."""
        return self.logits(self.features(hidden), word_embeddings)


class ReplacedTokenHead(nn.Module):
    """Dense, GELU, one logit per token."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[rows, length, hidden_size]` → logits `[rows, length]`; positive means replaced."""
        return self.out(F.gelu(self.dense(hidden))).squeeze(-1)


class ElectraForPretraining(nn.Module):
    """Generator and discriminator with the joint objective.

    Args:
        model: sizes.
        objective: masking, sampling and loss.
        vocab_size: entries of the tokenizer's vocabulary.
        special_ids: of the tokenizer.
        max_seq_length: tokens in a row.

    Raises:
        UserError: sizes that do not fit each other.
    """

    def __init__(
        self,
        model: ModelConfig,
        objective: ObjectiveConfig,
        vocab_size: int,
        special_ids: SpecialIds,
        max_seq_length: int,
    ):
        super().__init__()
        _check_ranges(model, objective)
        self.objective = objective
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.attention_path = "sdpa"  # of kernels/attention.py; chosen for the device before training (devices.py)
        self.slots = masking.num_slots(objective.mask_prob, max_seq_length)
        if not 1 <= self.slots <= max_seq_length:
            raise UserError(
                f"objective.mask_prob {objective.mask_prob} masks {self.slots} of the {max_seq_length} tokens of a "
                "row; expected at least one and no more than there are"
            )
        if max_seq_length > model.max_positions:
            raise UserError(
                f"data.max_seq_length {max_seq_length} is more than model.max_positions {model.max_positions}; "
                "raise the latter"
            )
        discriminator = discriminator_config(model, vocab_size)
        generator = generator_config(model, vocab_size)
        self.embeddings = Embeddings(discriminator)
        # Tied, there is one table of each kind and one LayerNorm, and nothing to keep in step (paper, section 3.2;
        # google-research/electra ties the LayerNorm too).
        self.generator_embeddings = None if model.tie_embeddings else Embeddings(generator)
        if model.tie_encoder:
            _check_same_encoder(model, generator, discriminator)
        self.generator = None if model.tie_encoder else Encoder(generator)
        self.discriminator = Encoder(discriminator)
        self.mlm_head = MaskedLMHead(generator)
        self.rtd_head = ReplacedTokenHead(discriminator)
        init_weights(self, model.initializer_range)
        self._zero_padding_rows()

    def _zero_padding_rows(self) -> None:
        with torch.no_grad():
            for embeddings in (self.embeddings, self.generator_embeddings):
                if embeddings is not None:
                    embeddings.word.weight[self.vocab_size :] = 0.0

    @property
    def embeddings_of_generator(self) -> Embeddings:
        """The generator's embeddings, also the weights of its output layer: the discriminator's own when tied."""
        return self.embeddings if self.generator_embeddings is None else self.generator_embeddings

    @property
    def encoder_of_generator(self) -> Encoder:
        """The generator's layers: the discriminator's own when they are tied too."""
        return self.discriminator if self.generator is None else self.generator

    def candidates(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """True where a token may be masked, `[rows, length]`: never `[CLS]`, `[SEP]`, a literal `[MASK]` or padding."""
        special = self.special_ids
        return masking.maskable(input_ids, sequence_ids, (special.cls, special.sep, special.mask))

    def mask_counts(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """How many tokens of each row will be masked, integers `[rows]`: known before the draw."""
        candidates = self.candidates(input_ids, sequence_ids)
        return masking.mask_counts(candidates, sequence_ids, self.objective.mask_prob, self.slots)

    def draw_noise(self, input_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The uniform numbers of one forward, fp32 `[rows, noise_width]`."""
        rows, length = input_ids.shape
        width = masking.noise_width(length, self.slots)
        return torch.rand(rows, width, device=input_ids.device, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Mask, generate, sample, discriminate; once, on the device.

        Args:
            input_ids, token_type_ids, position_ids, sequence_ids: integers `[rows, length]`; the batch of shards.py.
            noise: uniform numbers of `draw_noise`, for a forward that can be repeated; sampling is by inverse CDF then.
                Without it they come from torch's default generator.

        Returns:
            `mlm_loss`, `rtd_loss`: fp32 sums, over masked tokens and over non-padding tokens, to be divided by the
            whole batch's counts; `rtd_logits [rows, length]` fp32, `replaced [rows, length]` booleans;
            `stats`: sums for the metrics, without gradient, fp32 scalars (see `_statistics`);
            and, for inspection, `mlm_features` (see `mlm_logits`), `masked_positions`, `masked_weights`,
            `sampled_ids`, `corrupted_ids`.
        """
        objective, slots = self.objective, self.slots
        gumbel = noise is None and objective.sampling == "gumbel"
        if noise is None:
            noise = self.draw_noise(input_ids)
        position_noise, replace_noise, random_noise, sample_noise = masking.split_noise(noise, slots)

        # Masking: fixed number of slots, dynamic, anew each time.
        candidates = self.candidates(input_ids, sequence_ids)
        counts = masking.mask_counts(candidates, sequence_ids, objective.mask_prob, slots)
        positions, weights = masking.choose_positions(candidates, counts, slots, position_noise)
        originals = input_ids.gather(1, positions)
        masked_tokens = masking.mask_tokens(
            originals,
            weights,
            objective.mask_style,
            self.special_ids.mask,
            self.vocab_size,
            replace_noise,
            random_noise,
        )
        masked_ids = input_ids.scatter(1, positions, masked_tokens)

        # Generator: only the gathered masked positions meet the vocabulary, and no more of them at a time than are used
        # up at once for loss, sample and gradient. The sample has no gradient.
        pattern = pattern_of(sequence_ids, self.attention_path)
        embeddings = self.embeddings_of_generator
        hidden = self.encoder_of_generator(embeddings(masked_ids, token_type_ids, position_ids), pattern)
        gathered = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        mlm_features = self.mlm_head.features(gathered)
        mlm = masked_lm(
            mlm_features.flatten(0, 1),
            embeddings.word.weight,
            self.mlm_head.bias,
            originals.flatten(),
            weights.flatten(),
            sample_noise.flatten(),
            self.vocab_size,
            temperature=objective.temperature,
            disallow_correct=objective.disallow_correct,
            label_smoothing=objective.mlm_label_smoothing,
            gumbel=gumbel,
            implementation=objective.masked_lm,
        )

        # All masked positions get their sample, those that had kept their token too.
        sampled = torch.where(weights > 0, mlm.sampled.view_as(originals), originals)
        corrupted_ids = input_ids.scatter(1, positions, sampled)
        replaced = masking.replaced_labels(corrupted_ids, input_ids, sequence_ids)

        # Discriminator: every non-padding token, [CLS] and [SEP] included (paper, section 2).
        hidden = self.discriminator(self.embeddings(corrupted_ids, token_type_ids, position_ids), pattern)
        rtd_logits = self.rtd_head(hidden).float()
        tokens = sequence_ids > 0
        smoothing = objective.rtd_label_smoothing
        targets = replaced.float() * (1.0 - smoothing) + 0.5 * smoothing
        rtd_losses = F.binary_cross_entropy_with_logits(rtd_logits, targets, reduction="none")
        rtd_loss = (rtd_losses * tokens).sum()

        outputs = {
            "mlm_loss": mlm.loss,
            "rtd_loss": rtd_loss,
            "rtd_logits": rtd_logits.detach(),
            "replaced": replaced,
            "mlm_features": mlm_features.detach(),
            "masked_positions": positions,
            "masked_weights": weights,
            "sampled_ids": sampled,
            "corrupted_ids": corrupted_ids,
        }
        outputs["stats"] = self._statistics(outputs, originals, mlm.correct.view_as(originals), tokens)
        return outputs

    @torch.no_grad()
    def mlm_logits(self, mlm_features: Tensor) -> Tensor:
        """The generator's logits at the masked positions, which the forward itself never holds.

        `mlm_features [rows, N, embedding_size]` of a forward's output, and the weights as they are now → fp32
        `[rows, N, vocab_size]`.
        """
        return self.mlm_head.logits(mlm_features, self.embeddings_of_generator.word.weight).float()

    @staticmethod
    @torch.no_grad()
    def _statistics(
        outputs: dict[str, Tensor], originals: Tensor, mlm_correct: Tensor, tokens: Tensor
    ) -> dict[str, Tensor]:
        """Sums from which every training metric follows; they add up over microbatches and processes."""
        weights, replaced = outputs["masked_weights"], outputs["replaced"]
        predicted = (outputs["rtd_logits"] > 0) & tokens
        return {
            "masked": weights.sum(),
            "mlm_correct": (mlm_correct * weights).sum(),
            "sampled_correct": ((outputs["sampled_ids"] == originals) * weights).sum(),
            "tokens": tokens.sum().float(),
            "replaced": replaced.sum().float(),
            "true_positive": (predicted & replaced).sum().float(),
            "false_positive": (predicted & ~replaced).sum().float(),
            "false_negative": (~predicted & replaced).sum().float(),
            "true_negative": (~predicted & ~replaced & tokens).sum().float(),
            "mlm_loss_sum": outputs["mlm_loss"].detach(),
            "rtd_loss_sum": outputs["rtd_loss"].detach(),
        }
