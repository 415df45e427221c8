"""Plan finetuning runs and distribute them over processes.

Under `composer -n N` every process has a world size of 1. It takes one run at a time for its own device and claims it
by locking a file; the system releases the lock when the process ends for any reason. Batches and scores of a run
therefore do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from electra_composer.errors import UserError
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.tasks import Task

POLL_SECONDS = 0.2  # interval between checks for progress of other processes


@dataclass(frozen=True)
class PlannedRun:
    """One finetuning run.

    Attributes:
        examples: number of training examples over all epochs; the estimate of the run's duration.
        starts_from: run to take the initial weights from; None: start from the pretrained weights.
    """

    task: Task
    seed: int
    examples: int
    starts_from: PlannedRun | None = None

    @property
    def name(self) -> str:
        return f"{self.task.name}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        return self.task.name, self.seed


def make_plan(
    tasks: Sequence[Task], seeds: Sequence[int], examples: dict[str, int], intermediate: bool
) -> list[PlannedRun]:
    """Plan tasks × seeds, longest run first, so that short runs come last and processes finish at about the same time.

    Args:
        examples: task name → number of training examples over all epochs.
        intermediate: whether tasks with :attr:`Task.intermediate` start from the MNLI run of the same seed.
    """
    starts = {
        seed: PlannedRun(task, seed, examples[task.name]) for task in tasks if task.name == "mnli" for seed in seeds
    }
    runs = [
        PlannedRun(task, seed, examples[task.name], starts[seed] if intermediate and task.intermediate else None)
        for task in tasks
        for seed in seeds
    ]
    return sorted(runs, key=lambda run: (-run.examples, run.seed))


@contextlib.contextmanager
def claim(path: str) -> Iterator[bool]:
    """Lock a file while the block runs, without waiting; yield whether the lock was acquired.

    Raises:
        UserError: the file cannot be created, or its file system does not support locks.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; set another results=…") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{path}: cannot be locked: {error.strerror}; expected a file system with locks: set another results=…"
            ) from error
        yield True
    finally:
        os.close(descriptor)


def run_all(
    plan: Sequence[PlannedRun],
    store: RunStore,
    group: str,
    claims: str,
    run_one: Callable[[PlannedRun], None],
    since: str,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Do the unfinished and unclaimed runs of a plan until all runs are done or have failed.

    Args:
        claims: folder of the lock files.
        run_one: trains and adds the run to the store.
        since: start time of this invocation, from :func:`now`; runs that failed earlier are retried.
        report: receives progress messages.

    Returns:
        Failures since `since` of all processes, as recorded in the store.

    Raises:
        UserError: raised by `run_one`, for errors that would stop every run.
    """
    waiting = False
    while True:
        failed = {key_of(failure): failure for failure in store.failures(group) if failure["at"] >= since}
        done = {key_of(run) for run in store.runs(group)}
        todo = [run for run in plan if run.key not in done and run.key not in failed]
        if not todo:
            return [failed[run.key] for run in plan if run.key in failed]
        for run in todo:
            if run.starts_from is not None and run.starts_from.key in failed:
                add_failure(store, group, run, f"not started: {run.starts_from.name} failed")
                break
            if run.starts_from is not None and run.starts_from.key not in done:
                continue
            with claim(os.path.join(claims, f"{run.name}.lock")) as acquired:
                # Another process may have finished it between the query above and the lock.
                if not acquired or store.is_done(group, *run.key):
                    continue
                waiting = False
                _try(run, store, group, run_one)
                break
        else:
            if not waiting:
                report(f"waiting for {len(todo)} runs of other processes")
            waiting = True
            time.sleep(POLL_SECONDS)


def _try(run: PlannedRun, store: RunStore, group: str, run_one: Callable[[PlannedRun], None]) -> None:
    """Do a run; record a failure that does not concern the other runs."""
    try:
        run_one(run)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        add_failure(store, group, run, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def add_failure(store: RunStore, group: str, run: PlannedRun, error: str) -> None:
    """Record a failed run; the next invocation retries it."""
    store.add_failure({"group": group, "task": run.task.name, "seed": run.seed, "error": error, "at": now()})


def key_of(record: dict[str, Any]) -> tuple[str, int]:
    """Return task and seed of a recorded run or failure."""
    return record["task"], record["seed"]


def now() -> str:
    """Return the time in UTC as ISO 8601 with a fixed number of digits, so that times sort as strings."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


def seconds_left(plan: Sequence[PlannedRun], done: Sequence[dict[str, Any]], processes: int) -> float | None:
    """Estimate the duration of the unfinished runs; None if no run is finished.

    The estimate uses the seconds per training example of the finished runs of the same task, because sentence lengths
    differ between tasks, or of all finished runs if the task has none.

    Args:
        done: finished runs, each with `task`, `seed` and `seconds`.
        processes: number of processes that share the work.
    """
    planned = {run.key: run for run in plan}
    measured = [(planned[key_of(run)], run["seconds"]) for run in done if key_of(run) in planned]
    if not measured:
        return None

    def rate(pairs: list[tuple[PlannedRun, float]]) -> float:
        return sum(seconds for _, seconds in pairs) / max(1, sum(run.examples for run, _ in pairs))

    finished = {run.key for run, _ in measured}
    left = []
    for run in plan:
        if run.key not in finished:
            same_task = [pair for pair in measured if pair[0].task.name == run.task.name]
            left.append(run.examples * rate(same_task or measured))
    return max([sum(left) / processes, *left], default=0.0)


def describe_progress(plan: Sequence[PlannedRun], runs: Sequence[dict[str, Any]], processes: int) -> str:
    """Describe the number of finished runs of a plan and the time left.

    Args:
        runs: recorded runs of the group.
        processes: as in :func:`seconds_left`.
    """
    keys = {run.key for run in plan}
    done = [run for run in runs if key_of(run) in keys]
    left = seconds_left(plan, done, processes)
    return f"{len(done)} of {len(keys)} runs done" + (f", about {duration(left)} left" if left else "")


def duration(seconds: float) -> str:
    """Format seconds as `40 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
