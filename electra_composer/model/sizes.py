"""Sizes of the discriminator and the generator, derived from the configuration, and checks of the configured values."""

from __future__ import annotations

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model import masking
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.objective_keys import check_objective
from electra_composer.ranges import check_ranges


def generates(objective: ObjectiveConfig) -> bool:
    """Whether an objective has a generator that is a network."""
    return objective.kind != "mlm" and objective.resolved().generator in ("trained", "frozen", "two_tower")


def detects(objective: ObjectiveConfig) -> bool:
    """Whether the discriminator has one logit per token; otherwise it predicts tokens."""
    return objective.kind in ("electra", "electra_15", "electric")


def discriminator_config(model: ModelConfig, vocab_size: int) -> EncoderConfig:
    """Sizes of the discriminator: those of the YAML, feed-forward 4 × hidden."""
    return _encoder_config(
        model, vocab_size, model.hidden_size, model.num_heads, model.num_layers, model.embedding_size, "model."
    )


def generator_config(model: ModelConfig, vocab_size: int) -> EncoderConfig:
    """Sizes of the generator, derived from those of the discriminator.

    Hidden size `generator_size × hidden_size`, heads `max(1, hidden // 64)`, feed-forward 4 × hidden, layers
    `generator_layers`, by default as many as in the discriminator (google-research/electra `util/training_utils.py`).
    The width of its embeddings follows from `sharing`, see :func:`generator_embedding_size`.

    Raises:
        UserError: sizes that contradict each other.
    """
    hidden_size = round(model.generator_size * model.hidden_size)
    layers = model.num_layers if model.generator_layers is None else model.generator_layers
    prefix = "generator (model.generator_size, model.generator_layers): "
    embedding_size = generator_embedding_size(model, hidden_size)
    return _encoder_config(model, vocab_size, hidden_size, max(1, hidden_size // 64), layers, embedding_size, prefix)


def generator_embedding_size(model: ModelConfig, hidden_size: int) -> int:
    """Return the width of the generator's embeddings.

    Untied they are by default as wide as its layers, so that there is no projection: `untied_generator_embeddings` of
    google-research/electra (`run_pretraining.py` gives the generator no `embedding_size` then).

    Args:
        hidden_size: of the generator.

    Raises:
        UserError: another width than the discriminator's, whose tables it shares.
    """
    width = model.generator_embedding_size
    if model.sharing == "untied":
        return hidden_size if width is None else width
    if width not in (None, model.embedding_size):
        raise UserError(
            f"model.generator_embedding_size is {width}, but with model.sharing={model.sharing} both networks have "
            f"embeddings of one width, model.embedding_size ({model.embedding_size}); set it to null, or "
            "model.sharing=untied"
        )
    return model.embedding_size


def _encoder_config(
    model: ModelConfig,
    vocab_size: int,
    hidden_size: int,
    num_heads: int,
    num_layers: int,
    embedding_size: int,
    prefix: str,
) -> EncoderConfig:
    """Check the sizes of one encoder; `prefix` precedes their names in errors."""
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "embedding_size": embedding_size,
    }
    if hidden_size < 1:
        raise UserError(f"{prefix}hidden_size is {hidden_size}; expected at least 1")
    if hidden_size % num_heads:
        raise UserError(
            f"{prefix}hidden_size {hidden_size} is not a multiple of its {num_heads} heads; change one of them"
        )
    return EncoderConfig(
        vocab_size=vocab_size,
        intermediate_size=4 * hidden_size,
        max_positions=model.max_positions,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        initializer_range=model.initializer_range,
        layer_norm_eps=model.layer_norm_eps,
        **sizes,
    )


def check_sizes(model: ModelConfig, objective: ObjectiveConfig, max_seq_length: int) -> None:
    """Check everything about the model that needs no vocabulary.

    Raises:
        UserError: a value outside its range, or sizes that contradict each other.
    """
    check_ranges(model, "model.")
    check_ranges(objective, "objective.")
    check_objective(model, objective)
    slots = masking.num_slots(objective.mask_prob, max_seq_length, objective.mask_draw)
    if not 1 <= slots <= max_seq_length:
        raise UserError(
            f"objective.mask_prob {objective.mask_prob} masks {slots} of the {max_seq_length} tokens of a row; "
            f"expected 1 to {max_seq_length}: change objective.mask_prob"
        )
    if max_seq_length > model.max_positions:
        raise UserError(
            f"data.max_seq_length {max_seq_length} is more than model.max_positions {model.max_positions}; "
            "raise model.max_positions"
        )
    discriminator, generator = discriminator_config(model, 1), generator_config(model, 1)
    if model.tie_encoder:
        check_same_encoder(model, generator, discriminator)


def count_parameters(model: ModelConfig, vocab_size: int, objective: ObjectiveConfig | None = None) -> int:
    """Return the number of parameters of an objective's networks, tied ones once, without building them.

    The differences of `sharing: gdes` are as many as the tables that they are added to.
    """
    objective = objective or ObjectiveConfig()
    discriminator, generator = discriminator_config(model, vocab_size), generator_config(model, vocab_size)

    def embeddings(of: EncoderConfig) -> int:
        return (of.padded_vocab_size + of.max_positions + of.type_vocab_size + 2) * of.embedding_size

    parts = [encoder_parameters(discriminator), embeddings(discriminator)]
    hidden = discriminator.hidden_size
    parts.append((hidden + 1) * (hidden + 1) if detects(objective) else mlm_head_parameters(discriminator, hidden))
    if objective.kind == "all_tokens_mlm":
        parts.append(hidden + 1)
    if not generates(objective):
        return sum(parts)
    if model.sharing != "tied":
        parts.append(embeddings(generator))
    if objective.resolved().generator == "two_tower":
        return sum(parts) + two_tower_parameters(generator)
    if not model.tie_encoder:
        parts.append(encoder_parameters(generator))
    return sum(parts) + mlm_head_parameters(generator, generator.hidden_size)


def encoder_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of an `Encoder`: projection, if there is one, and layers."""
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden * (hidden + 1) + hidden * (inner + 1) + inner * (hidden + 1) + 4 * hidden
    project = 0 if config.embedding_size == hidden else hidden * (config.embedding_size + 1)
    return project + config.num_layers * layer


def mlm_head_parameters(config: EncoderConfig, width: int) -> int:
    """Return the number of parameters of a `MaskedLMHead` that reads hidden states of this width."""
    return (width + 3) * config.embedding_size + config.padded_vocab_size


def two_tower_parameters(config: EncoderConfig) -> int:
    """Return the number of parameters of a `TwoTowers` and of the MLM head that reads it, without embeddings."""
    return 2 * encoder_parameters(config) + mlm_head_parameters(config, 2 * config.hidden_size)


def check_same_encoder(model: ModelConfig, generator: EncoderConfig, discriminator: EncoderConfig) -> None:
    """Reject `model.tie_encoder` for encoders that differ in size or in their embeddings.

    Raises:
        UserError: the two encoders cannot be one.
    """
    if model.sharing != "tied":
        raise UserError(
            f"model.tie_encoder is true, but model.sharing is {model.sharing}; set model.sharing=tied, or "
            "model.tie_encoder=false"
        )
    if generator != discriminator:
        differ = [name for name, size in vars(generator).items() if size != getattr(discriminator, name)]
        raise UserError(
            f"model.tie_encoder is true, but generator and discriminator differ in {', '.join(differ)}; expected "
            f"model.generator_size=1.0, model.generator_layers=null and model.num_heads={generator.num_heads}"
        )
