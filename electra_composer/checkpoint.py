"""Weight maps to and from transformers, and loading that is strict and safe.

Composer's checkpoints are pickles. What is read here (for export and finetuning) goes through `weights_only=True`,
which runs no code of the file's; a checkpoint that needs more is refused.
"""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, ElectraConfig, PreTrainedTokenizerFast
from transformers import ElectraForPreTraining as TransformersElectraForPreTraining

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.electra import ElectraForPretraining, SpecialIds, discriminator_config, generator_config
from electra_composer.encoder import EncoderConfig
from electra_composer.errors import UserError

State = dict[str, Tensor]

# (ours, transformers') of the modules that map one to one; `.weight` and `.bias` follow.
_EMBEDDINGS = (
    ("word.weight", "word_embeddings.weight"),
    ("position.weight", "position_embeddings.weight"),
    ("token_type.weight", "token_type_embeddings.weight"),
    ("norm.weight", "LayerNorm.weight"),
    ("norm.bias", "LayerNorm.bias"),
)
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
    """The `ElectraConfig` of one encoder."""
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
    """Our sizes from an `ElectraConfig`.

    Raises:
        UserError: something our encoder does not compute.
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
    """Our embeddings and encoder as an `ElectraModel`'s state.

    Args:
        embeddings: state of our `Embeddings`.
        encoder: state of our `Encoder`.
        config: its sizes.

    Returns:
        Keys `embeddings.…`, `embeddings_project.…`, `encoder.layer.…`; the rows that pad the vocabulary are cut off.
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
    """An `ElectraModel`'s state as the states of our `Embeddings` and `Encoder`: the inverse of the map above."""
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
    """Our pretraining state as the state of `ElectraForPreTraining`."""
    body = encoder_to_transformers(_under(state, "embeddings."), _under(state, "discriminator."), config)
    result = {f"electra.{name}": tensor for name, tensor in body.items()}
    for ours, theirs in _RTD_HEAD:
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"rtd_head.{ours}.{kind}"].clone()
    return result


def generator_to_transformers(state: State, config: EncoderConfig) -> State:
    """Our pretraining state as the state of `ElectraForMaskedLM`; output weights are the token embeddings."""
    embeddings = _under(state, "generator_embeddings.") or _under(state, "embeddings.")
    body = encoder_to_transformers(embeddings, _under(state, "generator."), config)
    result = {f"electra.{name}": tensor for name, tensor in body.items()}
    for ours, theirs in _MLM_HEAD:
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"mlm_head.{ours}.{kind}"].clone()
    result["generator_lm_head.weight"] = result["electra.embeddings.word_embeddings.weight"]
    result["generator_lm_head.bias"] = state["mlm_head.bias"][: config.vocab_size].clone()
    return result


def pretraining_from_transformers(discriminator: State, generator: State, model: ModelConfig, vocab_size: int) -> State:
    """States of `ElectraForPreTraining` and `ElectraForMaskedLM` as our pretraining state.

    Tied, the embeddings are the discriminator's; the generator's must equal them.

    Raises:
        UserError: embeddings that differ although `model.tie_embeddings` says they are one.
    """
    sizes = discriminator_config(model, vocab_size), generator_config(model, vocab_size)
    embeddings, encoder = encoder_from_transformers(_under(discriminator, "electra."), sizes[0])
    generator_embeddings, generator_encoder = encoder_from_transformers(_under(generator, "electra."), sizes[1])
    result = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    if not model.tie_embeddings:
        result |= {f"generator_embeddings.{name}": tensor for name, tensor in generator_embeddings.items()}
    elif any(not torch.equal(embeddings[name], tensor) for name, tensor in generator_embeddings.items()):
        raise UserError("generator and discriminator have different embeddings; set model.tie_embeddings=false")
    result |= {f"discriminator.{name}": tensor for name, tensor in encoder.items()}
    result |= {f"generator.{name}": tensor for name, tensor in generator_encoder.items()}
    for kind in ("weight", "bias"):
        result |= {f"rtd_head.{ours}.{kind}": _take(discriminator, f"{theirs}.{kind}") for ours, theirs in _RTD_HEAD}
        result |= {f"mlm_head.{ours}.{kind}": _take(generator, f"{theirs}.{kind}") for ours, theirs in _MLM_HEAD}
    result["mlm_head.bias"] = _pad_rows(_take(generator, "generator_lm_head.bias"), sizes[1])
    return result


@dataclass
class Checkpoint:
    """What is read of one of our checkpoints."""

    path: str
    state: State  # of ElectraForPretraining
    config: dict[str, Any]  # the resolved configuration of the run
    tokenizer: PreTrainedTokenizerFast

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.config["model"])

    @property
    def discriminator(self) -> EncoderConfig:
        return discriminator_config(self.model_config, len(self.tokenizer))

    @property
    def generator(self) -> EncoderConfig:
        return generator_config(self.model_config, len(self.tokenizer))

    def build_model(self) -> ElectraForPretraining:
        """The pretraining model with these weights, ready for evaluation."""
        model = ElectraForPretraining(
            self.model_config,
            ObjectiveConfig(**self.config["objective"]),
            len(self.tokenizer),
            special_ids(self.tokenizer),
            self.config["data"]["max_seq_length"],
        )
        check_state_fits(self.state, model.state_dict(), self.path)
        model.load_state_dict(self.state)
        return model.eval()


@dataclass
class Pretrained:
    """A discriminator's body, ready to be finetuned."""

    name: str
    encoder: EncoderConfig
    weights: State  # embeddings.… and encoder.… of ElectraForClassification
    tokenizer: PreTrainedTokenizerFast


def read_checkpoint(path: str) -> Checkpoint:
    """Read a Composer checkpoint that `pretrain.py` wrote, without running code of the file's.

    Raises:
        UserError: no such file, cut short, not a checkpoint of ours, or one that only unsafe loading could read.
    """
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "latest-rank0.pt")):
        path = os.path.join(path, "latest-rank0.pt")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; expected a .pt file that pretrain.py wrote, or its run folder")
    try:
        with torch.serialization.safe_globals(_checkpoint_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        lines = str(error).splitlines()
        reason = next((line for line in lines if "unsupported" in line.lower()), lines[0])
        raise UserError(
            f"{path}: not a checkpoint, or one with objects other than tensors and plain values; it was not loaded, "
            f"since that could run code of the file's: {reason.rpartition('WeightsUnpickler error: ')[2]}"
        ) from error
    except Exception as error:  # whatever the reader stumbles over in foreign bytes: there is no end of its kinds
        raise UserError(
            f"{path}: not a readable checkpoint (cut short, or another kind of file?): "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error
    try:
        model_state = content["state"]["model"]
        record = content["state"]["callbacks"]["RunRecord"]
        config, tokenizer_files = record["config"], record["tokenizer_files"]
        state = {name.removeprefix("model.").replace("_orig_mod.", ""): tensor for name, tensor in model_state.items()}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of pretrain.py: no model weights, configuration and tokenizer where they belong "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, text in tokenizer_files.items():
                with open(os.path.join(folder, os.path.basename(name)), "w", encoding="utf-8") as file:
                    file.write(text)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the tokenizer in it cannot be read: {_one_line(error)}") from error
    return Checkpoint(path, state, config, tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The ids that masking needs, of a tokenizer that has them all (vocabulary.py sees to it)."""
    return SpecialIds(tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The files that make up a tokenizer, name → text, as they go into a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def load_source(source: str) -> Pretrained:
    """A discriminator from one of our checkpoints (.pt or run folder), a Hugging Face folder, or a name on the hub.

    Raises:
        UserError: nothing there, or nothing that is an ELECTRA discriminator.
    """
    if source.endswith(".pt") or os.path.exists(os.path.join(source, "latest-rank0.pt")):
        checkpoint = read_checkpoint(source)
        weights = {name: t for name, t in checkpoint.state.items() if name.startswith("embeddings.")}
        weights |= {f"encoder.{name}": t for name, t in _under(checkpoint.state, "discriminator.").items()}
        return Pretrained(source, checkpoint.discriminator, weights, checkpoint.tokenizer)
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise UserError(f"{source}: a folder with neither latest-rank0.pt (ours) nor config.json (Hugging Face)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, loading = TransformersElectraForPreTraining.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{source}: neither a checkpoint, nor a Hugging Face folder, nor a model the hub gave: {_one_line(error)}"
        ) from error
    missing = [name for name in loading["missing_keys"] if name.startswith("electra.")]
    if missing:
        raise UserError(
            f"{source}: not an ELECTRA discriminator: it has no {missing[0]} ({len(missing)} weights missing)"
        )
    config = encoder_config_of(model.config)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, its model embeddings for {config.vocab_size}; "
            "they do not belong together"
        )
    embeddings, encoder = encoder_from_transformers(_under(model.state_dict(), "electra."), config)
    weights = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    weights |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    return Pretrained(source, config, weights, tokenizer)


def check_state_fits(state: State, expected: State, origin: str) -> None:
    """Refuse a state whose names or shapes are not exactly `expected`'s, naming the first that differs."""
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"{origin}: weights of another model: "
            + (f"{len(missing)} missing, such as {missing[0]}" if missing else "")
            + ("; " if missing and unexpected else "")
            + (f"{len(unexpected)} that this model has not, such as {unexpected[0]}" if unexpected else "")
            + "; set the sizes under model: to those it was trained with"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{origin}: {name} has shape {list(state[name].shape)}, this model expects {list(tensor.shape)}; "
                "set the sizes under model: to those it was trained with"
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _take(state: State, name: str) -> Tensor:
    if name not in state:
        raise UserError(f"the transformers model has no weight {name}; expected that of an ELECTRA of these sizes")
    return state[name].detach().clone()


def _pad_rows(table: Tensor, config: EncoderConfig) -> Tensor:
    padding = table.new_zeros(config.padded_vocab_size - table.shape[0], *table.shape[1:])
    return torch.cat([table, padding])


def _checkpoint_globals() -> list[Any]:
    """Plain value types that Composer puts beside the tensors: times, NumPy's random state. None of them runs code."""
    return [
        datetime.timedelta,
        torch.torch_version.TorchVersion,
        np.ndarray,
        np.dtype,
        np.dtypes.UInt32DType,
        np.empty(0).__reduce__()[0],  # NumPy's own array constructor, whose home moved between versions 1 and 2
    ]
