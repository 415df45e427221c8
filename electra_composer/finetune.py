"""Finetune on your own task: `composer electra_composer/finetune.py yamls/classification.yaml [key=value …]`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import os
import sys
from typing import Any

from electra_composer.config_loading import load_config_from_command_line
from electra_composer.finetune_config import FinetuneConfig

if __name__ == "__main__":  # before the imports that take seconds
    USAGE = "electra finetune classification [key=value …]\n"
    USAGE += "composer electra_composer/finetune.py yamls/classification.yaml [key=value …]"
    ARGUMENTS = load_config_from_command_line(FinetuneConfig, USAGE)

from electra_composer.errors import report_user_errors
from electra_composer.finetuning.runs import PlannedRun, run_all
from electra_composer.finetuning.task_models import Models, best_model
from electra_composer.finetuning.task_results import task_markdown, write_task_reports
from electra_composer.finetuning.task_run import train_task
from electra_composer.finetuning.task_start import CHECKS, CHECKS_OF_FILES, TaskJob
from electra_composer.next_steps import describe_task
from electra_composer.predict import load_models, predict_table
from electra_composer.signals import unwind
from electra_composer.tasks.tables import Table
from electra_composer.training.devices import hide_unused_gpus
from electra_composer.training.startup import run_checks


@hide_unused_gpus
def main(config: FinetuneConfig, check_only: bool = False) -> dict[str, Any]:
    """Finetune one model per seed, score each on validation, keep the best, report, and predict the test set.

    Under `composer -n N` every process does complete runs on its own (see `finetuning/runs.py`).

    Args:
        config: see `finetune_config.py`.
        check_only: whether to end after the checks.

    Returns:
        Content of the results file; see :func:`electra_composer.finetuning.task_results.task_summary`.

    Raises:
        UserError: the configuration, the source or the data has an error. The results of earlier runs are on disk.
        SystemExit: with status 1, on rank 0, if a run failed; all other runs are done and reported.
    """
    job = TaskJob(config, check_only)
    names = run_checks(CHECKS, job)
    processes = job.processes
    unwind()
    with processes.rank_zero_first():
        names = f"{names}, {run_checks(CHECKS_OF_FILES, job)}"
    for message in job.messages:
        processes.print(message)
    processes.print(f"attention: {job.attention}")
    processes.print(f"{len(job.plan)} runs; results in {config.results}; {job.progress()}")
    if check_only:
        processes.print(f"everything checked: {names}; nothing was written")
        return {}
    models = Models(config, job.group, job.task)

    def run_one(run: PlannedRun) -> None:
        train, validation = len(job.rows.train), len(job.rows.validation)
        processes.print(f"\nseed {run.seed}: {train:,} training, {validation:,} validation rows")
        record = finetune_seed(job, models, run)
        score = "undefined" if record["score"] is None else f"{record['score']:.2f}"
        processes.print(f"{run.name}: {job.task.score} {score} after epoch {record['epoch']}; {job.progress()}")

    claims = os.path.join(models.folder, "claims")
    failed = run_all(job.plan, job.store, job.group, claims, run_one, processes.since, processes.print)
    if processes.rank > 0:
        return {}
    results = report(job, models)
    processes.print(f"\n{task_markdown(results, errors=False)}")
    predictions = predict_test(job) if "test" in job.splits and results["models"] else None
    folder = best_model(results, config.results)
    processes.print(describe_task(config.results, job.store.path, predictions, folder, job.task.kind))
    if failed:
        lines = "\n".join(f"  seed {failure['seed']}: {failure['error']}" for failure in failed)
        print(f"{len(failed)} runs failed; rerun the same command to retry them:\n{lines}", file=sys.stderr, flush=True)
        sys.exit(1)
    return results


def finetune_seed(job: TaskJob, models: Models, run: PlannedRun) -> dict[str, Any]:
    """Do one run: train, save the model and the analysis of its errors, record, report."""
    trained = train_task(
        job.config, job.source, job.task, job.rows, run, job.group, job.cpu_autocast, job.attention_path
    )
    models.save(trained, job.source, job.rows.max_seq_length)
    models.save_analysis(run.seed, trained.task.analysis(job.rows.validation, trained.outputs))
    record = {"group": job.group, "settings": job.settings, "source": job.source.name, **trained.record}
    job.store.add(record)
    report(job, models)
    return record


def report(job: TaskJob, models: Models) -> dict[str, Any]:
    """Write the results of the runs so far, and remove the models that are not to be kept."""
    config = job.config
    more = {
        "models": models.keep(job.store),
        "select": config.predict.select,
        "analysis": models.analysis_of_best(job.store),
        "notes": job.messages,
    }
    kind, score = job.task.kind, job.task.score
    return write_task_reports(job.store, job.group, config.results, kind, score, job.settings, more)


def predict_test(job: TaskJob) -> str:
    """Predict the test set with the selected models, and return the path of the predictions."""
    config, test = job.config, job.splits["test"]
    models = load_models(config.results, config.predict.select, config.trainer.device, None)
    table = test.table
    assert isinstance(table, Table)
    predict_table(models, table, test.columns, (), config.predict.file, config.trainer.device_eval_batch_size)
    return config.predict.file


if __name__ == "__main__":
    # Workaround (tokenizers 0.22): warns in loader workers forked after the tokenizer has run, though they never use
    # it; goes when the warning waits for a use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    report_user_errors(main)(*ARGUMENTS)
