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
    USAGE = "composer electra_composer/finetune.py yamls/classification.yaml [key=value …]"
    ARGUMENTS = load_config_from_command_line(FinetuneConfig, USAGE)

from electra_composer.errors import report_user_errors
from electra_composer.finetuning.runs import PlannedRun, run_all
from electra_composer.finetuning.task_models import Models
from electra_composer.finetuning.task_results import task_markdown, write_task_reports
from electra_composer.finetuning.task_run import train_task
from electra_composer.finetuning.task_start import CHECKS, CHECKS_OF_FILES, TaskJob
from electra_composer.signals import unwind
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
    models = Models(config, job.group, job.task)
    if check_only:
        processes.print(f"everything checked: {names}; nothing was written")
        return {}

    def report() -> dict[str, Any]:
        more = {
            "models": models.keep(job.store),
            "select": config.predict.select,
            "analysis": models.analysis_of_best(job.store),
            "notes": job.messages,
        }
        kind, score = job.task.kind, job.task.score
        return write_task_reports(job.store, job.group, config.results, kind, score, job.settings, more)

    def run_one(run: PlannedRun) -> None:
        processes.print(
            f"\nseed {run.seed}: {len(job.rows.train)} training, {len(job.rows.validation)} validation rows"
        )
        trained = train_task(
            config, job.source, job.task, job.rows, run, job.group, job.cpu_autocast, job.attention_path
        )
        models.save(trained, job.source, job.rows.max_seq_length)
        models.save_analysis(run.seed, trained.task.analysis(job.rows.validation, trained.outputs))
        record = {"group": job.group, "settings": job.settings, "source": job.source.name, **trained.record}
        job.store.add(record)
        report()
        score = "undefined" if record["score"] is None else f"{record['score']:.2f}"
        processes.print(f"{run.name}: {job.task.score} {score} after epoch {record['epoch']}; {job.progress()}")

    claims = os.path.join(models.folder, "claims")
    failed = run_all(job.plan, job.store, job.group, claims, run_one, processes.since, processes.print)
    if processes.rank > 0:
        return {}
    results = report()
    processes.print(f"\n{task_markdown(results, errors=False)}")
    if failed:
        lines = "\n".join(f"  seed {failure['seed']}: {failure['error']}" for failure in failed)
        print(f"{len(failed)} runs failed; rerun the same command to retry them:\n{lines}", file=sys.stderr, flush=True)
        sys.exit(1)
    return results


if __name__ == "__main__":
    # Workaround (tokenizers 0.22): warns in loader workers forked after the tokenizer has run, though they never use
    # it; goes when the warning waits for a use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    report_user_errors(main)(*ARGUMENTS)
