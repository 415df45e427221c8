"""Append-only record of finetuning runs: concurrency, incomplete lines, full disks, restarts."""

from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from finetuning_runs import make_run

from electra_composer.errors import UserError
from electra_composer.finetuning.store import RunStore


def test_what_is_added_is_read_by_another_store(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "folder" / "runs.jsonl")
    assert RunStore(path).runs() == []
    assert RunStore(path).failures("g") == []
    store = RunStore(path)
    store.add(make_run("sst2", 2, 91.0, epochs=[{"epoch": 1, "metrics": {"accuracy": 90.0}}]))
    other = RunStore(path)
    other.add(make_run("cola", 1, 0.1 + 0.2))
    assert [(run["task"], run["seed"]) for run in other.runs("g")] == [("cola", 1), ("sst2", 2)]
    assert store.runs()[0]["score"] == 0.1 + 0.2  # exactly
    assert store.runs()[1]["epochs"] == [{"epoch": 1, "metrics": {"accuracy": 90.0}}]
    assert store.is_done("g", "sst2", 2)
    assert not any(store.is_done(*key) for key in (("g", "sst2", 1), ("g", "cola", 2), ("h", "sst2", 2)))
    assert store.runs("h") == []
    assert set(store.runs()[0]["versions"]) == {"electra-composer", "torch", "mosaicml", "transformers", "torchmetrics"}


def test_undefined_numbers_become_null(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.jsonl"))
    run = make_run("stsb", 1, math.nan, epochs=[{"metrics": {"pearson": math.inf, "spearman": 1.0}}])
    store.add(run)
    (found,) = store.runs()
    assert found["score"] is None
    assert found["epochs"] == [{"metrics": {"pearson": None, "spearman": 1.0}}]


def test_a_run_without_its_score_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    run = make_run("sst2", 1, 90.0)
    del run["score"], run["seed"]
    with pytest.raises(ValueError, match="a run record needs score, seed"):
        RunStore(str(tmp_path / "runs.jsonl")).add(run)


def add_many(path: str, first_seed: int) -> None:
    store = RunStore(path)
    for seed in range(first_seed, first_seed + 25):
        # Longer than an atomic write to a pipe or page, so that lines would mix without a lock.
        store.add(make_run("sst2", seed, float(seed), padding="x" * 20_000))


def test_processes_that_append_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "runs.jsonl")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(path, 25 * index)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    lines = Path(path).read_text().splitlines()
    assert len(lines) == 100
    assert {json.loads(line)["seed"] for line in lines} == set(range(100))
    assert [run["seed"] for run in RunStore(path).runs("g")] == list(range(100))


@pytest.mark.parametrize("keep", [3, 40, -1])
def test_a_torn_last_line_is_dropped_and_then_replaced(
    tmp_path: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Three bytes, part of a line, and all but the line break: none is a finished run."""
    path = tmp_path / "runs.jsonl"
    store = RunStore(str(path))
    store.add(make_run("sst2", 1, 90.0))
    whole = path.read_bytes()
    store.add(make_run("sst2", 2, 91.0))
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:keep])
    with caplog.at_level(logging.WARNING):
        store = RunStore(str(path))
        assert [run["seed"] for run in store.runs("g")] == [1]
        assert not store.is_done("g", "sst2", 2)
    assert caplog.text.count("the last line is incomplete") == 1
    store.add(make_run("sst2", 3, 92.0))
    assert [run["seed"] for run in RunStore(str(path)).runs("g")] == [1, 3]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"a shopping list", ""),
        (b"a shopping list\n", ":1"),
        (b'{"tasks": {}}\n', ":1"),
        (b"[1, 2]\n", ":1"),
        (b'{"kind": "run", "group": "g"}\n', ":1"),
        (b"\x89PNG\r\n\x1a\n\xff", ""),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path, content: bytes, where: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"runs\.jsonl{where}: .*move the file away or set another results="):
        RunStore(str(path)).runs()
    if not content.endswith(b"\n"):  # it is not removed as an incomplete line
        with pytest.raises(UserError, match="move the file away"):
            RunStore(str(path)).add(make_run("sst2", 1, 90.0))
    assert path.read_bytes() == content


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        RunStore(str(tmp_path)).runs()


def test_a_full_disk_loses_no_finished_run(tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: only part of the line is written."""
    path = tmp_path / "runs.jsonl"
    store = RunStore(str(path))
    store.add(make_run("sst2", 1, 90.0))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        with pytest.raises(UserError, match=r"run sst2, seed 2 \(score 91.0\) cannot be written: .*rerun the command"):
            store.add(make_run("sst2", 2, 91.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    store.add(make_run("sst2", 2, 91.0))
    assert [run["seed"] for run in store.runs("g")] == [1, 2]


def test_a_disk_that_fails_at_once_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = RunStore(str(tmp_path / "runs.jsonl"))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left on device"):
        store.add(make_run("sst2", 1, 90.0))
    monkeypatch.undo()
    assert store.runs() == []


def test_failures_are_not_done_and_go_when_the_run_succeeds(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.jsonl"))
    for error in ("first", "second"):
        store.add_failure({"group": "g", "task": "sst2", "seed": 1, "error": error, "at": "now"})
    store.add_failure({"group": "h", "task": "sst2", "seed": 1, "error": "elsewhere", "at": "now"})
    assert not store.is_done("g", "sst2", 1)
    assert store.runs() == []
    assert [failure["error"] for failure in store.failures("g")] == ["second"]
    store.add(make_run("sst2", 1, 90.0))
    assert store.failures("g") == []
    assert len(store.failures("h")) == 1


def test_the_first_of_two_runs_of_one_seed_counts(tmp_path: Path) -> None:
    store = RunStore(str(tmp_path / "runs.jsonl"))
    store.add(make_run("sst2", 1, 90.0))
    store.add(make_run("sst2", 1, 95.0))
    assert [run["score"] for run in store.runs()] == [90.0]


def test_a_restart_puts_aside_the_runs_of_its_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    store = RunStore(str(path))
    store.add(make_run("sst2", 1, 90.0))
    store.add(make_run("sst2", 1, 80.0, group="h"))
    store.restart("g")
    assert [run["group"] for run in store.runs()] == ["h"]
    store.add(make_run("sst2", 1, 95.0))
    assert [run["score"] for run in store.runs("g")] == [95.0]
    assert path.read_text().count("\n") == 4  # nothing is erased
