"""Finetuning results do not depend on kills or on the number of processes."""

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

GLUE = str(ROOT / "electra_composer" / "glue.py")
YAML = str(ROOT / "yamls" / "glue.yaml")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TWO_TASKS = ("tasks=[sst2, stsb]", "seeds=[1, 2, 3]", "trainer.max_duration=1ep")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_source(folder / "source"), write_data(folder / "data")


def scores(folder: Path) -> dict[str, Any]:
    """Return what must not depend on processes or kills: metrics of every run and epoch, and the statistics."""
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
    """`reference(*overrides)` returns the scores of one undisturbed process."""

    @functools.cache
    def make(*overrides: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("reference")
        command = [sys.executable, GLUE, YAML, *settings(*tiny, folder), *overrides]
        done = programs.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return scores(folder)

    return make


@pytest.mark.slow
def test_killed_three_times_the_table_is_the_same(
    tiny: tuple[str, str], tmp_path: Path, reference: Callable[..., dict[str, Any]]
) -> None:
    """SIGKILL at random moments, each after one more recorded run: in a run, a report, or the start of the next."""
    rng = random.Random(0)
    path = tmp_path / "run" / "runs.jsonl"
    command = [sys.executable, GLUE, YAML, *settings(*tiny, tmp_path), *TWO_TASKS]

    def recorded() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for kill in range(3):
        process = programs.Program(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
        while recorded() < kill and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.0 if kill else 5.0))
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
    """Run two processes under Composer's launcher."""
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
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: ") == 1
    assert "Begin global rank" not in done.stdout, done.stdout + done.stderr
    assert "CoLA/train.tsv: no such file" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
