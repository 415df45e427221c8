"""Finetune on GLUE: `composer electra_composer/glue.py yamls/glue.yaml [key=value …]`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import os
import sys
from typing import Any

from electra_composer.config_loading import load_config_from_command_line
from electra_composer.glue_config import GlueConfig

if __name__ == "__main__":  # before the imports that take seconds
    USAGE = "electra glue glue [key=value …]\n"
    USAGE += "composer electra_composer/glue.py yamls/glue.yaml [key=value …]"
    ARGUMENTS = load_config_from_command_line(GlueConfig, USAGE)

from electra_composer.errors import report_user_errors
from electra_composer.finetuning.one_run import finetune
from electra_composer.finetuning.predictions import submission_files, submission_problems, write_submission
from electra_composer.finetuning.report import markdown
from electra_composer.finetuning.results import summary, write_reports
from electra_composer.finetuning.runs import PlannedRun, duration, run_all
from electra_composer.finetuning.start import CHECKS, CHECKS_OF_FILES, Job
from electra_composer.next_steps import describe_scores
from electra_composer.signals import unwind
from electra_composer.training.devices import hide_unused_gpus
from electra_composer.training.startup import run_checks


@hide_unused_gpus
def main(config: GlueConfig, check_only: bool = False) -> dict[str, Any]:
    """Finetune one model per task and seed, score each on the task's dev set, report, and predict the test sets.

    Under `composer -n N` every process does complete runs on its own (see `finetuning/runs.py`).

    Args:
        config: see `config.py`.
        check_only: whether to end after the checks.

    Returns:
        Content of the results file; see :func:`electra_composer.finetuning.results.summary`. Scores are multiplied by
        100.

    Raises:
        UserError: the configuration, the source or the data has an error. The results of earlier runs are on disk.
        SystemExit: with status 1, on rank 0, if a run failed; all other runs are done and reported.
    """
    job = Job(config, check_only)
    names = run_checks(CHECKS, job)
    processes, config = job.processes, job.config
    unwind()
    with processes.rank_zero_first():
        names = f"{names}, {run_checks(CHECKS_OF_FILES, job)}"
    processes.print(f"attention: {job.attention}")
    processes.print(f"{len(job.plan)} runs; results in {config.results}; {job.progress()}")
    if check_only:
        processes.print(f"everything checked: {names}; nothing was written")
        return summary(job.store.runs(job.group), job.settings, job.group)

    def run_one(run: PlannedRun) -> None:
        data = job.data[run.task.name]
        start_from = f" from {run.starts_from.name}" if run.starts_from else ""
        processes.print(
            f"\n{run.task.folder}, seed {run.seed}{start_from}: {len(data.train)} training, {len(data.dev['dev'])} dev "
            "examples"
        )
        record = finetune(config, job.source, run, data, job.files, job.cpu_autocast, job.attention_path)
        job.store.add({"group": job.group, "settings": job.settings, "source": job.source.name, **record})
        write_reports(job.store, job.group, config.results)
        processes.print(f"{run.name}: {describe(record)}; {job.progress()}")

    failed = run_all(job.plan, job.store, job.group, job.files.claims, run_one, processes.since, processes.print)
    if processes.rank > 0:
        return summary(job.store.runs(job.group), job.settings, job.group)
    results = write_reports(job.store, job.group, config.results, job.settings)
    processes.print(f"\n{markdown(results)}")
    if config.predict.enabled:
        predict(job)
    predictions = config.predict.file if config.predict.enabled else None
    processes.print(describe_scores(config.results, job.store.path, predictions, config.model.source))
    if failed:
        runs = "\n".join(f"  {failure['task']}-seed{failure['seed']}: {failure['error']}" for failure in failed)
        print(f"{len(failed)} runs failed; rerun the same command to retry them:\n{runs}", file=sys.stderr, flush=True)
        sys.exit(1)
    return results


def predict(job: Job) -> None:
    """Write the submission of the selected runs, and print which files it lacks."""
    config = job.config
    runs = [run for run in job.store.runs(job.group) if run["seed"] in config.seeds]
    files = submission_files(job.tasks, runs, config.predict.select, job.files.logits)
    write_submission(config.predict.file, files)
    print(f"predictions of {len(files)} test sets ({config.predict.select}): {config.predict.file}", flush=True)
    if (missing := submission_problems(files)) is not None:
        print(f"the GLUE server expects a complete submission: {missing}", flush=True)


def describe(record: dict[str, Any]) -> str:
    """Describe a finished run: score, collapse, duration."""
    score = "undefined" if record["score"] is None else f"{record['score']:.1f}"
    return f"{score}{', collapsed' if record['collapsed'] else ''} in {duration(record['seconds'])}"


if __name__ == "__main__":
    # Workaround (tokenizers 0.22): warns in loader workers forked after the tokenizer has run, though they never use
    # it; goes when the warning waits for a use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    report_user_errors(main)(*ARGUMENTS)
