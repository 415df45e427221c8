"""Build the model of a pretraining run: networks, kernels, initial weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from composer.utils import dist
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.baselines import unigram_counts
from electra_composer.checkpoints.initial import initialise, read_initial
from electra_composer.checkpoints.weights import Checkpoint, special_ids
from electra_composer.compilers import missing_for_triton
from electra_composer.config import ObjectiveConfig, PretrainConfig
from electra_composer.errors import UserError
from electra_composer.model.kernels.attention import ExampleBound
from electra_composer.model.kernels.fused_layers import resolve_layer_kernels, use_layer_kernels
from electra_composer.model.kernels.masked_lm import resolve_implementation
from electra_composer.model.objectives import build_pretraining_model
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.storage.shard_folder import Meta, SplitCounts
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.determinism import describe_nondeterminism
from electra_composer.training.devices import fsdp_gradient_factor, resolve_device
from electra_composer.training.startup import microbatch_size

COUNTED_ROWS = 200_000
"""Training rows, evenly spaced, in which the tokens are counted for `objective.generator: unigram`, at most."""


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, cpu_autocast: bool) -> ElectraPretraining:
    """Build generator and discriminator with their losses."""
    electra = build_pretraining_model(
        config.model,
        config.objective,
        vocab_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
        max_seq_length=config.data.max_seq_length,
    )
    return ElectraPretraining(electra, cpu_autocast, fsdp_gradient_factor(config.trainer))


def count_words(config: PretrainConfig, model: ElectraPretraining, meta: Meta) -> None:
    """Give `objective.generator: unigram` the frequencies of the tokens in the training rows.

    Raises:
        UserError: the rows are not on this machine yet.
    """
    if config.objective.generator != "unigram":
        return
    counts = unigram_counts(config.data, meta, config.data.train_split, COUNTED_ROWS)
    if counts is None or not counts.any():
        raise UserError(
            "objective.generator=unigram counts the tokens of the training rows, which are not on this machine yet, or "
            "compressed; download and decompress them first, or set objective.generator=uniform"
        )
    assert model.model.distribution is not None
    model.model.distribution.set_counts(torch.from_numpy(counts))


def choose_kernels(config: PretrainConfig, model: ElectraPretraining, meta: Meta) -> None:
    """Choose the masked-LM and layer kernels and the attention path.

    Raises:
        UserError: `objective.masked_lm`, `trainer.layer_kernels` or `trainer.attention` does not run on this machine or
            with these sizes.
    """
    sizes = model.model.discriminator.config
    device = resolve_device(config.trainer)[0]
    choose_masked_lm(config, model, device)
    layer_kernels = resolve_layer_kernels(config.trainer.layer_kernels, "cuda" if device == "gpu" else "cpu")
    use_layer_kernels(model, layer_kernels)
    encoders = (model.model.encoder_of_generator.config, sizes)
    rows, length = microbatch_size(config.trainer), config.data.max_seq_length
    path, reason = choose_attention(config.trainer, encoders, rows, length)
    model.model.attention_path = path
    if path == "varlen":
        counts = meta.splits.get("train", SplitCounts())
        model.example_bound = ExampleBound(rows, length, counts.examples / max(1, counts.rows))
    print_once(f"attention: {path} ({reason})")
    unsteady = describe_nondeterminism(config.trainer, device, path, layer_kernels)
    if unsteady is not None:
        print_once(unsteady)


def choose_masked_lm(config: PretrainConfig, model: ElectraPretraining, device: str) -> None:
    """Check `objective.masked_lm`, and replace `auto` by `chunked` on a GPU machine that cannot run Triton.

    Raises:
        UserError: it does not run on this machine.
    """
    name, networks = config.objective.masked_lm, model.model
    missing = missing_for_triton() if device == "gpu" else None
    if missing is not None and name == "triton":
        raise UserError(
            f"objective.masked_lm is triton and the machine lacks {missing}; install it or set "
            "objective.masked_lm=chunked (slower)"
        )
    if missing is not None and name == "auto":
        name = "chunked"
        networks.objective = replace(networks.objective, masked_lm=name)
        print_once(f"masked_lm: chunked (the machine lacks {missing}; triton is faster)")
    device_type = "cuda" if device == "gpu" else "cpu"
    heads = {networks.mlm_head: networks.config_of_generator, networks.lm_head: networks.discriminator.config}
    for sizes in (sizes for head, sizes in heads.items() if head is not None):
        resolve_implementation(name, device_type, sizes.padded_vocab_size, sizes.embedding_size)


def check_kind(initial: Checkpoint, objective: ObjectiveConfig) -> None:
    """Refuse weights of another objective, the networks of which differ.

    Raises:
        UserError: naming both.
    """
    for name in ("kind", "generator"):
        found, wanted = getattr(initial.objective, name), getattr(objective, name)
        if found != wanted:
            raise UserError(
                f"{initial.path} was written with objective.{name}={found}, but this start has {wanted}: its weights "
                f"are of that objective; set objective.{name}={found}, or start with the networks they have in common "
                f"(checkpoints.load_path=null model.init_from={initial.path})"
            )


def load_initial_weights(config: PretrainConfig, model: ElectraPretraining, tokenizer: PreTrainedTokenizerFast) -> None:
    """Load the weights of `model.init_from`, if it is set.

    Raises:
        UserError: the networks cannot be read, or do not fit the configuration.
    """
    initial = read_initial(config.model.init_from, config.model.init_generator_from)
    if initial is None and config.objective.generator == "frozen":
        raise UserError(
            "objective.generator=frozen needs a generator to start from; set model.init_from to a run with "
            "objective.kind=mlm (docs/objectives.md)"
        )
    if initial is not None:
        print_once(f"initial weights: {initialise(model.model, config.model, tokenizer, initial)}")
    read_initial.cache_clear()  # free the networks' memory


def print_once(text: str) -> None:
    """Print on rank 0."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)
