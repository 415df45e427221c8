"""Start of finetuning: what is checked, read and planned before the first run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from electra_composer.checkpoints.weights import Pretrained, load_source
from electra_composer.errors import UserError
from electra_composer.faults import check_can_write
from electra_composer.finetuning.data import encode_split
from electra_composer.finetuning.files import HUB, find_file
from electra_composer.finetuning.fit import EVAL_LABEL
from electra_composer.finetuning.one_run import (
    Encoded,
    RunFiles,
    TaskData,
    build_model,
    config_of_task,
    examples_seen,
    test_sets,
)
from electra_composer.finetuning.predictions import check_indices, load_logits
from electra_composer.finetuning.processes import Processes
from electra_composer.finetuning.ranking import rank_split
from electra_composer.finetuning.results import check_results_path, describe_source, group_of, open_store
from electra_composer.finetuning.runs import PlannedRun, describe_progress, key_of, make_plan
from electra_composer.finetuning.settings import check_config, check_settings_of_task, errors_named_for
from electra_composer.finetuning.store import RunStore, store_path
from electra_composer.finetuning.tasks import Task
from electra_composer.glue_config import GlueConfig
from electra_composer.ranges import check_ranges
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.builders import build_optimizer, build_scheduler
from electra_composer.training.devices import resolve_device
from electra_composer.training.startup import check_stoppers, check_workers, microbatch_size, start
from electra_composer.versions import check_versions


@dataclass
class Job:
    """State shared by the runs, which :data:`CHECKS` and :data:`CHECKS_OF_FILES` read and build.

    Attributes:
        config: with `task_settings` keyed by task name.
        check_only: whether no run begins. Nothing is then written, neither to the cache nor to the record of runs.
        cpu_autocast: see :func:`resolve_device`.
        attention_path: see :func:`choose_attention`.
        attention: the path and the reason for it.
        done: the finished runs, by task and seed.
        data: task name → encoded data; tasks with all runs finished are left out.
    """

    config: GlueConfig
    check_only: bool
    tasks: list[Task] = field(init=False)
    processes: Processes = field(init=False)
    cpu_autocast: bool = field(init=False)
    source: Pretrained = field(init=False)
    attention_path: str = field(init=False)
    attention: str = field(init=False)
    group: str = field(init=False)
    settings: dict[str, Any] = field(init=False)
    store: RunStore = field(init=False)
    files: RunFiles = field(init=False)
    done: dict[tuple[str, int], dict[str, Any]] = field(init=False)
    data: dict[str, TaskData] = field(default_factory=dict)
    plan: list[PlannedRun] = field(init=False)

    @property
    def trained(self) -> list[Task]:
        """Tasks that have runs of their own."""
        return [task for task in self.tasks if task.trained_by is None]

    def progress(self) -> str:
        """Describe the number of finished runs and the time left."""
        return describe_progress(self.plan, self.store.runs(self.group), self.processes.count)


def check_settings(job: Job) -> None:
    """Check what needs no file and no device: settings that depend on each other, of the runs of each task."""
    job.processes = Processes.from_launcher()  # each process has batches of its own
    check_workers(job.config.data.num_workers, job.processes.on_this_machine)
    job.tasks, job.config = check_config(job.config)
    for task in job.trained:
        check_settings_of_task(job.config, task)


def check_outputs(job: Job) -> None:
    """Check that everything the runs write can be written."""
    config = job.config
    check_results_path(config.results)
    check_can_write("results", config.results)
    check_can_write("checkpoints.folder", config.checkpoints.folder, is_folder=True)
    if config.data.cache is not None:
        check_can_write("data.cache", config.data.cache, is_folder=True)
    if config.predict.enabled:
        check_can_write("predict.file", config.predict.file)


def check_device(job: Job) -> None:
    """Initialise the process group and the seeds; check device, precision, compilers and batch sizes."""
    device = resolve_device(job.config.trainer)[0]
    job.processes.init_process_group(device)
    job.cpu_autocast = start(job.config, job.processes.on_this_machine)


def load_model(job: Job) -> None:
    """Load the source, and build and discard the model of each task."""
    config, length = job.config, job.config.data.max_seq_length
    job.source = source = load_source(config.model.source)
    if length > source.encoder.max_positions:
        raise UserError(
            f"data.max_seq_length is {length}, but {source.name} has {source.encoder.max_positions} positions; "
            "expected at most that many"
        )
    rows = microbatch_size(config.trainer)
    job.attention_path, reason = choose_attention(config.trainer, (source.encoder,), rows, length)
    job.attention = f"{job.attention_path} ({reason})"
    job.group, job.settings = group_of(config, describe_source(source, config.model.random_init))
    for task in job.trained:
        check_model_of_task(config, task, source)


def open_results(job: Job) -> None:
    """Open the record of runs. Only rank 0 may discard earlier ones; when the others open it, it may have new ones."""
    config = job.config
    job.store = RunStore(store_path(config.results))
    if job.processes.rank == 0:
        job.store = open_store(config, job.group, job.check_only)
    job.files = RunFiles(os.path.join(os.path.dirname(config.results), job.group))
    earlier = [] if job.check_only and config.checkpoints.overwrite else job.store.runs(job.group)
    job.done = {key_of(run): run for run in earlier}


def read_data(job: Job) -> None:
    """Tokenize the data of all tasks with unfinished runs, plan the runs, and check the files of the finished ones."""
    config, trained = job.config, job.trained
    unfinished = [task for task in trained if not all((task.name, seed) in job.done for seed in config.seeds)]
    if config.data.path != HUB:
        for task in unfinished:
            for split in ("train", *task.dev_splits):
                find_file(task, split, config.data.path)
    sizes = {
        task.name: job.done[task.name, config.seeds[0]]["train_examples"] for task in trained if task not in unfinished
    }
    for task in unfinished:
        job.data[task.name] = read_task(job, task)
        sizes[task.name] = len(job.data[task.name].train)
        check_epochs_of_task(config, task, sizes[task.name])
    examples = {task.name: examples_seen(config, task, sizes[task.name]) for task in trained}
    job.plan = make_plan(trained, config.seeds, examples, config.intermediate)
    check_files(config, [run for run in job.plan if run.key in job.done], job.files)


def read_task(job: Job, task: Task) -> TaskData:
    """Encode the training and dev examples of a task, and the test examples that its runs predict."""
    config, settings = job.config, job.config.data

    def read(of: Task, split: str) -> Encoded:
        common = of, split, settings.path, job.source.tokenizer, settings.max_seq_length
        limit, seed = config.max_train_examples, config.seed
        if of.ranked:
            return rank_split(*common, limit=limit, seed=seed)
        cache = None if job.check_only else settings.cache
        show = job.processes.rank == 0 and config.trainer.progress_bar
        return encode_split(*common, cache, limit=limit, seed=seed, progress=show)

    test = {}
    if config.predict.enabled:
        for name, (of, split) in test_sets(task, job.tasks).items():
            test[name] = read(of, split)
            indices = test[name].source
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


def check_model_of_task(config: GlueConfig, task: Task, source: Pretrained) -> None:
    """Build and discard the model and the optimizer of a run of the task, and check the metrics that callbacks need.

    Raises:
        UserError: raised by the builders; names `task_settings.<task>` if the task has settings of its own.
    """
    with errors_named_for(config, task):
        model = build_model(source, task, config)
        build_optimizer(config_of_task(config, task).optimizer, model)
        check_stoppers(config.callbacks, model, [EVAL_LABEL + suffix for suffix in task.dev_splits.values()])


def check_epochs_of_task(config: GlueConfig, task: Task, train_examples: int) -> None:
    """Check the schedule of the runs of a task with the number of their training examples."""
    mine = config_of_task(config, task)
    assert mine.trainer.max_duration is not None
    with errors_named_for(config, task):
        batches = math.ceil(train_examples / mine.trainer.global_train_batch_size)
        build_scheduler(mine.schedule, mine.trainer.max_duration).check(batches)


CHECKS: tuple[tuple[str, Callable[[Job], None]], ...] = (
    ("versions", lambda job: check_versions()),
    ("ranges", lambda job: check_ranges(job.config)),
    ("settings", check_settings),
    ("files to write", check_outputs),
    ("device", check_device),
)
"""Checks of a start, cheapest first. Each may use what those before it have read and built."""

CHECKS_OF_FILES: tuple[tuple[str, Callable[[Job], None]], ...] = (
    ("source", load_model),
    ("results of earlier runs", open_results),
    ("data", read_data),
)
"""Those after them, on rank 0 before the other ranks."""
