"""Load checkpoints and pretrained weights strictly and safely.

Composer's checkpoints are pickles. They are read without running code in them (safe_loading.py), and refused if they
need more.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from electra_composer.checkpoints.file_kinds import EXPECTED, describe_content
from electra_composer.checkpoints.reference_formats import TOKENIZER, infer_config, is_reference, read_reference
from electra_composer.checkpoints.safe_loading import read_file
from electra_composer.checkpoints.sharded import is_sharded, read_sharded
from electra_composer.checkpoints.transformers_folders import (
    class_of,
    describe_difference,
    load_transformers,
)
from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError, one_line
from electra_composer.foreign_files import HF_FOLDER, MASKED_LM, refuse_foreign
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
    mlm_head_from_transformers,
    pop_delta,
    rtd_head_from_transformers,
    under,
)
from electra_composer.vocabulary import load_tokenizer

LATEST = "latest-rank0.pt"  # link in a run's folder to its newest checkpoint


@dataclass
class Checkpoint:
    """Contents of a pretraining checkpoint."""

    path: str
    state: State  # of ElectraForPretraining
    config: dict[str, Any]  # resolved configuration of the run, in the keys of today
    tokenizer: PreTrainedTokenizerFast
    tokens: int | None = None  # read by the run until then, without padding

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.config["model"])

    @property
    def discriminator(self) -> EncoderConfig:
        return discriminator_config(self.model_config, len(self.tokenizer))

    @property
    def generator(self) -> EncoderConfig:
        return generator_config(self.model_config, len(self.tokenizer))

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective, with the defaults of its kind where a key is null or newer than the checkpoint."""
        return ObjectiveConfig(**self.config["objective"]).resolved()

    @property
    def described(self) -> str:
        """The kind of run, for messages."""
        return f"a run with objective.kind={self.objective.kind} objective.generator={self.objective.generator}"

    def build_model(self) -> ElectraForPretraining:
        """Build the pretraining model with these weights, in evaluation mode."""
        model = build_pretraining_model(
            self.model_config,
            self.objective,
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
    lm_head: State | None = None  # weights of its MLM head, where it predicts tokens
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
            saved = read_sharded(path)
        else:
            content = read_file(path)
            saved = content["state"]
        model_state, record = saved["model"], saved["callbacks"]["RunRecord"]
        tokens = saved.get("timestamp", {}).get("Timestamp", {}).get("token")
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
    return Checkpoint(path, state, config, tokenizer, tokens)


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
            transformers' `ElectraForPreTraining` or `ElectraModel`, or the name of one on the hub; of
            `ElectraForMaskedLM` what `export.py` wrote for a discriminator that predicts tokens. Weights are
            safetensors, or a pickle that `torch.load(weights_only=True)` reads.

    Raises:
        UserError: Not found, or not an ELECTRA discriminator: missing or unexpected weights other than the head's.
    """
    has_config = os.path.isfile(os.path.join(source, "config.json"))
    for exported in (os.path.join(source, "discriminator"), os.path.join(source, MASKED_LM)):
        if not has_config and os.path.isfile(os.path.join(exported, "config.json")):
            return load_source(exported)
    if is_reference(source):
        return _load_reference(source)
    is_file = source.endswith(".pt") or os.path.isfile(source)
    if is_file or is_sharded(source) or os.path.lexists(os.path.join(source, LATEST)):
        checkpoint = read_checkpoint(source)
        weights = {f"embeddings.{name}": t for name, t in discriminator_embeddings(checkpoint.state).items()}
        weights |= {f"encoder.{name}": t for name, t in under(checkpoint.state, "discriminator.").items()}
        rtd_head, lm_head = (under(checkpoint.state, head) or None for head in ("rtd_head.", "lm_head."))
        delta = pop_delta(under(checkpoint.state, "embeddings."))
        return Pretrained(source, checkpoint.discriminator, weights, checkpoint.tokenizer, rtd_head, lm_head, delta)
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
    """Convert the state of an `ElectraForPreTraining`, or of an `ElectraForMaskedLM`."""
    embeddings, encoder = encoder_from_transformers(under(state, "electra."), config)
    weights = {f"embeddings.{name}": tensor for name, tensor in embeddings.items()}
    weights |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    pretrained = Pretrained(source, config, weights, tokenizer)
    if has_head and "generator_lm_head.bias" in state:
        pretrained.lm_head = mlm_head_from_transformers(state, config)
    elif has_head:
        pretrained.rtd_head = rtd_head_from_transformers(state)
    return pretrained


def _load_transformers(source: str) -> Pretrained:
    config, state, tokenizer, missing = load_transformers(source, class_of(source))
    return _pretrained(source, config, state, tokenizer, has_head=not missing)


def check_state_fits(state: State, expected: State, origin: str) -> None:
    """Raise a UserError unless names and shapes equal those of `expected`; it names the first that differs."""
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"{origin}: weights of another model: {describe_difference(missing, unexpected)}; "
            "set the sizes under model: to those of its training"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{origin}: {name} has shape {list(state[name].shape)}, this model expects {list(tensor.shape)}; "
                "set the sizes under model: to those of its training"
            )
