"""Pretrain ELECTRA: `composer electra_composer/pretrain.py yamls/small.yaml [key=value …]`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.baselines import loss_without_context
from electra_composer.batches.checks import check_shards
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.batches.streams import describe_streams
from electra_composer.checkpoints.initial import initialise, read_initial
from electra_composer.checkpoints.remote import remote_copy
from electra_composer.checkpoints.resuming import exclusive_lock
from electra_composer.checkpoints.weights import check_state_fits, read_checkpoint, special_ids, tokenizer_files
from electra_composer.compilers import missing_for_triton
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config_from_command_line, to_dict, to_yaml
from electra_composer.errors import UserError, report_user_errors
from electra_composer.faults import explain_failures
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.kernels.attention import ExampleBound
from electra_composer.model.kernels.fused_layers import resolve_layer_kernels, use_layer_kernels
from electra_composer.model.kernels.masked_lm import resolve_implementation
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.storage.shard_folder import Meta, SplitCounts
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.callbacks import RunRecord, TrainMetrics
from electra_composer.training.checkpointing import LATEST_OF_RANK_0, check_run_folder, checkpoint_to_load
from electra_composer.training.compilation import explain_compile_errors
from electra_composer.training.determinism import describe_nondeterminism, explain_nondeterministic_operators
from electra_composer.training.devices import fsdp_gradient_factor, resolve_device
from electra_composer.training.learning_watch import LearningWatch
from electra_composer.training.startup import device_batch_size, microbatch_size, start
from electra_composer.training.trainer import build_trainer
from electra_composer.versions import check_versions
from electra_composer.vocabulary import load_tokenizer


def main(config: PretrainConfig) -> Trainer:
    """Pretrain from scratch, or resume an earlier run in the same folder.

    Args:
        config: see config.py.

    Returns:
        The trainer after `fit`: `trainer.state.model` is the model, `trainer.state.eval_metrics` the last evaluation.

    Raises:
        UserError: an error in the configuration, the shards or the machine that the caller can fix.
    """
    check_versions()
    if config.trainer.max_duration is None:
        raise UserError("trainer.max_duration is null; pretraining needs a duration, such as 1000000ba")
    check_run_folder(config)
    cpu_autocast = start(config)
    meta = read_data(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer or meta.tokenizer_folder)
    check_shards(meta, tokenizer, config.data.max_seq_length)
    model = build_model(config, tokenizer, cpu_autocast)
    choose_kernels(config, model, meta)
    load_initial_weights(config, model, tokenizer)
    train_data, eval_data = build_data(config, meta, model)
    baseline = mlm_baseline(config, meta)
    with (
        explain_failures(),
        exclusive_lock(config.checkpoints.folder),
        remote_copy(config.checkpoints, config.run_name, LATEST_OF_RANK_0) as copy,
        explain_compile_errors(),
        explain_nondeterministic_operators(),
    ):
        trainer = build_trainer(
            config,
            model,
            train_data,
            eval_data,
            config.trainer.max_duration,
            callbacks=[
                TrainMetrics(config.trainer.log_interval),
                LearningWatch(baseline),
                RunRecord(to_dict(config), to_yaml(config), config.checkpoints.folder, tokenizer_files(tokenizer)),
            ],
            copy=copy,
        )
        try:
            trainer.fit()
        finally:  # also after the SystemExit of a signal, so that loggers finish and close their files
            trainer.close()
    return trainer


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, cpu_autocast: bool) -> ElectraPretraining:
    """Build generator and discriminator with their losses."""
    electra = ElectraForPretraining(
        config.model,
        config.objective,
        vocab_size=len(tokenizer),
        special_ids=special_ids(tokenizer),
        max_seq_length=config.data.max_seq_length,
    )
    return ElectraPretraining(electra, cpu_autocast, fsdp_gradient_factor(config.trainer))


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
    name, sizes = config.objective.masked_lm, model.model.discriminator.config
    missing = missing_for_triton() if device == "gpu" else None
    if missing is not None and name == "triton":
        raise UserError(
            f"objective.masked_lm is triton and the machine lacks {missing}; install it or set "
            "objective.masked_lm=chunked (slower)"
        )
    if missing is not None and name == "auto":
        name = "chunked"
        model.model.objective = replace(config.objective, masked_lm=name)
        print_once(f"masked_lm: chunked (the machine lacks {missing}; triton is faster)")
    device_type = "cuda" if device == "gpu" else "cpu"
    resolve_implementation(name, device_type, sizes.padded_vocab_size, sizes.embedding_size)


def load_initial_weights(config: PretrainConfig, model: ElectraPretraining, tokenizer: PreTrainedTokenizerFast) -> None:
    """Load the weights of `model.init_from`, unless there is a checkpoint to start from, which is checked instead.

    Raises:
        UserError: the checkpoint is broken or of other sizes, or the networks do not fit the configuration.
    """
    path = checkpoint_to_load(config)
    if path is not None:
        check_state_fits(read_checkpoint(path).state, model.model.state_dict(), path)
    elif (initial := read_initial(config.model.init_from, config.model.init_generator_from)) is not None:
        print_once(f"initial weights: {initialise(model.model, config.model, tokenizer, initial)}")
    read_initial.cache_clear()  # free the networks' memory


def initial_sizes(config: Any) -> dict[str, Any]:
    """Return the sizes that follow from `model.init_from`, by the paths of their keys."""
    initial = read_initial(config.model.init_from, config.model.init_generator_from)
    return {} if initial is None else {f"model.{name}": value for name, value in initial.sizes().items()}


def build_data(config: PretrainConfig, meta: Meta, model: ElectraPretraining) -> tuple[DataSpec, DataSpec]:
    """Build the training and the evaluation loader."""
    data, seed, rows = config.data, config.seed, device_batch_size(config.trainer)
    train_data = build_data_spec(data, "train", rows, meta, seed, batch_transforms=model.count_batch)
    eval_data = build_data_spec(data, "eval", config.trainer.device_eval_batch_size, meta, seed)
    streams = describe_streams(data, meta, seed)
    if streams is not None:
        print_once(streams)
    return train_data, eval_data


def mlm_baseline(config: PretrainConfig, meta: Meta) -> float | None:
    """Compute the MLM loss of a generator that ignores context; None if the training rows are not on disk yet."""
    loss = loss_without_context(config.data, meta, config.objective)
    if loss is not None:
        print_once(f"MLM loss without context: {loss:.2f} (word frequencies, and copying kept tokens)")
    return loss


def print_once(text: str) -> None:
    """Print on rank 0."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    report_user_errors(main)(
        load_config_from_command_line(
            PretrainConfig, "composer electra_composer/pretrain.py yamls/small.yaml [key=value …]", initial_sizes
        )
    )
