"""Load networks from folders and hub repositories of transformers."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator

from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from electra_composer.errors import UserError, one_line
from electra_composer.foreign_files import EXPORTED_AS, MASKED_LM
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.weight_maps import State, encoder_config_of

log = logging.getLogger(__name__)

IGNORED = "embeddings.position_ids"  # 0, 1, 2, …; stored by transformers before 4.31, as in google/electra-*
FINETUNED_HEADS = ("classifier.", "qa_outputs.")  # of ElectraForSequenceClassification and the like


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


def class_of(source: str) -> type[PreTrainedModel]:
    """Return transformers' class of a discriminator: a masked language model if the folder was exported as one."""
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):  # said by load_transformers
        return ElectraForPreTraining
    return ElectraForMaskedLM if config.get(EXPORTED_AS) == MASKED_LM else ElectraForPreTraining


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
            f"{source}: not an ELECTRA {network} (weights: {describe_difference(missing, unexpected)}); expected an "
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


def describe_difference(missing: list[str], unexpected: list[str]) -> str:
    """Count missing and unexpected weights and name the first of each."""
    kinds = {"missing": missing, "unexpected": unexpected}
    return "; ".join(f"{len(names)} {kind}, such as {names[0]}" for kind, names in kinds.items() if names)
