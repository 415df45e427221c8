"""Read the checkpoints of the reference repositories: both networks in transformers' names, sizes from the shapes.

google-research/electra writes checkpoints of TensorFlow, richarddwang/electra_pytorch `.pth` files of fastai. Neither
holds sizes; the number of heads is that of both repositories' models, one for 64 of the hidden size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ElectraConfig, PreTrainedTokenizerFast

from electra_composer.checkpoints.safe_loading import read_file
from electra_composer.checkpoints.tensorflow_files import find_checkpoint, read_variables
from electra_composer.errors import UserError
from electra_composer.model.weight_maps import State, under
from electra_composer.vocabulary import load_tokenizer

HEAD_SIZE = 64
TOKENIZER = "google/electra-small-discriminator"
"""Tokenizer of all English models of both repositories, for checkpoints without a vocabulary."""

# Renamings from google-research/electra (`model/modeling.py`, `run_pretraining.py`) to transformers, in this order.
_RENAMED = (
    ("layer_", "layer."),
    ("dense_1", "dense_prediction"),
    ("generator_predictions/output_bias", "generator_lm_head/bias"),
    ("/gamma", "/weight"),
    ("/beta", "/bias"),
    ("_embeddings/end", "_embeddings/weight"),
    ("/", "."),
)


@dataclass
class Reference:
    """Both networks of a checkpoint.

    Attributes:
        discriminator, generator: states of `ElectraForPreTraining` and `ElectraForMaskedLM`.
        tokenizer: None if the checkpoint has none.
    """

    path: str
    discriminator: State
    generator: State
    tokenizer: PreTrainedTokenizerFast | None


def is_reference(source: str) -> bool:
    """Return whether a source is a checkpoint of TensorFlow or a `.pth` file."""
    return (source.endswith(".pth") and os.path.isfile(source)) or find_checkpoint(source) is not None


def read_reference(source: str) -> Reference:
    """Read a checkpoint for which :func:`is_reference` holds.

    Raises:
        UserError: it cannot be read, or holds other models.
    """
    if source.endswith(".pth"):
        return _read_fastai(source)
    prefix = find_checkpoint(source)
    assert prefix is not None
    return _read_tensorflow(prefix)


def infer_config(state: State, path: str) -> ElectraConfig:
    """Return the sizes of a network in transformers' names.

    Raises:
        UserError: weights are missing.
    """
    layers = {name.split(".")[3] for name in state if name.startswith("electra.encoder.layer.")}
    try:
        vocab_size, embedding_size = state["electra.embeddings.word_embeddings.weight"].shape
        intermediate_size, hidden_size = state["electra.encoder.layer.0.intermediate.dense.weight"].shape
        return ElectraConfig(
            vocab_size=vocab_size,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, hidden_size // HEAD_SIZE),
            intermediate_size=intermediate_size,
            max_position_embeddings=len(state["electra.embeddings.position_embeddings.weight"]),
            type_vocab_size=len(state["electra.embeddings.token_type_embeddings.weight"]),
        )
    except KeyError as error:
        raise UserError(f"{path}: holds no ELECTRA network: the weight {error} is missing") from error


def _read_tensorflow(prefix: str) -> Reference:
    discriminator: State = {}
    generator: State = {}
    for name, values in read_variables(prefix).items():
        if "adam_" in name or "/" not in name:  # optimizer state, global_step
            continue
        tensor = torch.from_numpy(values)
        if name.endswith("/kernel"):
            name, tensor = f"{name.removesuffix('kernel')}weight", tensor.T.contiguous()
        ours = _in_transformers(name)
        scope = name.split("/")[0]
        if scope in ("electra", "discriminator_predictions"):
            discriminator[ours] = tensor
        if scope in ("generator", "generator_predictions"):
            generator[ours.replace("generator.", "electra.", 1) if scope == "generator" else ours] = tensor
    if not discriminator:
        raise UserError(f"{prefix}: a checkpoint of TensorFlow without variables of ELECTRA (electra/…)")
    # Tied embeddings are variables of the discriminator; those of the generator are named generator/embeddings.
    shared = {name: tensor for name, tensor in discriminator.items() if name.startswith("electra.embeddings.")}
    if generator and not under(generator, "electra.embeddings."):
        generator |= shared
    vocabulary = os.path.join(os.path.dirname(prefix), "vocab.txt")
    tokenizer = load_tokenizer(vocabulary) if os.path.isfile(vocabulary) else None
    return Reference(prefix, discriminator, generator, tokenizer)


def _in_transformers(name: str) -> str:
    """Return transformers' name of a variable of google-research/electra."""
    name = f"{name}/end" if name.endswith("_embeddings") else name
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def _read_fastai(path: str) -> Reference:
    content = read_file(path, mmap=False)
    model = content.get("model") if isinstance(content, dict) else None
    state = model if isinstance(model, dict) else content  # saved with the optimizer, or without
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: not a .pth file of electra_pytorch: it holds no state dict of a model")
    state = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
    discriminator, generator = under(state, "discriminator."), under(state, "generator.")
    if not discriminator or not generator:
        raise UserError(f"{path}: not a .pth file of electra_pytorch: expected weights discriminator.… and generator.…")
    return Reference(path, discriminator, generator, tokenizer=None)
