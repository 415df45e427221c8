"""Weights to continue pretraining from: `model.init_from` and `model.init_generator_from`.

Sizes and tying that the configuration leaves out are those of the source; the others must agree with it. The vocabulary
of the shards is that of the source, or begins with it: new entries start as the mean of their old pieces.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from electra_composer.checkpoints.networks import Network, matching_generator, read_discriminator, read_generator
from electra_composer.config import ModelConfig
from electra_composer.errors import UserError
from electra_composer.model.adaptation import extend_rows, resize_positions
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import State

RANDOM, LAYERS = "random", "layers"  # values of `model.init_generator_from` that are no source

# Keys of `model` by the size of an encoder that they set.
_KEYS = ("num_layers", "hidden_size", "num_heads", "embedding_size", "layer_norm_eps")


@dataclass(frozen=True)
class Initial:
    """The networks to start from.

    Attributes:
        discriminator: None: random weights.
        generator: None: see `rest`.
        rest: initial weights of the generator without one: :data:`RANDOM`; :data:`LAYERS`, the lower layers of the
            discriminator; None: these if they have its width, else random ones.
    """

    discriminator: Network | None
    generator: Network | None
    rest: str | None = None

    def sizes(self) -> dict[str, Any]:
        """Return the keys of `model` that follow from the networks, with their values."""
        sizes: dict[str, Any] = {}
        discriminator, generator = self.discriminator, self.generator
        if discriminator is not None:
            sizes |= {name: getattr(discriminator.config, name) for name in (*_KEYS, "max_positions")}
        if discriminator is not None and generator is not None:
            sizes |= {
                "generator_size": generator.config.hidden_size / discriminator.config.hidden_size,
                "generator_layers": generator.config.num_layers,
                "tie_embeddings": _equal(discriminator.embeddings, generator.embeddings),
            }
            sizes["tie_encoder"] = sizes["tie_embeddings"] and _equal(discriminator.encoder, generator.encoder)
        return sizes


@functools.lru_cache(maxsize=1)  # read for the sizes, and again for the weights
def read_initial(init_from: str | None, init_generator_from: str | None) -> Initial | None:
    """Read the networks named by the configuration; None if it names none.

    Args:
        init_from: `model.init_from`.
        init_generator_from: `model.init_generator_from`; null: the generator that belongs to `init_from`, if its name
            says where that is, else the lower layers of the discriminator if they have its width, else random weights.

    Raises:
        UserError: a source that cannot be read, or `layers` without a discriminator.
    """
    if init_from is None and init_generator_from in (None, RANDOM):
        return None
    discriminator = None if init_from is None else read_discriminator(init_from)
    if init_generator_from == LAYERS and discriminator is None:
        raise UserError("model.init_generator_from is layers: those of model.init_from, which is null; set it")
    if init_generator_from in (RANDOM, LAYERS):
        return Initial(discriminator, None, init_generator_from)
    source = matching_generator(str(init_from)) if init_generator_from is None else init_generator_from
    if source is None:
        return Initial(discriminator, None)
    try:
        return Initial(discriminator, read_generator(source))
    except UserError as error:
        if init_generator_from is not None:
            raise
        raise UserError(
            f"the generator of model.init_from={init_from}: {error}; set model.init_generator_from to where it is, or "
            f"to {LAYERS} or {RANDOM}"
        ) from error


def initialise(
    model: ElectraForPretraining, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, initial: Initial
) -> str:
    """Replace the random weights of a model by those of the networks.

    Args:
        model: with the sizes of `config`.
        tokenizer: of the shards.

    Returns:
        What was taken from where, for the log.

    Raises:
        UserError: a size, the tying or an entry of the vocabulary that differs from the source.
    """
    vocab_size = len(tokenizer)
    state = model.state_dict()
    parts: dict[str, State] = {}
    taken = []
    discriminator, generator = initial.discriminator, initial.generator
    if discriminator is not None:
        check_agreement(discriminator, discriminator_config(config, vocab_size), "model.", "discriminator")
        discriminator = adapt(discriminator, model.discriminator.config, config.init_positions, tokenizer)
        parts |= {"embeddings.": discriminator.embeddings, "discriminator.": discriminator.encoder}
        if discriminator.head is not None:
            parts["rtd_head."] = discriminator.head
        taken.append(_said("discriminator", discriminator))
    if generator is not None:
        check_agreement(generator, generator_config(config, vocab_size), "", "generator")
        generator = adapt(generator, model.encoder_of_generator.config, config.init_positions, tokenizer)
        parts |= _parts_of_generator(generator, discriminator, config)
        taken.append(_said("generator", generator))
    elif discriminator is not None:
        lower, said = _without_source(discriminator, model, initial.rest)
        parts |= lower
        taken.append(said)
    for prefix, part in parts.items():
        unknown = [name for name in part if prefix + name not in state]
        assert not unknown, unknown
        state |= {prefix + name: tensor for name, tensor in part.items()}
    model.load_state_dict(state)
    return "; ".join(taken)


def check_agreement(network: Network, expected: EncoderConfig, prefix: str, name: str) -> None:
    """Refuse sizes that differ from those of the source; the vocabulary and the positions may be larger or smaller.

    Raises:
        UserError: naming the key and both values.
    """
    found, wanted = asdict(network.config), asdict(expected)
    for size in (*_KEYS, "intermediate_size", "type_vocab_size"):
        if found[size] != wanted[size]:
            key = f"{prefix}{size}" if size in _KEYS else size
            raise UserError(
                f"the {name} in {network.source} has {key} {found[size]}, this model {wanted[size]}; leave the sizes "
                "under model: out to take those of the source, or remove model.init_from"
            )


def adapt(network: Network, expected: EncoderConfig, positions: str, tokenizer: PreTrainedTokenizerFast) -> Network:
    """Bring the tables of a network to the vocabulary of a tokenizer and to another number of positions.

    Args:
        network: to adapt; stays as it is.
        expected: sizes to reach.
        positions: `copy` or `interpolate`, see :func:`resize_positions`.
        tokenizer: begins with the vocabulary of the network's own.

    Raises:
        UserError: it does not.
    """
    pieces = pieces_of_new_tokens(network, tokenizer)
    old = len(tokenizer) - len(pieces)
    embeddings = dict(network.embeddings)
    embeddings["word.weight"] = extend_rows(embeddings["word.weight"][:old], pieces, expected.padded_vocab_size)
    embeddings["position.weight"] = resize_positions(embeddings["position.weight"], expected.max_positions, positions)
    head = network.head
    if head is not None and "bias" in head:
        head = {**head, "bias": extend_rows(head["bias"][:old], pieces, expected.padded_vocab_size)}
    return replace(network, embeddings=embeddings, head=head)


def pieces_of_new_tokens(network: Network, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return, for each entry of the tokenizer beyond the vocabulary of a network, the ids of its old pieces.

    Raises:
        UserError: an old entry has another id, or none; or the network has no tokenizer, and another number of entries.
    """
    old, advice = network.tokenizer, f"convert the text with --tokenizer {network.source}"
    size = network.config.vocab_size if old is None else len(old)
    if len(tokenizer) < size or (old is None and len(tokenizer) > size):
        raise UserError(
            f"the tokenizer of the shards has {len(tokenizer):,} entries, {network.source} was trained with "
            f"{size:,}; {'convert the text with that of its training' if old is None else advice}"
        )
    if old is None:
        return []
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for number, name in enumerate(old.convert_ids_to_tokens(list(range(size)))):
        if names[number] != name:
            raise UserError(
                f"the tokenizer of the shards has {names[number]!r} as entry {number:,}, {network.source} was trained "
                f"with {name!r}; {advice}"
            )
    ids = old.get_vocab()
    return [_pieces(name, old, ids) for name in names[size:]]


def _pieces(name: str, tokenizer: PreTrainedTokenizerFast, ids: dict[str, int]) -> list[int]:
    """Tokenize the text of a new entry by the old vocabulary; `##` marks the inside of a word (WordPiece)."""
    if not name.startswith("##"):
        return [ids[token] for token in tokenizer.tokenize(name)] or [ids[str(tokenizer.unk_token)]]
    pieces, rest = [], name.removeprefix("##")
    while rest:  # the longest match first, as at the start of a word
        end = next((end for end in range(len(rest), 0, -1) if f"##{rest[:end]}" in ids), None)
        if end is None:
            return [ids[str(tokenizer.unk_token)]]
        pieces.append(ids[f"##{rest[:end]}"])
        rest = rest[end:]
    return pieces


def _parts_of_generator(generator: Network, discriminator: Network | None, config: ModelConfig) -> dict[str, State]:
    """Return the states of the generator's modules by their prefix.

    Raises:
        UserError: it differs from the discriminator in what they are to share.
    """
    parts: dict[str, State] = {} if generator.head is None else {"mlm_head.": generator.head}
    for tied, key, shared, own, ours in (
        (config.tie_embeddings, "model.tie_embeddings", "embeddings.", "generator_embeddings.", generator.embeddings),
        (config.tie_encoder, "model.tie_encoder", "discriminator.", "generator.", generator.encoder),
    ):
        if not tied:
            parts[own] = ours
        elif discriminator is None:
            parts[shared] = ours
        elif not _equal(ours, discriminator.embeddings if shared == "embeddings." else discriminator.encoder):
            raise UserError(
                f"{key} is true, but {generator.source} and {discriminator.source} differ there; set {key}=false"
            )
    return parts


def _without_source(
    discriminator: Network, model: ElectraForPretraining, rest: str | None
) -> tuple[dict[str, State], str]:
    """Return the states of a generator without a source, and what they are.

    Raises:
        UserError: the lower layers of the discriminator are asked for, and have another width.
    """
    parts: dict[str, State] = {}
    if model.generator_embeddings is not None:
        parts["generator_embeddings."] = discriminator.embeddings
    if model.generator is None:
        return parts, "generator: the layers of the discriminator, which it shares; its head random"
    ours, theirs = model.generator.state_dict(), discriminator.encoder
    fits = all(name in theirs and theirs[name].shape == tensor.shape for name, tensor in ours.items())
    if rest == LAYERS and not fits:
        raise UserError(
            f"model.init_generator_from is {LAYERS}, but {discriminator.source} has another width or fewer layers than "
            f"the generator; set model.generator_size=1.0, or model.init_generator_from={RANDOM}"
        )
    if rest != RANDOM and fits:
        parts["generator."] = {name: theirs[name] for name in ours}
        return parts, f"generator: the lower {len(model.generator.layers)} layers of the discriminator; its head random"
    why = "" if rest == RANDOM else " (no generator at hand, and the discriminator's layers have another width)"
    return parts, f"generator: random weights, with the embeddings of the discriminator{why}"


def _said(name: str, network: Network) -> str:
    head = "" if network.head else ", its head random"
    tokenizer = "" if network.tokenizer else ", which has no vocabulary to compare with the shards'"
    return f"{name} from {network.source}{head}{tokenizer}"


def _equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
