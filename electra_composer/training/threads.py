"""Number of CPU threads of a run on a CPU: as many as there are cores that other processes leave free.

OpenMP's threads meet at the end of every operator, and those that come first spin. If a busy process takes the core of
one of them, the others wait for it at every operator: two threads on two cores then train slower than one thread.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable

import torch
from composer.utils import dist
from tqdm import tqdm

from electra_composer.config import TrainerConfig
from electra_composer.training.cores import CoreUsage, allowed_cpus, cgroup_cores, measure_usage, used_by_others

FIXED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which the user sets the number of threads."""

TOLERANCE = 0.4
"""Fraction of a core that may be missing for a thread. A process that competes with one of two threads for a core gets
between 0.6 and 0.8 of it. One that is busy for less than 0.4 of the time costs less than a thread is worth."""

START_SECONDS = 0.5
"""Duration of the measurement at the start of a run. The system counts in hundredths of a second."""

WINDOW_SECONDS = 2.0
"""Duration of a measurement during a run."""

LOWER_AFTER = 2
"""Windows in a row in which cores are missing before the number of threads is lowered."""

MAX_RAISE_AFTER = 32
"""Longest series of windows in which cores must be free before the number of threads is raised."""


@functools.cache
def default_threads() -> int:
    """Return torch's own number of threads, the number of physical cores. Must first be called before it is changed."""
    return torch.get_num_threads()


def is_fixed_by_user() -> bool:
    """Return whether an environment variable sets the number of threads, which then never changes."""
    return any(os.environ.get(name) for name in FIXED_BY)


def free_threads(others: float, ranks: int = 1) -> int:
    """Return how many threads find a free core, at least 1 and at most torch's own number.

    Args:
        others: cores that other processes use.
        ranks: processes of this run on this machine, which share the cores.
    """
    free = min(len(allowed_cpus()) - others, cgroup_cores())
    return max(1, min(default_threads(), math.floor(free / ranks + TOLERANCE)))


def choose_threads(trainer: TrainerConfig, ranks: int) -> None:
    """Set torch's number of threads at the start of a run on a CPU, and print it on rank 0.

    `trainer.deterministic` makes the number independent of other processes, since it changes the order of sums.

    Args:
        trainer: uses `deterministic`.
        ranks: processes of this run on this machine. All must call this at the same time.
    """
    limit = default_threads()
    if is_fixed_by_user() or limit == 1:
        return
    if trainer.deterministic:
        others, reason = 0.0, "trainer.deterministic: whatever other processes use"
    else:
        before = measure_usage()
        time.sleep(START_SECONDS)
        others = used_by_others(before, measure_usage(), ranks)
        reason = _describe(others, ranks)
    chosen = free_threads(others, ranks)
    torch.set_num_threads(chosen)
    _print(f"CPU threads: {chosen} of {limit} ({reason})")


def watch_threads(trainer: TrainerConfig, device: str) -> ThreadWatch | None:
    """Return what adapts the number of threads during a run, None if the number is not to change.

    It does not change on a GPU, if the user or `trainer.deterministic` has fixed it, and with `trainer.compile`, whose
    code is compiled for a number of threads.
    """
    is_compiled = trainer.compile not in (False, "auto")  # auto compiles on a GPU only
    fixed = device != "cpu" or is_fixed_by_user() or trainer.deterministic or is_compiled
    return None if fixed or default_threads() == 1 else ThreadWatch(dist.get_local_world_size())


class ThreadWatch:
    """Adapts torch's number of threads to the cores that other processes leave free.

    The use of the cores is measured every two seconds. The number is lowered after two measurements in a row with too
    few free cores, and raised after two with more, after twice as many at each time it is raised again.

    Args:
        ranks: processes of this run on this machine.
        measure: measures the use of the cores.
    """

    def __init__(self, ranks: int = 1, measure: Callable[[], CoreUsage] = measure_usage) -> None:
        self.ranks = ranks
        self.measure = measure
        self.raise_after = 2
        self._before: CoreUsage | None = None
        self._direction = 0  # of the change that the last windows ask for
        self._windows = 0  # that asked for it in a row

    def after_batch(self, batch: int) -> None:
        """Measure and adapt the number of threads if it is time.

        Args:
            batch: number of batches done, for the message.
        """
        if self._before is None:
            self._before = self.measure()
        elif time.monotonic() - self._before.seconds >= WINDOW_SECONDS:
            before, self._before = self._before, self.measure()
            self._adapt(used_by_others(before, self._before, self.ranks), batch)

    def _adapt(self, others: float, batch: int) -> None:
        now, wanted = torch.get_num_threads(), free_threads(others, self.ranks)
        direction = (wanted > now) - (wanted < now)
        self._windows = self._windows + 1 if direction == self._direction else 1
        self._direction = direction
        if direction == 0 or self._windows < (LOWER_AFTER if direction < 0 else self.raise_after):
            return
        if direction > 0:
            self.raise_after = min(2 * self.raise_after, MAX_RAISE_AFTER)
        self._windows = 0
        torch.set_num_threads(wanted)
        _print(f"CPU threads from batch {batch + 1} on: {wanted}, not {now} ({_describe(others, self.ranks)})")


def _describe(others: float, ranks: int) -> str:
    cpus, quota = len(allowed_cpus()), cgroup_cores()
    limit = f", the quota is {quota:.1f}" if quota < cpus else ""
    shared = f", {ranks} ranks share the rest" if ranks > 1 else ""
    return f"other processes use {others:.1f} of {cpus} cores{limit}{shared}; OMP_NUM_THREADS sets another number"


def _print(line: str) -> None:
    if dist.get_global_rank() == 0:
        with tqdm.external_write_mode():  # above a progress bar
            print(line, flush=True)
