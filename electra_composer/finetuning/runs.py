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
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from electra_composer.errors import LostRankError, UserError
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.tasks import Task
from electra_composer.training.devices import run_device

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


def duration(seconds: float) -> str:
    """Format seconds as `40 s`, `12 min` or `3 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Processes:
    """The processes of the launcher, each of which computes on its own.

    Args:
        rank: rank of this process. Rank 0 prints, writes the tables and prepares the data before the others.
        count: number of processes.
        on_this_machine: those of them on this machine.
        store: TCPStore for synchronisation at the start; None for a single process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, on_this_machine: int = 1):
        self.rank = rank
        self.count = count
        self.on_this_machine = on_this_machine
        self.store = store
        self.since = now()

    @classmethod
    def from_launcher(cls) -> Processes:
        """Read the launcher's environment variables, then set them to a world size of 1 for this process.

        Must be called before Composer reads them. `LOCAL_RANK` is kept: it selects the GPU.
        """
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        # Workaround (torch 2.7): the constructor blocks without running Python's signal handlers, so that only the
        # default action of SIGTERM can end a process that waits for a failed rank 0; goes when it can be interrupted.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            wait_for_workers=False,
        )
        if handler is not None:  # None: not installed from Python
            signal.signal(signal.SIGTERM, handler)
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", NODE_RANK="0")
        return cls(rank, count, store, on_this_machine)

    def init_process_group(self, device: str) -> None:
        """Initialize a process group with this process as its only member; without a launcher, Composer does it.

        Args:
            device: `gpu` or `cpu`.

        Raises:
            UserError: there are more processes on this machine than GPUs.
        """
        if self.count == 1:
            return
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "gpu" and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"the launcher started a process for GPU {local_rank}, but there are {torch.cuda.device_count()} GPUs; "
                "start one process per GPU by composer -n …, or set trainer.device=cpu"
            )
        if not torch.distributed.is_initialized():
            backend, store = run_device(device).dist_backend, torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, world_size=1, rank=0)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, so that they find its files.

        If rank 0 fails, the others raise LostRankError, and the launcher ends them.
        """
        if self.store is not None and self.rank > 0:
            try:
                # Workaround (torch 2.7): `get` blocks without running Python's signal handlers and times out after five
                # minutes; goes when it can be interrupted.
                while not self.store.check(["since"]):
                    time.sleep(POLL_SECONDS)
                self.since = self.store.get("since").decode()
                self.store.add("told", 1)
            except RuntimeError as error:  # rank 0 is the store's server
                raise LostRankError("rank 0 has ended before it had read the data; its error is the cause") from error
        yield
        if self.store is not None and self.rank == 0:
            self.store.set("since", self.since)
            # This process is the store's server and may exit soon: wait until all ranks have read the key.
            while self.store.add("told", 0) < self.count - 1:
                time.sleep(POLL_SECONDS)

    def print(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)
