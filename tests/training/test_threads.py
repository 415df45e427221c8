"""Number of CPU threads: the decision by numbers, at the start of a run and during it, with invented measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
from tiny_trainer import make_trainer

from electra_composer.config import PretrainConfig, TrainerConfig
from electra_composer.config_loading import load_config
from electra_composer.training import startup, threads
from electra_composer.training.cores import CoreUsage
from electra_composer.training.startup import start
from electra_composer.training.threads import ThreadWatch, choose_threads, free_threads, watch_threads
from electra_composer.training.trainer import RunTrainer

Machine = Callable[..., None]


class Torch:
    """Stands for torch in the module, so that the tests start no threads."""

    def __init__(self) -> None:
        self.threads = 0

    def get_num_threads(self) -> int:
        return self.threads

    def set_num_threads(self, number: int) -> None:
        self.threads = number


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> Torch:
    fake = Torch()
    monkeypatch.setattr(threads, "torch", fake)
    for name in threads.FIXED_BY:
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, fake_torch: Torch) -> Machine:
    """`machine(cpus, physical=…, quota=…, others=…)`; others use so many cores in every measurement."""

    def make(cpus: int, physical: int | None = None, quota: float = math.inf, others: float = 0.0) -> None:
        fake_torch.threads = physical or cpus
        monkeypatch.setattr(threads, "allowed_cpus", lambda: list(range(cpus)))
        monkeypatch.setattr(threads, "cgroup_cores", lambda: quota)
        monkeypatch.setattr(threads, "default_threads", lambda: physical or cpus)
        monkeypatch.setattr(threads, "measure_usage", usages([others]))
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)

    return make


def usages(others: list[float], seconds: float = 2.0) -> Callable[[], CoreUsage]:
    """Return a `measure_usage` for windows in which others use so many cores; the last goes on for ever."""

    def measure() -> Iterator[CoreUsage]:
        time = busy = 0.0
        for index in range(1000):
            yield CoreUsage(time, busy, 0.0)
            time += seconds
            busy += seconds * others[min(index, len(others) - 1)]

    return measure().__next__


@pytest.mark.parametrize(
    ("cpus", "physical", "quota", "others", "ranks", "expected"),
    [
        (2, 2, math.inf, 0.0, 1, 2),
        (2, 2, math.inf, 0.3, 1, 2),  # too little to be worth a thread
        (2, 2, math.inf, 0.65, 1, 1),  # what a busy process gets beside two threads
        (2, 2, math.inf, 1.0, 1, 1),
        (2, 2, math.inf, 2.0, 1, 1),  # never none
        (8, 8, math.inf, 0.5, 1, 7),
        (8, 8, math.inf, 3.0, 1, 5),
        (16, 8, math.inf, 2.0, 1, 8),  # two CPUs per core
        (16, 8, math.inf, 10.0, 1, 6),
        (8, 8, 4.0, 0.0, 1, 4),
        (8, 8, 4.0, 3.0, 1, 4),  # others use what is beyond the quota
        (8, 8, 4.0, 6.0, 1, 2),
        (8, 8, 1.5, 0.0, 1, 1),
        (8, 8, 0.5, 0.0, 1, 1),
        (8, 8, math.inf, 0.0, 2, 4),
        (8, 8, math.inf, 0.0, 3, 3),  # 2.67 cores each
        (8, 8, math.inf, 2.0, 2, 3),
        (2, 2, math.inf, 0.0, 4, 1),
    ],
)
def test_free_threads(
    machine: Machine, cpus: int, physical: int, quota: float, others: float, ranks: int, expected: int
) -> None:
    machine(cpus, physical, quota)
    assert free_threads(others, ranks) == expected


def test_the_start_counts_free_cores(machine: Machine, fake_torch: Torch, capsys: pytest.CaptureFixture[str]) -> None:
    machine(4, others=1.0)
    choose_threads(TrainerConfig(), ranks=1)
    assert fake_torch.threads == 3
    assert capsys.readouterr().out == (
        "CPU threads: 3 of 4 (other processes use 1.0 of 4 cores; OMP_NUM_THREADS sets another number)\n"
    )
    machine(8, quota=4.0)
    choose_threads(TrainerConfig(), ranks=2)
    assert fake_torch.threads == 2
    assert "0.0 of 8 cores, the quota is 4.0, 2 ranks share the rest;" in capsys.readouterr().out


@pytest.mark.parametrize("name", threads.FIXED_BY)
def test_the_users_number_wins(
    machine: Machine, fake_torch: Torch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    machine(2, others=2.0)
    monkeypatch.setenv(name, "2")
    choose_threads(TrainerConfig(), ranks=2)
    assert fake_torch.threads == 2
    assert watch_threads(TrainerConfig(), "cpu") is None
    assert capsys.readouterr().out == ""


def test_deterministic_runs_depend_on_no_other_process(
    machine: Machine, fake_torch: Torch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(8, quota=6.0, others=5.0)
    choose_threads(TrainerConfig(deterministic=True), ranks=2)
    assert fake_torch.threads == 3
    assert capsys.readouterr().out == "CPU threads: 3 of 8 (trainer.deterministic: whatever other processes use)\n"
    assert watch_threads(TrainerConfig(deterministic=True), "cpu") is None


def test_who_watches(machine: Machine) -> None:
    machine(2)
    assert isinstance(watch_threads(TrainerConfig(), "cpu"), ThreadWatch)
    assert watch_threads(TrainerConfig(), "gpu") is None
    assert watch_threads(TrainerConfig(compile=True), "cpu") is None
    machine(1)
    assert watch_threads(TrainerConfig(), "cpu") is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([0.0] * 6, [2] * 6),
        ([0.0, 1.0, 0.0, 1.0, 0.0], [2] * 5),  # bursts of one window
        ([0.7, 0.7, 1.0, 1.0], [2, 1, 1, 1]),
        # The neighbour ends: raised after two windows. It comes back and ends: after four.
        ([1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0], [2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 2]),
        ([1, 1, 0, 1, 0, 1, 0, 0], [2, 1, 1, 1, 1, 1, 1, 2]),  # free in every other window: no change
    ],
)
def test_a_run_adapts(
    machine: Machine, fake_torch: Torch, monkeypatch: pytest.MonkeyPatch, others: list[float], expected: list[int]
) -> None:
    machine(2)
    watch = ThreadWatch(measure=usages(others))
    numbers = []
    for batch in range(len(others) + 1):
        monkeypatch.setattr(threads.time, "monotonic", lambda at=2.0 * batch: at)
        watch.after_batch(batch)
        numbers.append(fake_torch.threads)
    assert numbers[1:] == expected


def test_the_wait_for_raising_is_bounded(machine: Machine, fake_torch: Torch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour that comes whenever the number was raised: the waits are 2, 4, 8, 16, 32, 32 windows."""
    machine(2)
    time = busy = 0.0
    watch = ThreadWatch(measure=lambda: CoreUsage(time, busy, 0.0))
    monkeypatch.setattr(threads.time, "monotonic", lambda: time)
    waits, windows = [], 0
    watch.after_batch(0)
    while len(waits) < 6:
        before = fake_torch.threads
        time, busy = time + 2.0, busy + 2.0 * (before == 2)
        watch.after_batch(0)
        windows = windows + 1 if before == 1 else 0
        if fake_torch.threads > before:
            waits.append(windows)
    assert waits == [2, 4, 8, 16, 32, 32]


def test_it_measures_every_two_seconds_and_says_what_changes(
    machine: Machine, fake_torch: Torch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(4)
    measured = []
    source = usages([1.0], seconds=2.0)

    def measure() -> CoreUsage:
        measured.append(now)
        return source()

    watch = ThreadWatch(measure=measure)
    for batch in range(1, 12):
        now = 0.5 * (batch - 1)
        monkeypatch.setattr(threads.time, "monotonic", lambda at=now: at)
        watch.after_batch(batch)
    assert measured == [0.0, 2.0, 4.0]
    assert fake_torch.threads == 3
    assert capsys.readouterr().out == (
        "CPU threads from batch 10 on: 3, not 4 (other processes use 1.0 of 4 cores; OMP_NUM_THREADS sets another "
        "number)\n"
    )


def test_the_trainer_asks_after_every_batch() -> None:
    class Watch(ThreadWatch):
        batches: list[int] = []  # noqa: RUF012

        def after_batch(self, batch: int) -> None:
            self.batches.append(batch)

    trainer = make_trainer("3ba", trainer_class=RunTrainer, threads=Watch())
    trainer.fit()
    trainer.close()
    assert Watch.batches == [1, 2, 3]


def test_a_program_chooses_at_its_start(tiny_yaml, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(str(tiny_yaml), ["trainer.device=cpu", "trainer.precision=fp32"], PretrainConfig)
    asked: list[int] = []
    monkeypatch.setattr(startup, "choose_threads", lambda trainer, ranks: asked.append(ranks))
    start(config)
    start(config, ranks_of_machine=3)
    assert asked == [1, 3]


def test_torchs_own_number_is_remembered(fake_torch: Torch) -> None:
    before = threads.default_threads()
    fake_torch.threads = before + 1
    assert threads.default_threads() == before
