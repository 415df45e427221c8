"""Finetune on GLUE: `composer electra_composer/glue.py yamls/glue.yaml [key=value …]`."""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

from electra_composer.checkpoints.weights import Pretrained, load_source
from electra_composer.config import GlueConfig, TaskSettings
from electra_composer.config_loading import load_config_from_command_line, nearest
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetune.data import encode_split
from electra_composer.finetune.one_run import Encoded, RunFiles, TaskData, examples_seen, finetune, rehearse, test_sets
from electra_composer.finetune.predictions import (
    check_indices,
    check_select,
    load_logits,
    submission_files,
    submission_problems,
    write_submission,
)
from electra_composer.finetune.ranking import rank_split
from electra_composer.finetune.report import markdown
from electra_composer.finetune.results import describe_source, group_of, open_store, summary, write_reports
from electra_composer.finetune.runs import PlannedRun, Processes, duration, key_of, make_plan, run_all, seconds_left
from electra_composer.finetune.store import RunStore, store_path
from electra_composer.finetune.tasks import TASKS, Task, find_task
from electra_composer.next_steps import describe_scores
from electra_composer.signals import unwind
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.devices import resolve_device
from electra_composer.training.startup import microbatch_size, start
from electra_composer.training.times import parse_time
from electra_composer.versions import check_versions


def main(config: GlueConfig) -> dict[str, Any]:
    """Finetune one model per task and seed, score each on the task's dev set, report, and predict the test sets.

    Under `composer -n N` every process does complete runs on its own (see `finetune/runs.py`).

    Args:
        config: see `config.py`.

    Returns:
        Content of the results file; see :func:`electra_composer.finetune.results.summary`. Scores are multiplied by
        100.

    Raises:
        UserError: the configuration, the source or the data has an error. The results of earlier runs are on disk.
        SystemExit: with status 1, on rank 0, if a run failed; all other runs are done and reported.
    """
    check_versions()
    tasks, config = check_config(config)
    device = resolve_device(config.trainer)[0]
    processes = Processes.from_launcher()
    processes.init_process_group(device)
    cpu_autocast = start(config, processes.on_this_machine)
    unwind()
    with processes.rank_zero_first():
        job = prepare(config, tasks, processes)
    processes.print(f"attention: {job.attention}")
    processes.print(f"{len(job.plan)} runs; results in {config.results}; {job.progress(processes.count)}")

    def run_one(run: PlannedRun) -> None:
        data = job.data[run.task.name]
        start_from = f" from {run.starts_from.name}" if run.starts_from else ""
        processes.print(
            f"\n{run.task.folder}, seed {run.seed}{start_from}: {len(data.train)} training, {len(data.dev['dev'])} dev "
            "examples"
        )
        record = finetune(config, job.source, run, data, job.files, cpu_autocast, job.attention_path)
        job.store.add({"group": job.group, "settings": job.settings, "source": job.source.name, **record})
        write_reports(job.store, job.group, config.results)
        processes.print(f"{run.name}: {describe(record)}; {job.progress(processes.count)}")

    failed = run_all(job.plan, job.store, job.group, job.files.claims, run_one, processes.since, processes.print)
    if processes.rank > 0:
        return summary(job.store.runs(job.group), job.settings, job.group)
    results = write_reports(job.store, job.group, config.results, job.settings)
    processes.print(f"\n{markdown(results)}")
    if config.predict.enabled:
        predict(config, tasks, job)
    predictions = config.predict.file if config.predict.enabled else None
    processes.print(describe_scores(config.results, job.store.path, predictions, config.model.source))
    if failed:
        runs = "\n".join(f"  {failure['task']}-seed{failure['seed']}: {failure['error']}" for failure in failed)
        print(f"{len(failed)} runs failed; rerun the same command to retry them:\n{runs}", file=sys.stderr, flush=True)
        sys.exit(1)
    return results


@dataclass
class Job:
    """State shared by the runs.

    Attributes:
        attention_path: see :func:`choose_attention`.
        attention: the path and the reason for it.
        data: task name → encoded data; tasks with all runs finished are left out.
    """

    source: Pretrained
    attention_path: str
    attention: str
    group: str
    settings: dict[str, Any]
    store: RunStore
    files: RunFiles
    data: dict[str, TaskData]
    plan: list[PlannedRun]

    def progress(self, processes: int) -> str:
        """Describe the number of finished runs and the time left."""
        keys = {run.key for run in self.plan}
        done = [run for run in self.store.runs(self.group) if key_of(run) in keys]
        left = seconds_left(self.plan, done, processes)
        time = f", about {duration(left)} left" if left else ""
        return f"{len(done)} of {len(keys)} runs done{time}"


def prepare(config: GlueConfig, tasks: list[Task], processes: Processes) -> Job:
    """Load, check and tokenize everything, so that an error in any task is raised before the first run."""
    source = load_source(config.model.source)
    if config.data.max_seq_length > source.encoder.max_positions:
        raise UserError(
            f"data.max_seq_length is {config.data.max_seq_length}, but {source.name} has "
            f"{source.encoder.max_positions} positions; expected at most that many"
        )
    attention_path, reason = choose_attention(
        config.trainer, (source.encoder,), microbatch_size(config.trainer), config.data.max_seq_length
    )
    group, settings = group_of(config, describe_source(source, config.model.random_init))
    trained = [task for task in tasks if task.trained_by is None]
    for task in trained:
        rehearse(config, source, task)
    # Only rank 0 may discard earlier runs; when the other ranks open the record, it may have new ones.
    store = open_store(config, group) if processes.rank == 0 else RunStore(store_path(config.results))
    files = RunFiles(os.path.join(os.path.dirname(config.results), group))
    done = {key_of(run): run for run in store.runs(group)}
    data, sizes = {}, {}
    for task in trained:
        if all((task.name, seed) in done for seed in config.seeds):
            sizes[task.name] = done[task.name, config.seeds[0]]["train_examples"]
        else:
            data[task.name] = read_task(config, source, task, tasks, processes.rank == 0)
            sizes[task.name] = len(data[task.name].train)
    examples = {task.name: examples_seen(config, task, sizes[task.name]) for task in trained}
    plan = make_plan(trained, config.seeds, examples, config.intermediate)
    check_files(config, [run for run in plan if run.key in done], files)
    return Job(source, attention_path, f"{attention_path} ({reason})", group, settings, store, files, data, plan)


def read_task(config: GlueConfig, source: Pretrained, task: Task, tasks: list[Task], progress: bool) -> TaskData:
    """Encode the training and dev examples of a task, and the test examples that its runs predict."""
    settings = config.data

    def read(of: Task, split: str) -> Encoded:
        common = of, split, settings.path, source.tokenizer, settings.max_seq_length
        limit, seed = config.max_train_examples, config.seed
        if of.ranked:
            return rank_split(*common, limit=limit, seed=seed)
        show = progress and config.trainer.progress_bar
        return encode_split(*common, settings.cache, limit=limit, seed=seed, progress=show)

    test = {}
    if config.predict.enabled:
        for name, (of, split) in test_sets(task, tasks).items():
            test[name] = read(of, split)
            indices = test[name].indices
            assert indices is not None
            check_indices(indices, f"{of.folder} {split}")
    return TaskData(read(task, "train"), {split: read(task, split) for split in task.dev_splits}, test)


def check_files(config: GlueConfig, done: list[PlannedRun], files: RunFiles) -> None:
    """Check that finished runs have left the files that are needed: logits to predict from, weights to start from.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    for run in done:
        if config.predict.enabled and run.task.submission:
            load_logits(files.logits(run.name))
        if config.intermediate and run.task.name == "mnli" and not os.path.isfile(files.weights(run.name)):
            raise UserError(
                f"{files.weights(run.name)}: no such file, but runs of RTE, MRPC and STS-B start from it; "
                "set another results=… to repeat the MNLI runs"
            )


def predict(config: GlueConfig, tasks: list[Task], job: Job) -> None:
    """Write the submission of the selected runs, and print which files it lacks."""
    runs = [run for run in job.store.runs(job.group) if run["seed"] in config.seeds]
    files = submission_files(tasks, runs, config.predict.select, job.files.logits)
    write_submission(config.predict.file, files)
    print(f"predictions of {len(files)} test sets ({config.predict.select}): {config.predict.file}", flush=True)
    if (missing := submission_problems(files)) is not None:
        print(f"the GLUE server expects a complete submission: {missing}", flush=True)


def describe(record: dict[str, Any]) -> str:
    """Describe a finished run: score, collapse, duration."""
    score = "undefined" if record["score"] is None else f"{record['score']:.1f}"
    return f"{score}{', collapsed' if record['collapsed'] else ''} in {duration(record['seconds'])}"


def check_config(config: GlueConfig) -> tuple[list[Task], GlueConfig]:
    """Check the configuration; return its tasks without duplicates, and itself with `task_settings` keyed by task name.

    Raises:
        UserError: a task is unknown, there is none, or a setting is out of range or not supported in finetuning.
    """
    names = list(dict.fromkeys(find_task(name).name for name in config.tasks))
    if not names:
        raise UserError("tasks is empty; expected names such as [cola, sst2]")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or not all(0 <= s < 2**32 for s in config.seeds):
        raise UserError(f"seeds is {config.seeds}; expected different integers in [0, 2**32), one per run")
    if config.max_train_examples is not None and config.max_train_examples < 1:
        raise UserError(f"max_train_examples is {config.max_train_examples}; expected at least 1, or null for all")
    if config.checkpoints.load_path is not None:
        raise UserError("checkpoints.load_path applies to pretraining only; set model.source instead")
    if config.checkpoints.remote is not None:
        raise UserError("checkpoints.remote applies to pretraining only; copy checkpoints.folder after the runs")
    if parse_time(config.trainer.eval_interval, "trainer.eval_interval").value == 0:
        raise UserError(
            f"trainer.eval_interval is {config.trainer.eval_interval}: nothing would be scored; expected above 0"
        )
    if config.trainer.eval_batches is not None:
        raise UserError("trainer.eval_batches applies to pretraining only; all dev examples are scored: set it to null")
    if config.trainer.fsdp is not None:
        raise UserError("trainer.fsdp applies to pretraining only; a finetuning run has one device: set it to null")
    for name in names:
        if (other := TASKS[name].trained_by) is not None and other not in names:
            raise UserError(f"tasks: {name} is predicted by the runs of {other}; add {other}, or remove {name}")
    if all(TASKS[name].trained_by for name in names):
        raise UserError(f"tasks is {config.tasks}: nothing to finetune; expected names such as [cola, sst2]")
    if config.intermediate and "mnli" not in names:
        raise UserError("intermediate is true: runs start from MNLI runs; add mnli to tasks")
    if config.predict.enabled:
        check_select(config.predict.select, config.seeds)
    settings = {check_task_settings(name, own): own for name, own in config.task_settings.items()}
    found = [dataclasses.replace(task, **_protocol(config, task)) for task in map(TASKS.__getitem__, names)]
    return found, dataclasses.replace(config, task_settings=settings)


def check_task_settings(name: str, settings: TaskSettings) -> str:
    """Check the settings of one task and return its name.

    Raises:
        UserError: there is no such task, or a value is out of range.
    """
    for task in TASKS.values():
        if name.casefold() in (task.name, task.folder.casefold()) and task.trained_by is None:
            break
    else:
        raise UserError(f"task_settings.{name}: no such task; {nearest(name.casefold(), list(TASKS))}")
    ranges = {
        "epochs": (settings.epochs is None or settings.epochs >= 1, "at least 1"),
        "lr": (settings.lr is None or settings.lr > 0, "a number above 0"),
        "batch_size": (settings.batch_size is None or settings.batch_size >= 1, "at least 1"),
        "layerwise_decay": (
            settings.layerwise_decay is None or 0 < settings.layerwise_decay <= 1,
            "a number in (0, 1]",
        ),
    }
    for key, (valid, expected) in ranges.items():
        if not valid:
            raise UserError(f"task_settings.{name}.{key} is {getattr(settings, key)}; expected {expected}")
    return task.name


def _protocol(config: GlueConfig, task: Task) -> dict[str, Any]:
    """Return the attributes of a task that the configuration changes."""
    changes: dict[str, Any] = {}
    if config.regression_targets == "raw":
        changes["target_scale"] = 1.0
    if config.wnli == "coreference" and task.name == "wnli":
        changes["ranked"] = True
    if not config.double_unordered:
        changes["swap_augmentation"] = False
    return changes


if __name__ == "__main__":
    # Workaround (tokenizers 0.22): warns in loader workers forked after the tokenizer has run, though they never use
    # it; goes when the warning waits for a use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    report_user_errors(main)(
        load_config_from_command_line(GlueConfig, "composer electra_composer/glue.py yamls/glue.yaml [key=value …]")
    )
