"""Read the discriminator or the generator of a pretrained ELECTRA, to start pretraining from."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from transformers import ElectraForMaskedLM, PreTrainedTokenizerFast

from electra_composer.checkpoints.reference_formats import infer_config, is_reference, read_reference
from electra_composer.checkpoints.sharded import is_sharded
from electra_composer.checkpoints.transformers_folders import load_transformers
from electra_composer.checkpoints.weights import LATEST, load_source, read_checkpoint
from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.sizes import generates
from electra_composer.model.weight_maps import (
    State,
    encoder_config_of,
    encoder_from_transformers,
    generator_embeddings,
    mlm_head_from_transformers,
    rtd_head_from_transformers,
    under,
)


@dataclass
class Network:
    """One of the two networks, in the names of `ElectraNetworks`.

    Attributes:
        source: where it comes from, for messages.
        config: its sizes.
        embeddings: state of `Embeddings`.
        encoder: state of `Encoder`.
        head: state of `ReplacedTokenHead` or `MaskedLMHead`; None if the source has none.
        tokenizer: the one it was trained with; None if the source has none.
        lm_head: of a discriminator that predicts tokens: state of its `MaskedLMHead`; otherwise None.
        is_two_tower: whether `encoder` is the state of a `TwoTowers`.
        delta: of a discriminator trained with `model.sharing: gdes`, the differences of its tables from the
            generator's, by their names; otherwise None.
    """

    source: str
    config: EncoderConfig
    embeddings: State
    encoder: State
    head: State | None
    tokenizer: PreTrainedTokenizerFast | None
    delta: State | None = None
    lm_head: State | None = None
    is_two_tower: bool = False


def read_discriminator(source: str) -> Network:
    """Read a discriminator.

    Args:
        source: as that of :func:`load_source`, or a checkpoint of the reference repositories (reference_formats.py).

    Raises:
        UserError: not found, or no ELECTRA discriminator.
    """
    if is_reference(source):
        reference = read_reference(source)
        state, config = reference.discriminator, encoder_config_of(infer_config(reference.discriminator, source))
        head = rtd_head_from_transformers(state)
        return Network(
            source, config, *encoder_from_transformers(under(state, "electra."), config), head, reference.tokenizer
        )
    found = load_source(source)
    embeddings, encoder = under(found.weights, "embeddings."), under(found.weights, "encoder.")
    network = Network(found.name, found.encoder, embeddings, encoder, found.rtd_head, found.tokenizer, found.delta)
    return replace(network, lm_head=found.lm_head)


def read_generator(source: str) -> Network:
    """Read a generator.

    Args:
        source: a checkpoint of pretrain.py or its run folder, a folder of `export.py`, a checkpoint of the reference
            repositories, a folder of transformers' `ElectraForMaskedLM`, or the name of one on the hub.

    Raises:
        UserError: not found, or no ELECTRA generator.
    """
    if is_own_checkpoint(source):
        checkpoint = read_checkpoint(source)
        if not generates(checkpoint.objective):
            raise UserError(f"{source}: {checkpoint.described}, which has no generator")
        embeddings, towers = generator_embeddings(checkpoint.state), under(checkpoint.state, "towers.")
        encoder = towers or under(checkpoint.state, "generator.") or under(checkpoint.state, "discriminator.")
        network = Network(
            source,
            checkpoint.generator,
            embeddings,
            encoder,
            under(checkpoint.state, "mlm_head."),
            checkpoint.tokenizer,
        )
        return replace(network, is_two_tower=bool(towers))
    tokenizer: PreTrainedTokenizerFast | None
    if is_reference(source):
        reference = read_reference(source)
        if not reference.generator:
            raise UserError(f"{source}: holds a discriminator, and no generator")
        state, tokenizer = reference.generator, reference.tokenizer
        config, missing = encoder_config_of(infer_config(state, source)), list[str]()
    else:
        if _is_export(source):
            source = os.path.join(source, "generator")
        config, state, tokenizer, missing = load_transformers(source, ElectraForMaskedLM)
    head = None if missing else mlm_head_from_transformers(state, config)
    return Network(source, config, *encoder_from_transformers(under(state, "electra."), config), head, tokenizer)


def matching_generator(source: str) -> str | None:
    """Return where the generator of a discriminator is, as far as its name says: None if it does not.

    Checkpoints and exports of this project hold both, and so may checkpoints of the references.
    `google/electra-small-discriminator` belongs to `google/electra-small-generator`, and a folder `discriminator` to a
    folder `generator` beside it.
    """
    if is_reference(source):
        return source if read_reference(source).generator else None
    if is_own_checkpoint(source):
        is_there = os.path.exists(source)  # otherwise said where it is read
        return None if is_there and not generates(read_checkpoint(source).objective) else source
    if _is_export(source):
        return source
    folder, name = os.path.split(source.rstrip("/"))
    if "discriminator" not in name:
        return None
    generator = os.path.join(folder, name.replace("discriminator", "generator"))
    return None if os.path.exists(source) and not os.path.exists(generator) else generator


def is_own_checkpoint(source: str) -> bool:
    """Return whether a source is a checkpoint of pretrain.py or a run folder with one."""
    return source.endswith(".pt") or is_sharded(source) or os.path.exists(os.path.join(source, LATEST))


def _is_export(source: str) -> bool:
    """Return whether a source is a folder of `export.py` with both networks."""
    has_both = os.path.isfile(os.path.join(source, "generator", "config.json"))
    return has_both and not os.path.isfile(os.path.join(source, "config.json"))
