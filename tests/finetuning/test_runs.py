"""Plan of finetuning runs: order, claims, failures, remaining time."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetuning_runs import make_run

from electra_composer.errors import UserError
from electra_composer.finetuning import runs as glue_runs
from electra_composer.finetuning.processes import Processes
from electra_composer.finetuning.runs import (
    PlannedRun,
    claim,
    duration,
    make_plan,
    now,
    run_all,
    seconds_left,
)
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.tasks import TASKS

EXAMPLES = {"mnli": 900, "rte": 50, "sst2": 300, "stsb": 2000}


def plan_of(*names: str, seeds: tuple[int, ...] = (1, 2), intermediate: bool = False) -> list[PlannedRun]:
    return make_plan([TASKS[name] for name in names], seeds, EXAMPLES, intermediate)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "runs.jsonl"))


def record(run: PlannedRun, seconds: float = 1.0) -> dict[str, Any]:
    return make_run(run.task.name, run.seed, 50.0, seconds=seconds)


def test_longest_first_then_by_seed() -> None:
    names = [run.name for run in plan_of("rte", "sst2", "stsb")]
    assert names == ["stsb-seed1", "stsb-seed2", "sst2-seed1", "sst2-seed2", "rte-seed1", "rte-seed2"]


def test_runs_that_start_from_mnli_name_the_one_of_their_seed() -> None:
    started = {
        run.name: run.starts_from and run.starts_from.name for run in plan_of("rte", "sst2", "mnli", intermediate=True)
    }
    assert started["rte-seed1"] == "mnli-seed1"
    assert started["rte-seed2"] == "mnli-seed2"
    assert started["sst2-seed1"] is started["mnli-seed1"] is None
    assert all(run.starts_from is None for run in plan_of("rte", "sst2", "mnli"))


def test_a_run_waits_for_the_one_it_starts_from(store: RunStore, tmp_path: Path) -> None:
    """STS-B is longer than MNLI here, so it comes first in the plan."""
    done: list[str] = []

    def do(run: PlannedRun) -> None:
        done.append(run.name)
        store.add(record(run))

    plan = plan_of("stsb", "mnli", seeds=(1,), intermediate=True)
    assert [run.task.name for run in plan] == ["stsb", "mnli"]
    assert run_all(plan, store, "g", str(tmp_path), do, now()) == []
    assert done == ["mnli-seed1", "stsb-seed1"]


def test_what_starts_from_a_failed_run_fails_with_it(store: RunStore, tmp_path: Path) -> None:
    def do(run: PlannedRun) -> None:
        if run.task.name == "mnli":
            raise RuntimeError("a loss\nof nan")
        store.add(record(run))

    failed = run_all(
        plan_of("rte", "mnli", "sst2", seeds=(1,), intermediate=True), store, "g", str(tmp_path), do, now()
    )
    assert [(each["task"], each["error"]) for each in failed] == [
        ("mnli", "RuntimeError: a loss of nan"),
        ("rte", "not started: mnli-seed1 failed"),
    ]
    assert [run["task"] for run in store.runs("g")] == ["sst2"]


def test_failures_of_an_earlier_start_are_tried_again(store: RunStore, tmp_path: Path) -> None:
    (run,) = plan_of("rte", seeds=(1,))
    glue_runs.add_failure(store, "g", run, "no")
    assert run_all([run], store, "g", str(tmp_path), lambda run: store.add(record(run)), now()) == []
    assert store.is_done("g", "rte", 1)
    assert store.failures("g") == []


def test_what_concerns_all_runs_ends_them(store: RunStore, tmp_path: Path) -> None:
    def do(run: PlannedRun) -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        run_all(plan_of("rte"), store, "g", str(tmp_path), do, now())
    assert store.failures("g") == []


def test_a_claimed_run_is_left_to_whoever_has_it(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done after the other process was killed without a record, and not repeated once it is recorded."""
    first, second = plan_of("rte")
    done: list[str] = []
    said: list[str] = []
    other = claim(str(tmp_path / "rte-seed1.lock"))
    assert other.__enter__()

    def sleep(seconds: float) -> None:
        assert done == ["rte-seed2"]
        other.__exit__(None, None, None)  # release the lock, as the system does when a process dies

    def do(run: PlannedRun) -> None:
        done.append(run.name)
        store.add(record(run))

    monkeypatch.setattr(glue_runs, "time", SimpleNamespace(sleep=sleep))  # not that of other threads
    run_all([first, second], store, "g", str(tmp_path), do, now(), said.append)
    assert done == ["rte-seed2", "rte-seed1"]
    assert said == ["waiting for 1 runs of other processes"]
    run_all([first, second], store, "g", str(tmp_path), do, now())
    assert len(done) == 2


def test_a_run_that_another_ended_before_the_claim_is_not_done_again(store: RunStore, tmp_path: Path) -> None:
    """The other process records it after this one has queried the store, before this one has the lock."""
    (run,) = plan_of("rte", seeds=(1,))

    class Late(RunStore):
        looks = 0

        def runs(self, group: str | None = None) -> list[dict[str, Any]]:
            self.looks += 1
            found = super().runs(group)
            if self.looks == 1:
                self.add(record(run))
            return found

    def do(run: PlannedRun) -> None:
        raise AssertionError("done twice")

    assert run_all([run], Late(store.path), "g", str(tmp_path), do, now()) == []


def test_a_claim_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "claims" / "a.lock")
    with claim(path) as ours:
        assert ours
        with claim(path) as again:
            assert not again
    with pytest.raises(RuntimeError), claim(path):
        raise RuntimeError
    with claim(path) as ours:
        assert ours


def test_a_claim_in_the_way_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written: .*another results="),
        claim(str(tmp_path / "claims/a.lock")),
    ):
        pass


def test_time_left() -> None:
    plan = plan_of("stsb", "sst2", "rte")
    runs = {run.name: run for run in plan}
    assert seconds_left(plan, [], 1) is None
    done = [record(runs["stsb-seed1"], seconds=200.0), record(runs["rte-seed2"], seconds=10.0)]
    # STS-B: 0.1 s per example; RTE: 0.2 s; SST-2, not measured: 210 s for 2,050 examples.
    expected = [2000 * 0.1, 50 * 0.2, 2 * 300 * 210 / 2050]
    assert seconds_left(plan, done, 1) == pytest.approx(sum(expected))
    assert seconds_left(plan, done, 2) == pytest.approx(200)  # at least the longest run
    assert seconds_left(plan, [record(run) for run in plan], 1) == 0


@pytest.mark.parametrize(("seconds", "words"), [(4.4, "4 s"), (125, "2 min"), (11100, "3 h 05 min")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_times_sort_as_they_are() -> None:
    first = now()
    time.sleep(0.001)
    assert first < now()
    assert len(first) == len(now())


def test_a_process_alone_is_first() -> None:
    processes = Processes()
    with processes.rank_zero_first():
        assert processes.rank == 0
