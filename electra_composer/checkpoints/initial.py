"""Weights to continue pretraining from: `model.init_from` and `model.init_generator_from`.

Sizes and tying that the configuration leaves out are those of the source; the others must agree with it. The vocabulary
of the shards is that of the source, or begins with it: new entries start as the mean of their old pieces.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from electra_composer.checkpoints.adapt import adapt
from electra_composer.checkpoints.generator_start import LAYERS, RANDOM, without_source
from electra_composer.checkpoints.networks import Network, matching_generator, read_discriminator, read_generator
from electra_composer.config import ModelConfig
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import State, difference, with_delta

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
                "sharing": self._sharing(discriminator, generator),
            }
            if sizes["sharing"] == "untied":
                sizes["generator_embedding_size"] = generator.config.embedding_size
            sizes["tie_encoder"] = sizes["sharing"] == "tied" and _equal(discriminator.encoder, generator.encoder)
        elif discriminator is not None and discriminator.lm_head is not None:  # it is what a generator begins with
            width = discriminator.config.embedding_size
            sizes |= {"generator_size": 1.0, "generator_layers": None, "generator_embedding_size": width}
        return sizes

    @staticmethod
    def _sharing(discriminator: Network, generator: Network) -> str:
        """Return the value of `model.sharing` of two networks."""
        if discriminator.delta is not None and discriminator.source == generator.source:
            return "gdes"
        return "tied" if _equal(discriminator.embeddings, generator.embeddings) else "untied"


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
        heads = {"rtd_head.": discriminator.head, "lm_head.": discriminator.lm_head}
        taken_heads = {
            name: head for name, head in heads.items() if head is not None and f"{name}dense.weight" in state
        }
        parts |= taken_heads
        taken.append(_said("discriminator", discriminator, bool(taken_heads)))
    if generator is not None and (model.mlm_head is None or generator.is_two_tower != (model.towers is not None)):
        generator = None  # the objective has none, or one of another kind
    if generator is not None:
        check_agreement(generator, generator_config(config, vocab_size), "", "generator")
        generator = adapt(generator, model.encoder_of_generator.config, config.init_positions, tokenizer)
        parts |= _parts_of_generator(generator, discriminator, config)
        taken.append(_said("generator", generator, generator.head is not None))
    elif discriminator is not None and model.mlm_head is not None:
        lower, said = without_source(discriminator, model, initial.rest)
        parts |= lower
        taken.append(said)
    if model.objective.generator == "frozen" and not {"generator.", "mlm_head."} <= parts.keys():
        raise UserError(
            "objective.generator=frozen needs a complete generator to start from, and model.init_from has none of this "
            "size; give a run with objective.kind=mlm, and model.generator_size=1.0"
        )
    if config.sharing == "gdes":
        parts["embeddings."] = _disentangled(parts, discriminator, generator)
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
            if (name, size) == ("generator", "embedding_size"):
                raise UserError(
                    f"the embeddings of the generator in {network.source} are {found[size]} wide, those of this model "
                    f"{wanted[size]}; set model.sharing=untied model.generator_embedding_size={found[size]}"
                )
            raise UserError(
                f"the {name} in {network.source} has {key} {found[size]}, this model {wanted[size]}; leave the sizes "
                "under model: out to take those of the source, or remove model.init_from"
            )


def _parts_of_generator(generator: Network, discriminator: Network | None, config: ModelConfig) -> dict[str, State]:
    """Return the states of the generator's modules by their prefix.

    Raises:
        UserError: it differs from the discriminator in what they are to share.
    """
    parts: dict[str, State] = {} if generator.head is None else {"mlm_head.": generator.head}
    encoder = "towers." if generator.is_two_tower else "generator."
    tied_encoder, tied_embeddings = ("model.tie_encoder", "true", "false"), ("model.sharing", "tied", "untied")
    for tied, names, shared, own, ours in (
        (config.sharing == "tied", tied_embeddings, "embeddings.", "generator_embeddings.", generator.embeddings),
        (config.tie_encoder, tied_encoder, "discriminator.", encoder, generator.encoder),
    ):
        key, value, other = names
        if not tied:
            parts[own] = ours
        elif discriminator is None:
            parts[shared] = ours
        elif not _equal(ours, discriminator.embeddings if shared == "embeddings." else discriminator.encoder):
            raise UserError(
                f"{key} is {value}, but {generator.source} and {discriminator.source} differ there; set {key}={other}"
            )
    return parts


def _disentangled(parts: dict[str, State], discriminator: Network | None, generator: Network | None) -> State:
    """Return the state of the discriminator's `DisentangledEmbeddings`.

    Args:
        parts: states of the other modules by their prefix.
        discriminator, generator: adapted; without the former, the discriminator begins with the generator's tables.
    """
    base = parts["generator_embeddings."]
    embeddings = base if discriminator is None else discriminator.embeddings
    if discriminator is None or generator is None or discriminator.source != generator.source:
        return with_delta(embeddings, difference(embeddings, base))
    # Of one checkpoint the differences themselves: a difference of the sums is rounded.
    return with_delta(embeddings, discriminator.delta or difference(embeddings, base))


def _said(name: str, network: Network, has_head: bool) -> str:
    head = "" if has_head else ", its head random"
    tokenizer = "" if network.tokenizer else ", which has no vocabulary to compare with the shards'"
    return f"{name} from {network.source}{head}{tokenizer}"


def _equal(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
