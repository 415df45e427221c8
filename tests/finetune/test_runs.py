"""The plan of the runs: order, claims, failures, time left; and what kills and company do to the results."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
from glue_tiny import settings, write_data, write_source
from tiny import ROOT

from electra_composer.errors import UserError
from electra_composer.finetune import runs as glue_runs
from electra_composer.finetune.runs import PlannedRun, Processes, claim, do_all, duration, make_plan, now, seconds_left
from electra_composer.finetune.store import RunStore
from electra_composer.finetune.tasks import TASKS

GLUE = str(ROOT / "electra_composer" / "glue.py")
YAML = str(ROOT / "yamls" / "glue.yaml")
EXAMPLES = {"mnli": 900, "rte": 50, "sst2": 300, "stsb": 2000}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def plan_of(*names: str, seeds: tuple[int, ...] = (1, 2), intermediate: bool = False) -> list[PlannedRun]:
    return make_plan([TASKS[name] for name in names], seeds, EXAMPLES, intermediate)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(str(tmp_path / "runs.jsonl"))


def record(run: PlannedRun, seconds: float = 1.0) -> dict[str, Any]:
    made = {"score": 50.0, "metrics": {}, "collapsed": False, "source": "s", "settings": {}, "seconds": seconds}
    return {"group": "g", "task": run.task.name, "seed": run.seed, **made}


def test_longest_first_then_by_seed() -> None:
    names = [run.name for run in plan_of("rte", "sst2", "stsb")]
    assert names == ["stsb-seed1", "stsb-seed2", "sst2-seed1", "sst2-seed2", "rte-seed1", "rte-seed2"]


def test_runs_that_start_from_mnli_name_the_one_of_their_seed() -> None:
    needs = {run.name: run.needs and run.needs.name for run in plan_of("rte", "sst2", "mnli", intermediate=True)}
    assert needs["rte-seed1"] == "mnli-seed1"
    assert needs["rte-seed2"] == "mnli-seed2"
    assert needs["sst2-seed1"] is needs["mnli-seed1"] is None
    assert all(run.needs is None for run in plan_of("rte", "sst2", "mnli"))


def test_a_run_waits_for_the_one_it_starts_from(store: RunStore, tmp_path: Path) -> None:
    """STS-B is longer than MNLI here, and comes first in the plan."""
    done: list[str] = []

    def do(run: PlannedRun) -> None:
        done.append(run.name)
        store.add(record(run))

    plan = plan_of("stsb", "mnli", seeds=(1,), intermediate=True)
    assert [run.task.name for run in plan] == ["stsb", "mnli"]
    assert do_all(plan, store, "g", str(tmp_path), do, now()) == []
    assert done == ["mnli-seed1", "stsb-seed1"]


def test_what_starts_from_a_failed_run_fails_with_it(store: RunStore, tmp_path: Path) -> None:
    def do(run: PlannedRun) -> None:
        if run.task.name == "mnli":
            raise RuntimeError("a loss\nof nan")
        store.add(record(run))

    failed = do_all(plan_of("rte", "mnli", "sst2", seeds=(1,), intermediate=True), store, "g", str(tmp_path), do, now())
    assert [(each["task"], each["error"]) for each in failed] == [
        ("mnli", "RuntimeError: a loss of nan"),
        ("rte", "not started, since mnli-seed1 failed"),
    ]
    assert [run["task"] for run in store.runs("g")] == ["sst2"]


def test_failures_of_an_earlier_start_are_tried_again(store: RunStore, tmp_path: Path) -> None:
    (run,) = plan_of("rte", seeds=(1,))
    glue_runs.add_failure(store, "g", run, "no")
    assert do_all([run], store, "g", str(tmp_path), lambda run: store.add(record(run)), now()) == []
    assert store.is_done("g", "rte", 1)
    assert store.failures("g") == []


def test_what_concerns_all_runs_ends_them(store: RunStore, tmp_path: Path) -> None:
    def do(run: PlannedRun) -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        do_all(plan_of("rte"), store, "g", str(tmp_path), do, now())
    assert store.failures("g") == []


def test_a_claimed_run_is_left_to_whoever_has_it(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done when the other is killed, without a record; and it is not done twice when the other ends well."""
    first, second = plan_of("rte")
    done: list[str] = []
    said: list[str] = []
    other = claim(str(tmp_path / "rte-seed1.lock"))
    assert other.__enter__()

    def sleep(seconds: float) -> None:
        assert done == ["rte-seed2"]
        other.__exit__(None, None, None)  # the lock is free: what the system does for a dead process

    def do(run: PlannedRun) -> None:
        done.append(run.name)
        store.add(record(run))

    monkeypatch.setattr(glue_runs.time, "sleep", sleep)
    do_all([first, second], store, "g", str(tmp_path), do, now(), said.append)
    assert done == ["rte-seed2", "rte-seed1"]
    assert said == ["waiting for 1 runs that other processes do"]
    do_all([first, second], store, "g", str(tmp_path), do, now())
    assert len(done) == 2


def test_a_run_that_another_ended_before_the_claim_is_not_done_again(store: RunStore, tmp_path: Path) -> None:
    """The other records it after this process has looked and before it has the lock."""
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

    assert do_all([run], Late(store.path), "g", str(tmp_path), do, now()) == []


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
    # STS-B: 0.1 s an example; RTE: 0.2 s; SST-2, unmeasured: 210 s for 2,050 examples.
    expected = [2000 * 0.1, 50 * 0.2, 2 * 300 * 210 / 2050]
    assert seconds_left(plan, done, 1) == pytest.approx(sum(expected))
    assert seconds_left(plan, done, 2) == pytest.approx(200)  # no shorter than the longest
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
    with processes.first_alone():
        assert processes.rank == 0


# --- in processes of their own


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_source(folder / "source"), write_data(folder / "data")


def scores(folder: Path) -> dict[str, Any]:
    """What must not depend on company or kills: every run's metrics at every epoch, and the statistics."""
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["failures"] == []
    kept = (
        "seed",
        "score",
        "metrics",
        "epochs",
        "collapsed",
        "steps",
        "train_examples",
        "dev_examples",
        "started_from",
    )
    return {
        name: {**{key: row[key] for key in ("mean", "std", "median", "best", "n")}}
        | {"runs": [{key: run[key] for key in kept} for run in row["runs"]]}
        for name, row in results["tasks"].items()
    }


@pytest.fixture(scope="module")
def reference(tiny: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`reference(*overrides)`: the scores of one undisturbed process."""

    @functools.cache
    def make(*overrides: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("reference")
        command = [sys.executable, GLUE, YAML, *settings(*tiny, folder), *overrides]
        done = programs.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return scores(folder)

    return make


TWO_TASKS = ("tasks=[sst2, stsb]", "seeds=[1, 2, 3]", "trainer.max_duration=1ep")


@pytest.mark.slow
def test_killed_three_times_the_table_is_the_same(
    tiny: tuple[str, str], tmp_path: Path, reference: Callable[..., dict[str, Any]]
) -> None:
    """SIGKILL at random moments, with a run on record more each time: in a run, a report, the start of the next."""
    rng = random.Random(0)
    path = tmp_path / "run" / "runs.jsonl"
    command = [sys.executable, GLUE, YAML, *settings(*tiny, tmp_path), *TWO_TASKS]

    def recorded() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for kill in range(3):
        process = programs.Program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while recorded() < kill and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0 if kill else 12.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = 6 - recorded()
    done = programs.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{6 - left} of 6 runs done" in done.stdout
    assert scores(tmp_path) == reference(*TWO_TASKS)
    runs = [(line["task"], line["seed"]) for line in map(json.loads, path.read_text().splitlines())]
    assert len(runs) == len(set(runs)) == 6  # none twice


def composer(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes under Composer's launcher."""
    command = [str(Path(sys.executable).with_name("composer")), "-n", "2", GLUE, YAML, *arguments]
    return programs.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_the_results_of_one(
    tiny: tuple[str, str], tmp_path: Path, reference: Callable[..., dict[str, Any]]
) -> None:
    done = composer(*settings(*tiny, tmp_path), *TWO_TASKS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 of 6 runs done" in done.stdout or "waiting for" in done.stdout
    assert done.stdout.count("# Dev scores") == 1
    assert scores(tmp_path) == reference(*TWO_TASKS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "runs.jsonl").read_text().splitlines()]
    assert sorted((line["task"], line["seed"]) for line in lines) == [
        (t, s) for t in ("sst2", "stsb") for s in (1, 2, 3)
    ]


@pytest.mark.distributed
@pytest.mark.slow
def test_bad_input_on_two_processes_is_one_line(tiny: tuple[str, str], tmp_path: Path) -> None:
    done = composer(*settings(*tiny, tmp_path), "tasks=[sst2, cola]")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "CoLA/train.tsv: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
