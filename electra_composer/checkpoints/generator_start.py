"""Initial weights of a generator that has no source of its own: those of the discriminator, as far as they fit."""

from __future__ import annotations

from torch import nn

from electra_composer.checkpoints.networks import Network
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.weight_maps import State

RANDOM, LAYERS = "random", "layers"  # values of `model.init_generator_from` that are no source


def without_source(
    discriminator: Network, model: ElectraForPretraining, rest: str | None
) -> tuple[dict[str, State], str]:
    """Return the states of a generator without a source, and what they are.

    Args:
        discriminator: adapted to the vocabulary and the positions of the model. Where it predicts tokens, a generator
            with all of its layers has its head too: the two-stage training of the paper's section 3.2.
        model: to start.
        rest: :data:`RANDOM`, :data:`LAYERS`, or None: the layers if they fit.

    Raises:
        UserError: the lower layers of the discriminator are asked for, and have another width.
    """
    parts: dict[str, State] = {}
    own, embeddings = model.generator_embeddings, "with the embeddings of the discriminator"
    if own is not None and own.word.embedding_dim == discriminator.config.embedding_size:
        parts["generator_embeddings."] = discriminator.embeddings
    elif own is not None:
        embeddings = "also of its embeddings, whose width is another"
    if model.towers is not None:
        return parts, f"generator: two towers with random weights, {embeddings}"
    complete = discriminator.lm_head is not None and _fits(model.mlm_head, discriminator.lm_head) and rest != RANDOM
    head = "its head too" if complete else "its head random"
    if model.generator is None:
        if complete:
            parts["mlm_head."] = discriminator.lm_head or {}
        return parts, f"generator: the layers of the discriminator, which it shares; {head}"
    fits = _fits(model.generator, discriminator.encoder)
    if rest == LAYERS and not fits:
        raise UserError(
            f"model.init_generator_from is {LAYERS}, but {discriminator.source} has another width or fewer layers than "
            f"the generator; set model.generator_size=1.0, or model.init_generator_from={RANDOM}"
        )
    if rest != RANDOM and fits:
        count, theirs = len(model.generator.layers), discriminator.encoder
        parts["generator."] = {name: theirs[name] for name in model.generator.state_dict()}
        if complete and count == discriminator.config.num_layers:
            parts["mlm_head."] = discriminator.lm_head or {}
            return parts, "generator: the layers and the head of the discriminator"
        return parts, f"generator: the lower {count} layers of the discriminator; its head random"
    why = "" if rest == RANDOM else " (no generator at hand, and the discriminator's layers have another width)"
    return parts, f"generator: random weights, {embeddings}{why}"


def _fits(module: nn.Module | None, state: State) -> bool:
    """Whether a state has all weights of a module, with their shapes."""
    ours = {} if module is None else module.state_dict()
    return all(name in state and state[name].shape == tensor.shape for name, tensor in ours.items())
