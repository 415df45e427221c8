"""Pretrain ELECTRA: `composer electra_composer/pretrain.py yamls/small.yaml [key=value …]`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import os
from typing import Any

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config_from_command_line, to_dict, to_yaml

if __name__ == "__main__":  # before the imports that take seconds

    def sizes_of_source(config: Any) -> dict[str, Any]:
        """Return the sizes that follow from `model.init_from`, by the paths of their keys."""
        # Without a generator its size has no meaning, and no file needs to have it.
        has_no_generator = config.objective.kind == "mlm" or config.objective.generator in ("uniform", "unigram")
        sizes = {"model.generator_size": 1.0} if has_no_generator else {}
        if config.model.init_from is None and config.model.init_generator_from is None:
            return sizes
        from electra_composer.training.preparation import initial_sizes

        return sizes | initial_sizes(config)

    USAGE = "electra pretrain small [key=value …]\n"
    USAGE += "composer electra_composer/pretrain.py yamls/small.yaml [key=value …]"
    ARGUMENTS = load_config_from_command_line(PretrainConfig, USAGE, sizes_of_source)

from composer import Trainer
from composer.utils import dist

from electra_composer.checkpoints.remote import remote_copy
from electra_composer.checkpoints.resuming import exclusive_lock
from electra_composer.checkpoints.weights import tokenizer_files
from electra_composer.errors import one_line, report_user_errors
from electra_composer.faults import explain_failures
from electra_composer.model.pseudo_likelihood import KINDS as SCORING_KINDS
from electra_composer.next_steps import describe_end, export, finetune, preview, score
from electra_composer.training.callbacks import RunRecord, TrainMetrics
from electra_composer.training.checkpointing import LATEST_OF_RANK_0
from electra_composer.training.compilation import explain_compile_errors
from electra_composer.training.determinism import explain_nondeterministic_operators
from electra_composer.training.devices import hide_unused_gpus
from electra_composer.training.history import RunHistory
from electra_composer.training.learning_watch import LearningWatch
from electra_composer.training.model_setup import print_once
from electra_composer.training.preparation import CHECKS, Prepared, duration_of
from electra_composer.training.startup import run_checks
from electra_composer.training.trainer import build_trainer


@hide_unused_gpus
@explain_failures()
def main(config: PretrainConfig, check_only: bool = False) -> Trainer | None:
    """Pretrain from scratch, or resume an earlier run in the same folder.

    Args:
        config: see config.py.
        check_only: whether to end after the checks of :data:`CHECKS`.

    Returns:
        The trainer after `fit`: `trainer.state.model` is the model, `trainer.state.eval_metrics` the last evaluation.
        None with `check_only`.

    Raises:
        UserError: an error in the configuration, the shards or the machine that the caller can fix.
    """
    prepared = Prepared(config, check_only)
    names = run_checks(CHECKS, prepared)
    if check_only:
        print_once(f"everything checked: {names}; nothing was written")
        return None
    with (
        exclusive_lock(config.checkpoints.folder),
        remote_copy(config.checkpoints, config.run_name, LATEST_OF_RANK_0) as copy,
        explain_compile_errors(),
        explain_nondeterministic_operators(),
    ):
        files = tokenizer_files(prepared.tokenizer)
        history = RunHistory(config.checkpoints.folder, config.checkpoints.overwrite)
        record = RunRecord(to_dict(config), to_yaml(config), config.checkpoints.folder, files)
        trainer = build_trainer(
            config,
            prepared.model,
            prepared.train_data,
            prepared.eval_data,
            duration_of(config),
            callbacks=[
                TrainMetrics(config.trainer.log_interval, prepared.model.model.stats),
                LearningWatch(prepared.baseline),
                record,
                history,
            ],
            copy=copy,
        )
        try:
            trainer.fit()
        finally:  # also after the SystemExit of a signal, so that loggers finish and close their files
            trainer.close()
    write_report(config)
    print_once(describe_run(config))
    return trainer


def write_report(config: PretrainConfig) -> None:
    """Write the report of the run into its folder, on rank 0, or say in one line why not."""
    if not config.report or "metrics_file" not in config.loggers or dist.get_global_rank() != 0:
        return
    try:
        from electra_composer.report import write_report_of_run  # imported here, because Bokeh takes a second
    except ImportError as error:  # an installation older than the report
        print(f"no report was written: {one_line(error)}; install the package again", flush=True)
    else:
        write_report_of_run(config.checkpoints.folder)


def describe_run(config: PretrainConfig) -> str:
    """Describe where the run's results are, and the commands that come next."""
    folder, name, data = config.checkpoints.folder, config.run_name, config.data
    names = (LATEST_OF_RANK_0, "metrics.jsonl", "report.html", "tensorboard")
    files = {file: os.path.join(folder, file) for file in names}
    there = {file: path for file, path in files.items() if os.path.exists(path)}
    newest = there.get(LATEST_OF_RANK_0)
    shown = data.path if newest and data.remote is None and not data.streams else None
    return describe_end(
        {
            "run folder": folder,
            "newest checkpoint": newest and os.path.join(folder, os.path.basename(os.path.realpath(newest))),
            "metrics": there.get("metrics.jsonl"),
            "report": there.get("report.html") if config.report else None,
        },
        {
            "finetune on GLUE": newest and finetune(folder, name, config.model.max_positions),
            "export for transformers": newest and export(folder, name),
            "score sentences": (newest and config.objective.kind in SCORING_KINDS and score(folder)) or None,
            "see the models' predictions": shown and preview(shown, "--checkpoint", folder),
            "see the curves": there.get("tensorboard") and ["tensorboard", "--logdir", there["tensorboard"]],
        },
    )


if __name__ == "__main__":
    report_user_errors(main)(*ARGUMENTS)
