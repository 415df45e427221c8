"""The plan of finetuning: which runs there are, in what order, and which process does which.

Under `composer -n N` every process is a world of one. It takes one run at a time for its own device, and claims it by a
lock on a file, which the system frees when the process ends in whatever way. So a run's batches, and its scores, do not
depend on how many processes there are.
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

from electra_composer.errors import UserError
from electra_composer.finetune.store import RunStore
from electra_composer.finetune.tasks import Task
from electra_composer.training.devices import run_device

POLL_SECONDS = 0.2  # between looks at what other processes have done


@dataclass(frozen=True)
class PlannedRun:
    """One finetuning run.

    Attributes:
        examples: that training sees, over all epochs: what the time of a run is measured in.
        needs: the run whose weights it starts from.
    """

    task: Task
    seed: int
    examples: int
    needs: PlannedRun | None = None

    @property
    def name(self) -> str:
        return f"{self.task.name}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, int]:
        return self.task.name, self.seed


def make_plan(
    tasks: Sequence[Task], seeds: Sequence[int], examples: dict[str, int], intermediate: bool
) -> list[PlannedRun]:
    """Tasks × seeds, longest first: the last runs to end are then short ones, and no process waits long for another.

    Args:
        examples: by a task's name, what training sees over all epochs.
        intermediate: whether the tasks of which it is customary start from the MNLI run of the same seed.
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
    """Lock a file while the block runs. Gives whether it is ours; another process that holds it is not waited for.

    Raises:
        UserError: the file cannot be made, or its file system has no locks.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
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
                f"{path}: cannot be locked: {error.strerror}; expected a file system with locks: set results=… on one"
            ) from error
        yield True
    finally:
        os.close(descriptor)


def do_all(
    plan: Sequence[PlannedRun],
    store: RunStore,
    group: str,
    claims: str,
    do: Callable[[PlannedRun], None],
    since: str,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Do the runs of a plan that nobody has done and nobody does, until all are done or have failed.

    Args:
        claims: the folder of the lock files.
        do: trains, and adds the run to the store.
        since: when this start began, as :func:`now` gives it; failures before it are tried again.

    Returns:
        The failures of this start, of all processes, as the store has them.

    Raises:
        UserError: what `do` raises as one: it would stop every run.
    """
    waiting = False
    while True:
        failed = {key_of(failure): failure for failure in store.failures(group) if failure["at"] >= since}
        done = {key_of(run) for run in store.runs(group)}
        todo = [run for run in plan if run.key not in done and run.key not in failed]
        if not todo:
            return [failed[run.key] for run in plan if run.key in failed]
        for run in todo:
            if run.needs is not None and run.needs.key in failed:
                add_failure(store, group, run, f"not started, since {run.needs.name} failed")
                break
            if run.needs is not None and run.needs.key not in done:
                continue
            with claim(os.path.join(claims, f"{run.name}.lock")) as is_ours:
                # Another may have ended it between the look at the store and the lock.
                if not is_ours or store.is_done(group, *run.key):
                    continue
                waiting = False
                _try(run, store, group, do)
                break
        else:
            if not waiting:
                say(f"waiting for {len(todo)} runs that other processes do")
            waiting = True
            time.sleep(POLL_SECONDS)


def _try(run: PlannedRun, store: RunStore, group: str, do: Callable[[PlannedRun], None]) -> None:
    """Do a run; what goes wrong with it alone is put on record, and the others go on."""
    try:
        do(run)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        add_failure(store, group, run, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def add_failure(store: RunStore, group: str, run: PlannedRun, error: str) -> None:
    """Put a failed run on record: a later start tries it again."""
    store.add_failure({"group": group, "task": run.task.name, "seed": run.seed, "error": error, "at": now()})


def key_of(record: dict[str, Any]) -> tuple[str, int]:
    """Task and seed of a run or failure on record."""
    return record["task"], record["seed"]


def now() -> str:
    """The time as ISO 8601 in UTC, with as many digits always: such times sort as they are."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="microseconds")


def seconds_left(plan: Sequence[PlannedRun], done: Sequence[dict[str, Any]], processes: int) -> float | None:
    """How long the runs that are not done will take, or None if none is done from which to tell.

    Told from the seconds per training example of the runs on record: of the same task, since sentences differ in
    length, or of all where the task has none.

    Args:
        done: the runs on record, each with `task`, `seed` and `seconds`.
        processes: that share the work.
    """
    planned = {run.key: run for run in plan}
    measured = [(planned[key_of(run)], run["seconds"]) for run in done if key_of(run) in planned]
    if not measured:
        return None

    def rate(pairs: list[tuple[PlannedRun, float]]) -> float:
        return sum(seconds for _, seconds in pairs) / max(1, sum(run.examples for run, _ in pairs))

    ended = {run.key for run, _ in measured}
    left = []
    for run in plan:
        if run.key not in ended:
            alike = [pair for pair in measured if pair[0].task.name == run.task.name]
            left.append(run.examples * rate(alike or measured))
    return max([sum(left) / processes, *left], default=0.0)


def duration(seconds: float) -> str:
    """Seconds in words: `40 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Processes:
    """This process among those that the launcher started; none of them computes with another.

    Args:
        rank: 0 prints, writes the tables and prepares the data before the others need it.
        count: how many there are.
        store: through which they meet at the start; None where there is one alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None):
        self.rank = rank
        self.count = count
        self.store = store
        self.since = now()

    @classmethod
    def of_launcher(cls) -> Processes:
        """Read what the launcher has set, and make this process a world of one for all that comes after.

        To be called before Composer asks for its world. `LOCAL_RANK` stays as it is: it chooses the GPU.
        """
        rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        # It waits deaf for a first process that has failed meanwhile: the launcher's signal must end it by itself.
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0,
            wait_for_workers=False,
        )
        if handler is not None:  # None: one that was not set from Python
            signal.signal(signal.SIGTERM, handler)
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", NODE_RANK="0")
        return cls(rank, count, store)

    def join_alone(self, device: str) -> None:
        """Make the process group of this process alone; without a launcher Composer does so itself.

        Args:
            device: `gpu` or `cpu`.

        Raises:
            UserError: more processes on this machine than it has GPUs.
        """
        if self.count == 1:
            return
        local_rank = int(os.environ["LOCAL_RANK"])
        if device == "gpu" and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"the launcher started a process for GPU {local_rank}, and there are {torch.cuda.device_count()}; "
                "start as many as there are, composer -n …, or set trainer.device=cpu"
            )
        if not torch.distributed.is_initialized():
            backend, store = run_device(device).dist_backend, torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, world_size=1, rank=0)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do: it meets what is wrong, and leaves what it made.

        If it fails, the launcher ends the others.
        """
        if self.store is not None and self.rank > 0:
            while not self.store.check(["since"]):  # `get` waits deaf, and not for long enough
                time.sleep(POLL_SECONDS)
            self.since = self.store.get("since").decode()
            self.store.add("told", 1)
        yield
        if self.store is not None and self.rank == 0:
            self.store.set("since", self.since)
            # This process is the store's server, and may have nothing more to do: not before all have heard.
            while self.store.add("told", 0) < self.count - 1:
                time.sleep(POLL_SECONDS)

    def say(self, text: str) -> None:
        """Print, on the first process alone."""
        if self.rank == 0:
            print(text, flush=True)
