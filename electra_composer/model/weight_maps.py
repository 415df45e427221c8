"""Convert state dicts to and from transformers' ELECTRA modules. Missing weights are errors.

transformers has separate matrices for queries, keys and values, ours are one; our vocabulary is padded (encoder.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import ElectraConfig

from electra_composer.config import ModelConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.sizes import discriminator_config, generator_config

State = dict[str, Tensor]

# (ours, transformers') of the modules that map one to one; `.weight` and `.bias` follow.
_EMBEDDINGS = (
    ("word.weight", "word_embeddings.weight"),
    ("position.weight", "position_embeddings.weight"),
    ("token_type.weight", "token_type_embeddings.weight"),
    ("norm.weight", "LayerNorm.weight"),
    ("norm.bias", "LayerNorm.bias"),
)
# Our tables, and their differences in `DisentangledEmbeddings`.
DELTAS = {f"{table}.weight": f"{table}_delta" for table in ("word", "position", "token_type")}
_LAYER = (
    ("attention.out", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("up", "intermediate.dense"),
    ("down", "output.dense"),
    ("mlp_norm", "output.LayerNorm"),
)
_QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_RTD_HEAD = (("dense", "discriminator_predictions.dense"), ("out", "discriminator_predictions.dense_prediction"))
_MLM_HEAD = (("dense", "generator_predictions.dense"), ("norm", "generator_predictions.LayerNorm"))


def transformers_config(config: EncoderConfig, pad_id: int) -> ElectraConfig:
    """Convert the sizes of one encoder to an `ElectraConfig`."""
    return ElectraConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        hidden_act="gelu",
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        max_position_embeddings=config.max_positions,
        type_vocab_size=config.type_vocab_size,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=pad_id,
    )


def encoder_config_of(config: ElectraConfig) -> EncoderConfig:
    """Convert an `ElectraConfig` to our sizes.

    Raises:
        UserError: a feature that our encoder does not implement.
    """
    for name, found, expected in (
        ("model_type", config.model_type, ("electra",)),
        ("hidden_act", config.hidden_act, ("gelu",)),
        ("position_embedding_type", getattr(config, "position_embedding_type", "absolute"), ("absolute",)),
    ):
        if found not in expected:
            raise UserError(f"the transformers model has {name} {found!r}; only {expected[0]!r} can be loaded")
    return EncoderConfig(
        vocab_size=config.vocab_size,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        initializer_range=config.initializer_range,
        layer_norm_eps=config.layer_norm_eps,
    )


def encoder_to_transformers(embeddings: State, encoder: State, config: EncoderConfig) -> State:
    """Convert our embeddings and encoder to the state of an `ElectraModel`.

    Args:
        embeddings: state of our `Embeddings`.
        encoder: state of our `Encoder`.
        config: sizes of the encoder.

    Returns:
        Keys `embeddings.…`, `embeddings_project.…`, `encoder.layer.…`; without the padding rows of the vocabulary.
    """
    result = {f"embeddings.{theirs}": embeddings[ours] for ours, theirs in _EMBEDDINGS}
    result["embeddings.word_embeddings.weight"] = embeddings["word.weight"][: config.vocab_size]
    for kind in ("weight", "bias"):
        if config.embedding_size != config.hidden_size:
            result[f"embeddings_project.{kind}"] = encoder[f"project.{kind}"]
        for index in range(config.num_layers):
            ours_layer, theirs_layer = f"layers.{index}", f"encoder.layer.{index}"
            for ours, theirs in _LAYER:
                result[f"{theirs_layer}.{theirs}.{kind}"] = encoder[f"{ours_layer}.{ours}.{kind}"]
            for theirs, part in zip(_QKV, encoder[f"{ours_layer}.attention.qkv.{kind}"].chunk(3), strict=True):
                result[f"{theirs_layer}.{theirs}.{kind}"] = part
    return {name: tensor.clone().contiguous() for name, tensor in result.items()}


def encoder_from_transformers(state: State, config: EncoderConfig) -> tuple[State, State]:
    """Convert the state of an `ElectraModel` to those of our `Embeddings` and `Encoder`; inverse of the above."""
    embeddings = {ours: _take(state, f"embeddings.{theirs}") for ours, theirs in _EMBEDDINGS}
    embeddings["word.weight"] = _pad_rows(embeddings["word.weight"], config)
    encoder: State = {}
    for kind in ("weight", "bias"):
        if config.embedding_size != config.hidden_size:
            encoder[f"project.{kind}"] = _take(state, f"embeddings_project.{kind}")
        for index in range(config.num_layers):
            ours_layer, theirs_layer = f"layers.{index}", f"encoder.layer.{index}"
            for ours, theirs in _LAYER:
                encoder[f"{ours_layer}.{ours}.{kind}"] = _take(state, f"{theirs_layer}.{theirs}.{kind}")
            encoder[f"{ours_layer}.attention.qkv.{kind}"] = torch.cat(
                [_take(state, f"{theirs_layer}.{theirs}.{kind}") for theirs in _QKV]
            )
    return embeddings, encoder


def discriminator_to_transformers(state: State, config: EncoderConfig) -> State:
    """Convert our pretraining state to that of `ElectraForPreTraining`."""
    body = encoder_to_transformers(discriminator_embeddings(state), under(state, "discriminator."), config)
    result = {f"electra.{name}": tensor for name, tensor in body.items()}
    for ours, theirs in _RTD_HEAD:
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"rtd_head.{ours}.{kind}"].clone()
    return result


def discriminator_embeddings(state: State) -> State:
    """Return the state of the `Embeddings` of the discriminator in a pretraining state: under gdes, the sums."""
    own = under(state, "embeddings.")
    delta = pop_delta(own)
    if delta is not None:
        base = under(state, "generator_embeddings.")
        own |= {name: base[name] + tensor for name, tensor in delta.items()}
    return own


def generator_embeddings(state: State) -> State:
    """Return the state of the generator's `Embeddings` in a pretraining state."""
    return under(state, "generator_embeddings.") or under(state, "embeddings.")


def pop_delta(embeddings: State) -> State | None:
    """Remove the differences from a state of `DisentangledEmbeddings`, and return them by the names of the tables.

    None if it is a state of `Embeddings`.
    """
    return {table: embeddings.pop(delta) for table, delta in DELTAS.items() if delta in embeddings} or None


def with_delta(embeddings: State, delta: State) -> State:
    """Return a state of `DisentangledEmbeddings`: the LayerNorm of `embeddings`, and differences of the tables."""
    norm = {name: tensor for name, tensor in embeddings.items() if name not in DELTAS}
    return norm | {DELTAS[table]: tensor for table, tensor in delta.items()}


def difference(embeddings: State, base: State) -> State:
    """Return the differences of two sets of tables of one size."""
    return {table: embeddings[table] - base[table] for table in DELTAS}


def generator_to_transformers(state: State, config: EncoderConfig) -> State:
    """Convert the generator in our pretraining state to the state of `ElectraForMaskedLM`.

    Tied embeddings or layers are taken from the discriminator.
    """
    encoder = under(state, "generator.") or under(state, "discriminator.")
    return _masked_lm_to_transformers(generator_embeddings(state), encoder, under(state, "mlm_head."), config)


def masked_lm_to_transformers(state: State, config: EncoderConfig) -> State:
    """Convert the discriminator in our pretraining state, of an objective in which it predicts tokens, to the state of
    `ElectraForMaskedLM`."""
    encoder, head = under(state, "discriminator."), under(state, "lm_head.")
    return _masked_lm_to_transformers(discriminator_embeddings(state), encoder, head, config)


def _masked_lm_to_transformers(embeddings: State, encoder: State, head: State, config: EncoderConfig) -> State:
    """The output weights are the token embeddings."""
    body = encoder_to_transformers(embeddings, encoder, config)
    result = {f"electra.{name}": tensor for name, tensor in body.items()}
    for ours, theirs in _MLM_HEAD:
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = head[f"{ours}.{kind}"].clone()
    result["generator_lm_head.weight"] = result["electra.embeddings.word_embeddings.weight"]
    result["generator_lm_head.bias"] = head["bias"][: config.vocab_size].clone()
    return result


def pretraining_from_transformers(discriminator: State, generator: State, model: ModelConfig, vocab_size: int) -> State:
    """Convert states of `ElectraForPreTraining` and `ElectraForMaskedLM` to our pretraining state.

    Tied embeddings or layers are taken from the discriminator; the generator's must be equal.

    Raises:
        UserError: embeddings or layers differ although `model.sharing` is `tied` or `model.tie_encoder` is set.
    """
    sizes = discriminator_config(model, vocab_size), generator_config(model, vocab_size)
    embeddings, encoder = encoder_from_transformers(under(discriminator, "electra."), sizes[0])
    tables, generator_encoder = encoder_from_transformers(under(generator, "electra."), sizes[1])
    if model.sharing == "tied" and any(not torch.equal(embeddings[name], tensor) for name, tensor in tables.items()):
        raise UserError("generator and discriminator have different embeddings; set model.sharing to untied or gdes")
    if model.sharing == "gdes":
        embeddings = with_delta(embeddings, difference(embeddings, tables))
    result = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    if model.sharing != "tied":
        result |= {f"generator_embeddings.{name}": tensor for name, tensor in tables.items()}
    result |= {f"discriminator.{name}": tensor for name, tensor in encoder.items()}
    if not model.tie_encoder:
        result |= {f"generator.{name}": tensor for name, tensor in generator_encoder.items()}
    elif any(not torch.equal(encoder[name], tensor) for name, tensor in generator_encoder.items()):
        raise UserError("generator and discriminator have different layers; set model.tie_encoder=false")
    result |= {f"mlm_head.{name}": tensor for name, tensor in mlm_head_from_transformers(generator, sizes[1]).items()}
    result |= {f"rtd_head.{name}": tensor for name, tensor in rtd_head_from_transformers(discriminator).items()}
    return result


def mlm_head_from_transformers(state: State, config: EncoderConfig) -> State:
    """Convert the head of an `ElectraForMaskedLM` to the state of our `MaskedLMHead`."""
    head = {
        f"{ours}.{kind}": _take(state, f"{theirs}.{kind}") for ours, theirs in _MLM_HEAD for kind in ("weight", "bias")
    }
    return {**head, "bias": _pad_rows(_take(state, "generator_lm_head.bias"), config)}


def rtd_head_from_transformers(state: State) -> State:
    """Convert the head of an `ElectraForPreTraining` to the state of our `ReplacedTokenHead`."""
    return {
        f"{ours}.{kind}": _take(state, f"{theirs}.{kind}") for ours, theirs in _RTD_HEAD for kind in ("weight", "bias")
    }


def under(state: State, prefix: str) -> State:
    """Select the entries of a state with a prefix, and remove the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _take(state: State, name: str) -> Tensor:
    if name not in state:
        raise UserError(f"the transformers model has no weight {name}; expected that of an ELECTRA of these sizes")
    return state[name].detach().clone()


def _pad_rows(table: Tensor, config: EncoderConfig) -> Tensor:
    padding = table.new_zeros(config.padded_vocab_size - table.shape[0], *table.shape[1:])
    return torch.cat([table, padding])
