"""Start of finetuning on a task of one's own: what is checked and read before the first run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from electra_composer.checkpoints.weights import Pretrained, load_source
from electra_composer.errors import UserError
from electra_composer.faults import check_can_write
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.cache import file_sha256
from electra_composer.finetuning.fit import EVAL_LABEL
from electra_composer.finetuning.predictions import ENSEMBLE, check_select
from electra_composer.finetuning.processes import Processes
from electra_composer.finetuning.results import check_results_path, describe_source, group_of, open_store
from electra_composer.finetuning.runs import PlannedRun, describe_progress
from electra_composer.finetuning.settings import check_shared
from electra_composer.finetuning.store import RunStore, store_path
from electra_composer.finetuning.task_data import Rows, open_splits, read_rows
from electra_composer.ranges import check_ranges
from electra_composer.tasks.base import Split, Task
from electra_composer.tasks.kinds import build_task
from electra_composer.tasks.model import build_task_model
from electra_composer.tasks.tables import HUB, Table
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.builders import build_optimizer, build_scheduler
from electra_composer.training.devices import resolve_device
from electra_composer.training.startup import (
    check_run_settings,
    check_stoppers,
    check_workers,
    microbatch_size,
    start,
)
from electra_composer.training.times import parse_time
from electra_composer.versions import check_versions


@dataclass(frozen=True, eq=False)
class TaskName:
    """What a plan of runs needs to know of a task."""

    name: str


@dataclass
class TaskJob:
    """State shared by the runs, which :data:`CHECKS` and :data:`CHECKS_OF_FILES` read and build.

    Attributes:
        check_only: whether no run begins and nothing is written.
        cpu_autocast: see :func:`resolve_device`.
        attention_path: see :func:`choose_attention`.
        attention: the path and the reason for it.
        messages: what was guessed, chosen and left out.
    """

    config: FinetuneConfig
    check_only: bool
    messages: list[str] = field(default_factory=list)
    processes: Processes = field(init=False)
    cpu_autocast: bool = field(init=False)
    source: Pretrained = field(init=False)
    task: Task = field(init=False)
    rows: Rows = field(init=False)
    splits: dict[str, Split] = field(init=False)
    attention_path: str = field(init=False)
    attention: str = field(init=False)
    group: str = field(init=False)
    settings: dict[str, Any] = field(init=False)
    store: RunStore = field(init=False)
    plan: list[PlannedRun] = field(init=False)

    def progress(self) -> str:
        """Describe the number of finished runs and the time left."""
        return describe_progress(self.plan, self.store.runs(self.group), self.processes.count)


def check_settings(job: TaskJob) -> None:
    """Check what needs no file and no device."""
    config = job.config
    job.processes = Processes.from_launcher()  # each process has batches of its own
    check_workers(config.data.num_workers, job.processes.on_this_machine)
    check_shared(config)
    check_select(config.predict.select, config.seeds)
    if config.predict.select == ENSEMBLE and config.save != "all":
        raise UserError("predict.select is ensemble, which needs the models of all seeds; set save=all")
    if config.data.test is not None and config.save == "none":
        raise UserError("data.test is to be predicted, but save is none; set save=best or all")
    if config.predict.calibrate and config.task.kind != "classification":
        raise UserError(f"predict.calibrate is true, which only classification has; task.kind is {config.task.kind}")
    if config.predict.select == ENSEMBLE and config.model.head == "joint":
        raise UserError("predict.select is ensemble, but outputs of model.head=joint cannot be averaged; select best")
    if config.loss_reduction == "sum" and config.task.kind == "tagging":
        raise UserError("loss_reduction is sum, but the loss of tagging is a mean over tokens; set loss_reduction=mean")
    if config.trainer.max_duration is None:
        raise UserError("trainer.max_duration is null; expected the length of training, such as 3ep")
    job.task = build_task(config.task, config.model)
    if config.predict.select == ENSEMBLE and not job.task.averages:
        raise UserError(
            f"predict.select is ensemble, but the outputs of model.head={config.model.head} cannot be averaged; set "
            "predict.select=best"
        )
    if job.task.score not in job.task.metrics:
        raise UserError(f"task.metric is {job.task.score!r}; expected one of {', '.join(job.task.metrics)}")
    check_run_settings(config, config.trainer.max_duration)


def check_outputs(job: TaskJob) -> None:
    """Check that everything the runs write can be written."""
    config = job.config
    check_results_path(config.results)
    check_can_write("results", config.results)
    check_can_write("checkpoints.folder", config.checkpoints.folder, is_folder=True)
    if config.data.test is not None:
        check_can_write("predict.file", config.predict.file)


def check_device(job: TaskJob) -> None:
    """Initialise the process group and the seeds; check device, precision, compilers and batch sizes."""
    device = resolve_device(job.config.trainer)[0]
    job.processes.init_process_group(device)
    job.cpu_autocast = start(job.config, job.processes.on_this_machine)


def open_data(job: TaskJob) -> None:
    """Open the files and find the columns, which takes no time, before the model is loaded."""
    job.splits = open_splits(job.task, job.config.data, job.messages.append)


def load_model(job: TaskJob) -> None:
    """Load the source."""
    job.source = load_source(job.config.model.source)


def read_data(job: TaskJob) -> None:
    """Tokenize the data; choose the length of the rows and the attention path; plan the runs."""
    config = job.config
    show = job.processes.rank == 0 and config.trainer.progress_bar
    positions = job.source.encoder.max_positions
    job.rows = read_rows(job.task, config, job.splits, job.source.tokenizer, positions, show, job.messages.append)
    path = choose_attention(
        config.trainer, (job.source.encoder,), microbatch_size(config.trainer), job.rows.max_seq_length
    )
    job.attention_path, job.attention = path[0], f"{path[0]} ({path[1]})"
    assert config.trainer.max_duration is not None
    batches = math.ceil(len(job.rows.train) / config.trainer.global_train_batch_size)
    build_scheduler(config.schedule, config.trainer.max_duration).check(batches)
    time = parse_time(config.trainer.max_duration, "trainer.max_duration")
    seen = int(time.value) * (len(job.rows.train) if time.unit.value == "ep" else 1)
    name = TaskName(job.task.kind)
    job.plan = [PlannedRun(name, seed, seen) for seed in config.seeds]  # type: ignore[arg-type]


def check_model(job: TaskJob) -> None:
    """Build and discard the model and the optimizer, and check the metrics that callbacks need."""
    config = job.config
    model = build_task_model(job.source, job.task, config.model, job.rows.validation)
    build_optimizer(config.optimizer, model)
    check_stoppers(config.callbacks, model, [EVAL_LABEL])


def open_results(job: TaskJob) -> None:
    """Open the record of runs. Only rank 0 may discard earlier ones; when the others open it, it may have new ones."""
    config = job.config
    source = describe_source(job.source, config.model.random_init)
    digests = {f"sha256 of {os.path.basename(file)}": file_sha256(file) for file in files_of(job.splits)}
    job.group, job.settings = group_of(config, source, digests)
    job.store = RunStore(store_path(config.results))
    if job.processes.rank == 0:
        job.store = open_store(config, job.group, job.check_only)


def files_of(splits: dict[str, Split]) -> list[str]:
    """Return the files of the training and validation split."""
    tables = [splits[name].table for name in ("train", "validation") if name in splits]
    return [file for table in tables if isinstance(table, Table) and table.format != HUB for file in table.files]


CHECKS: tuple[tuple[str, Callable[[TaskJob], None]], ...] = (
    ("versions", lambda job: check_versions()),
    ("ranges", lambda job: check_ranges(job.config)),
    ("settings", check_settings),
    ("files to write", check_outputs),
    ("device", check_device),
)
"""Checks of a start, cheapest first. Each may use what those before it have read and built."""

CHECKS_OF_FILES: tuple[tuple[str, Callable[[TaskJob], None]], ...] = (
    ("files of the data", open_data),
    ("source", load_model),
    ("data", read_data),
    ("model", check_model),
    ("results of earlier runs", open_results),
)
"""Those after them, on rank 0 before the other ranks."""
