"""Pretrain ELECTRA: `composer electra_composer/pretrain.py yamls/small.yaml [key=value …]`."""

from __future__ import annotations

from composer import Trainer
from composer.utils import dist

from electra_composer.batches.baselines import loss_without_context
from electra_composer.batches.checks import check_shards
from electra_composer.batches.shards import build_data_spec, read_data
from electra_composer.batches.streams import describe_streams
from electra_composer.checkpoints.remote import remote_copy
from electra_composer.checkpoints.resuming import exclusive_lock
from electra_composer.checkpoints.weights import check_state_fits, read_checkpoint, special_ids, tokenizer_files
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config_from_command_line, to_dict, to_yaml
from electra_composer.errors import UserError, report_user_errors
from electra_composer.faults import explain_failures
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.kernels.masked_lm import resolve_implementation
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.callbacks import RunRecord, TrainMetrics
from electra_composer.training.devices import choose_attention, fsdp_gradient_factor, resolve_device
from electra_composer.training.learning_watch import LearningWatch
from electra_composer.training.runs import (
    LATEST,
    build_trainer,
    check_run_folder,
    checkpoint_to_load,
    compile_errors_named,
    device_batch_size,
    microbatch_size,
    start,
)
from electra_composer.versions import check_versions
from electra_composer.vocabulary import load_tokenizer


def main(config: PretrainConfig) -> Trainer:
    """Pretrain as `config` says, from the start or from where an earlier run of the same folder stopped.

    Args:
        config: see config.py.

    Returns:
        The trainer after `fit`; `trainer.state.model` is the model, `trainer.state.eval_metrics` the last evaluation.

    Raises:
        UserError: anything about the configuration, the shards or the machine that the caller can mend.
    """
    check_versions()
    if config.trainer.max_duration is None:
        raise UserError("trainer.max_duration is null; pretraining needs a length, such as 1000000ba")
    check_run_folder(config)
    cpu_autocast = start(config)

    meta = read_data(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer or meta.tokenizer_folder)
    check_shards(meta, tokenizer, config.data.max_seq_length)
    model = ElectraPretraining(
        ElectraForPretraining(
            config.model,
            config.objective,
            vocab_size=len(tokenizer),
            special_ids=special_ids(tokenizer),
            max_seq_length=config.data.max_seq_length,
        ),
        cpu_autocast,
        fsdp_gradient_factor(config.trainer),
    )
    sizes = model.model.discriminator.config
    device_type = "cuda" if resolve_device(config.trainer)[0] == "gpu" else "cpu"
    resolve_implementation(config.objective.masked_lm, device_type, sizes.padded_vocab_size, sizes.embedding_size)
    path, reason = choose_attention(config.trainer, sizes, microbatch_size(config.trainer), config.data.max_seq_length)
    model.model.attention_path = path
    if dist.get_global_rank() == 0:
        print(f"attention: {path} ({reason})", flush=True)
    start_from = checkpoint_to_load(config)
    if start_from is not None:
        check_state_fits(read_checkpoint(start_from).state, model.model.state_dict(), start_from)
    train_data = build_data_spec(
        config.data, "train", device_batch_size(config.trainer), meta, config.seed, batch_transforms=model.count_batch
    )
    eval_data = build_data_spec(config.data, "eval", config.trainer.device_eval_batch_size, meta, config.seed)
    streams = describe_streams(config.data, meta, config.seed)
    if dist.get_global_rank() == 0 and streams is not None:
        print(streams, flush=True)
    loss_to_beat = loss_without_context(config.data, meta, config.objective)
    if dist.get_global_rank() == 0 and loss_to_beat is not None:
        print(f"MLM loss without context: {loss_to_beat:.2f} (word frequencies, and copying kept tokens)", flush=True)
    with (
        explain_failures(),
        exclusive_lock(config.checkpoints.folder),
        remote_copy(config.checkpoints, config.run_name, LATEST.format(rank=0)) as copy,
        compile_errors_named(),
    ):
        trainer = build_trainer(
            config,
            model,
            train_data,
            eval_data,
            config.trainer.max_duration,
            callbacks=[
                TrainMetrics(config.trainer.log_interval),
                LearningWatch(loss_to_beat),
                RunRecord(to_dict(config), to_yaml(config), config.checkpoints.folder, tokenizer_files(tokenizer)),
            ],
            copy=copy,
        )
        try:
            trainer.fit()
        except BaseException:  # a signal that ended the run is one: loggers get their last word, and let go of files
            trainer.close()
            raise
        trainer.close()
    return trainer


if __name__ == "__main__":
    report_user_errors(main)(
        load_config_from_command_line(
            PretrainConfig, "composer electra_composer/pretrain.py yamls/small.yaml [key=value …]"
        )
    )
