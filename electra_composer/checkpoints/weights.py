"""Load checkpoints and pretrained weights strictly and safely.

Composer's checkpoints are pickles. They are read without running code in them (safe_loading.py), and refused if they
need more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from electra_composer.checkpoints.file_kinds import EXPECTED, describe_content
from electra_composer.checkpoints.reference_formats import TOKENIZER, infer_config, is_reference, read_reference
from electra_composer.checkpoints.safe_loading import read_file
from electra_composer.checkpoints.sharded import is_sharded, read_sharded
from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError, one_line
from electra_composer.foreign_files import HF_FOLDER, refuse_foreign
from electra_composer.former_keys import upgrade_model
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.objectives import build_pretraining_model
from electra_composer.model.sizes import discriminator_config, generator_config
from electra_composer.model.weight_maps import (
    State,
    discriminator_embeddings,
    encoder_config_of,
    encoder_from_transformers,
    pop_delta,
    rtd_head_from_transformers,
    under,
)
from electra_composer.vocabulary import load_tokenizer

log = logging.getLogger(__name__)

LATEST = "latest-rank0.pt"  # link in a run's folder to its newest checkpoint
IGNORED = "embeddings.position_ids"  # 0, 1, 2, …; stored by transformers before 4.31, as in google/electra-*
FINETUNED_HEADS = ("classifier.", "qa_outputs.")  # of ElectraForSequenceClassification and the like


@dataclass
class Checkpoint:
    """Contents of a pretraining checkpoint."""

    path: str
    state: State  # of ElectraForPretraining
    config: dict[str, Any]  # resolved configuration of the run, in the keys of today
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
        """Build the pretraining model with these weights, in evaluation mode."""
        model = build_pretraining_model(
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
    """A discriminator's body to finetune."""

    name: str
    encoder: EncoderConfig
    weights: State  # `embeddings.…` and `encoder.…` of ElectraForClassification
    tokenizer: PreTrainedTokenizerFast
    rtd_head: State | None = None  # weights of the discriminator's head; None if the source has none
    delta: State | None = None  # with `model.sharing: gdes`, what the tables differ in from the generator's


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint that `pretrain.py` wrote, without running code in it.

    Args:
        path: A .pt file, the folder of a sharded checkpoint, or the run folder of either.

    Raises:
        UserError: No such file, truncated, not written by pretrain.py, or readable by unsafe loading only.
    """
    if os.path.isdir(path) and os.path.lexists(os.path.join(path, LATEST)):
        path = os.path.join(path, LATEST)
    if not is_sharded(path):
        refuse_foreign(path, "a checkpoint of pretrain.py")
    content: Any = None
    try:
        if is_sharded(path):
            model_state, record = read_sharded(path)
        else:
            content = read_file(path)
            saved = content["state"]
            model_state, record = saved["model"], saved["callbacks"]["RunRecord"]
        config, tokenizer_files = record["config"], record["tokenizer_files"]
        config = {**config, "model": upgrade_model(config["model"], config["model"].get("embedding_size"))}
        # Workaround (torch 2.7): torch.compile puts `_orig_mod.` before parameter names; goes when state_dict omits it.
        state = {name.removeprefix("model.").replace("_orig_mod.", ""): tensor for name, tensor in model_state.items()}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        found = "a sharded checkpoint of another program" if is_sharded(path) else describe_content(content)
        raise UserError(f"{path}: {found}; {EXPECTED}") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, text in tokenizer_files.items():
                with open(os.path.join(folder, os.path.basename(name)), "w", encoding="utf-8") as file:
                    file.write(text)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: the tokenizer in it cannot be read: {one_line(error, 300)}") from error
    return Checkpoint(path, state, config, tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """Return the ids that masking needs; vocabulary.py ensures that the tokenizer has them."""
    return SpecialIds(*(getattr(tokenizer, f"{role}_token_id") for role in ("pad", "cls", "sep", "mask", "unk")))


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return the files of a tokenizer, name → text, as they are stored in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        # tokenizer.json is complete; the others are BERT's vocab.txt, or binary files of slow tokenizers.
        has_text = os.path.splitext(tokenizer.vocab_files_names.get("vocab_file", ""))[1] == ".txt"
        tokenizer.save_pretrained(folder, legacy_format=None if has_text else False)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def load_source(source: str) -> Pretrained:
    """Load a discriminator to finetune.

    Args:
        source: A checkpoint of pretrain.py (a .pt, the folder of a sharded one, or the run folder of either), a folder
            of `export.py`, a checkpoint of the reference repositories (reference_formats.py), a folder of
            transformers' `ElectraForPreTraining` or `ElectraModel`, or the name of one on the hub. Weights are
            safetensors, or a pickle that `torch.load(weights_only=True)` reads.

    Raises:
        UserError: Not found, or not an ELECTRA discriminator: missing or unexpected weights other than the head's.
    """
    has_config, exported = os.path.isfile(os.path.join(source, "config.json")), os.path.join(source, "discriminator")
    if not has_config and os.path.isfile(os.path.join(exported, "config.json")):
        return load_source(exported)
    if is_reference(source):
        return _load_reference(source)
    is_file = source.endswith(".pt") or os.path.isfile(source)
    if is_file or is_sharded(source) or os.path.lexists(os.path.join(source, LATEST)):
        checkpoint = read_checkpoint(source)
        weights = {f"embeddings.{name}": t for name, t in discriminator_embeddings(checkpoint.state).items()}
        weights |= {f"encoder.{name}": t for name, t in under(checkpoint.state, "discriminator.").items()}
        head, delta = under(checkpoint.state, "rtd_head."), pop_delta(under(checkpoint.state, "embeddings."))
        return Pretrained(source, checkpoint.discriminator, weights, checkpoint.tokenizer, head, delta)
    refuse_foreign(source, f"a checkpoint of pretrain.py, or {HF_FOLDER}")
    if not os.path.exists(source) and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: no such file or folder; expected a checkpoint, a Hugging Face folder or a hub name")
    if os.path.isdir(source) and not has_config:
        raise UserError(
            f"{source}: a folder with neither latest-rank0.pt (of pretrain.py) nor config.json (Hugging Face)"
        )
    return _load_transformers(source)


def _load_reference(source: str) -> Pretrained:
    reference = read_reference(source)
    state, config = reference.discriminator, encoder_config_of(infer_config(reference.discriminator, source))
    return _pretrained(source, config, state, reference.tokenizer or load_tokenizer(TOKENIZER), has_head=True)


def _pretrained(
    source: str, config: EncoderConfig, state: State, tokenizer: PreTrainedTokenizerFast, has_head: bool
) -> Pretrained:
    """Convert the state of an `ElectraForPreTraining`."""
    embeddings, encoder = encoder_from_transformers(under(state, "electra."), config)
    weights = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    weights |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    return Pretrained(source, config, weights, tokenizer, rtd_head_from_transformers(state) if has_head else None)


# Workaround (transformers 4.57): from_pretrained logs a warning about missing and unexpected weights and has no option
# against it; goes when it has one.
@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _load_transformers(source: str) -> Pretrained:
    config, state, tokenizer, missing = load_transformers(source, ElectraForPreTraining)
    return _pretrained(source, config, state, tokenizer, has_head=not missing)


def load_transformers(
    source: str, model_class: type[PreTrainedModel]
) -> tuple[EncoderConfig, State, PreTrainedTokenizerFast, list[str]]:
    """Load a network of transformers from a folder or the hub.

    Returns:
        Its sizes; its fp32 weights by transformers' names; its tokenizer; the names of the weights that are missing,
        which can only be those of the head.

    Raises:
        UserError: not found, or not this network: missing or unexpected weights other than the head's.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        # transformers also loads an `ElectraModel`, the weights of which lack the prefix `electra.`.
        with _quiet_transformers():  # missing and unexpected weights are checked below
            model, loading = model_class.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{source}: neither a checkpoint, nor a Hugging Face folder, nor a model on the hub: {one_line(error, 300)}"
        ) from error
    unexpected = sorted(name for name in loading["unexpected_keys"] if not name.endswith(IGNORED))
    if heads := [name for name in unexpected if name.startswith(FINETUNED_HEADS)]:
        log.warning("%s: a finetuned model; its head (%s) is not used", source, heads[0].partition(".")[0])
        unexpected = [name for name in unexpected if name not in heads]
    missing = sorted(name for name in loading["missing_keys"] if name.startswith("electra."))
    if missing or unexpected:
        network = "generator" if model_class is ElectraForMaskedLM else "discriminator"
        raise UserError(
            f"{source}: not an ELECTRA {network} (weights: {_describe(missing, unexpected)}); expected an "
            f"{model_class.__name__} or ElectraModel"
        )
    config = encoder_config_of(model.config)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, its model embeddings for {config.vocab_size}; "
            "give a folder with a model and its own tokenizer"
        )
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}  # some are stored in fp16
    return config, state, tokenizer, sorted(loading["missing_keys"])


def check_state_fits(state: State, expected: State, origin: str) -> None:
    """Raise a UserError unless names and shapes equal those of `expected`; it names the first that differs."""
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"{origin}: weights of another model: {_describe(missing, unexpected)}; "
            "set the sizes under model: to those of its training"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{origin}: {name} has shape {list(state[name].shape)}, this model expects {list(tensor.shape)}; "
                "set the sizes under model: to those of its training"
            )


def _describe(missing: list[str], unexpected: list[str]) -> str:
    """Count missing and unexpected weights and name the first of each."""
    kinds = {"missing": missing, "unexpected": unexpected}
    return "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names)
