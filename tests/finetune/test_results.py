"""The record of runs, its groups, and the files that are made from it."""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import multiprocessing
import os
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT

from electra_composer.config import GlueConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune.results import check_results_path, group_of, open_store, summary, write_reports
from electra_composer.finetune.store import RunStore, store_path

SOURCE = {
    "name": "a model",
    "random_init": False,
    "sizes": {"hidden_size": 256, "dropout": 0.1},
    "weights_sha256": "aa" * 32,
    "vocabulary_sha256": "bb" * 32,
}


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., GlueConfig]:
    def make(*overrides: str) -> GlueConfig:
        folder = ["model.source=somewhere", f"checkpoints.folder={tmp_path}"]
        return load_config(str(ROOT / "yamls" / "glue.yaml"), [*folder, *overrides], GlueConfig)

    return make


def make_run(task: str, seed: int, score: float | None, group: str = "g", **changes: Any) -> dict[str, Any]:
    metric = {"cola": "matthews", "stsb": "spearman"}.get(task, "accuracy")
    run = {
        "group": group,
        "task": task,
        "seed": seed,
        "score": score,
        "metrics": {metric: score, "f1": 50.0},
        "collapsed": False,
        "source": "a model",
        "settings": {"optimizer.lr": 1e-4},
    }
    return {**run, **changes}


def test_what_is_added_is_read_by_another_store(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "folder" / "runs.jsonl")
    assert RunStore(path).runs() == []
    assert RunStore(path).failures("g") == []
    store = RunStore(path)
    store.add(make_run("sst2", 2, 91.0, epochs=[{"epoch": 1, "metrics": {"accuracy": 90.0}}]))
    other = RunStore(path)
    other.add(make_run("cola", 1, 0.1 + 0.2))
    assert [(run["task"], run["seed"]) for run in other.runs("g")] == [("cola", 1), ("sst2", 2)]
    assert store.runs()[0]["score"] == 0.1 + 0.2  # to the last digit
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
        # Longer than a pipe's or a page's atomic write, so that lines without a lock would mix.
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
    """Three bytes, half a line, and all but the line's end: none of them is a finished run."""
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
    if not content.endswith(b"\n"):  # what could be taken for a torn line is not cut off
        with pytest.raises(UserError, match="move the file away"):
            RunStore(str(path)).add(make_run("sst2", 1, 90.0))
    assert path.read_bytes() == content


def test_a_record_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        RunStore(str(tmp_path)).runs()


def test_a_full_disk_loses_no_finished_run(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk: half of the line goes in, then nothing more."""
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


def test_reports_on_a_full_disk_keep_the_former_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "results.json")
    store = RunStore(store_path(path))
    store.add(make_run("sst2", 1, 90.0, **real_settings()))
    write_reports(store, "g", path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    store.add(make_run("sst2", 2, 91.0, **real_settings()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*all finished runs are kept in .*runs\.jsonl"):
            write_reports(store, "g", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    del before["runs.jsonl"]
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "runs.jsonl"}
    assert after == before  # no temporary file either
    assert write_reports(store, "g", path)["tasks"]["sst2"]["n"] == 2


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


def test_groups_change_with_what_changes_scores_and_with_nothing_else(
    make_config: Callable[..., GlueConfig],
) -> None:
    key, settings = group_of(make_config(), SOURCE)
    assert (len(key), settings["optimizer.lr"]) == (12, 3e-4)
    assert settings["weights_sha256 of model.source"] == "aa" * 32
    assert int(key, 16) >= 0
    free = (
        ("run_name=other", "tasks=[rte]", "seeds=[9]", "trainer.log_interval=1ba", "data.num_workers=0"),
        ("trainer.progress_bar=false", "checkpoints.keep=1", "results=elsewhere.json", "predict.enabled=true"),
        ("data.cache=somewhere", "trainer.device_eval_batch_size=7"),
    )
    assert {group_of(make_config(*overrides), SOURCE)[0] for overrides in free} == {key}
    changed = ("optimizer.lr=1e-4", "data.max_seq_length=64", "trainer.max_duration=1ep", "model.dropout=0.0")
    changed += ("intermediate=true", "task_settings.rte.epochs=7", "seed=1")
    keys = [group_of(make_config(override), SOURCE)[0] for override in changed]
    # Random weights have no hash: there only the sizes tell two models apart.
    sources = [{**SOURCE, "weights_sha256": "cc"}, {**SOURCE, "sizes": {"hidden_size": 128, "dropout": 0.1}}]
    keys += [group_of(make_config(), source)[0] for source in sources]
    assert len({key, *keys}) == len(keys) + 1


def real_settings(*overrides: str, source: dict[str, Any] = SOURCE) -> dict[str, Any]:
    """`settings` as a run of the shipped YAML has them."""
    paths = ["model.source=somewhere", "checkpoints.folder=runs"]
    config = load_config(str(ROOT / "yamls" / "glue.yaml"), [*paths, *overrides], GlueConfig)
    return {"settings": group_of(config, source)[1]}


def test_a_store_is_opened_for_resuming_or_for_starting_anew(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config()
    store = open_store(config, "g")
    store.add(make_run("sst2", 1, 90.0))
    assert open_store(config, "g").is_done("g", "sst2", 1)
    alone = make_config("checkpoints.resume=false")
    with pytest.raises(UserError, match=r"checkpoints\.resume is false; .*checkpoints\.overwrite=true"):
        open_store(alone, "g")
    assert open_store(alone, "other").runs("other") == []  # no runs of these settings: nothing to resume
    assert open_store(make_config("checkpoints.overwrite=true"), "g").runs("g") == []


@pytest.mark.parametrize("content", ['{"tasks": 3}', "{", "[]", '{"tasks": {}}', "\x00"])
def test_another_file_in_the_place_of_the_results_is_refused(
    make_config: Callable[..., GlueConfig], tmp_path: Path, content: str
) -> None:
    config = make_config("checkpoints.overwrite=true")
    path = Path(config.results)
    check_results_path(str(path))
    path.write_text(content)
    with pytest.raises(UserError, match="exists, but is not a results file; move it away or set results="):
        open_store(config, "g")
    store = RunStore(store_path(config.results))
    store.add(make_run("sst2", 1, 90.0, **real_settings()))
    with pytest.raises(UserError, match="is not a results file"):
        write_reports(store, "g", config.results)
    assert path.read_text() == content


def test_summaries_against_the_statistics_module() -> None:
    scores = {3: 90.0, 1: 80.0, 2: 82.0}
    runs = [make_run("sst2", seed, score) for seed, score in scores.items()]
    runs += [make_run("cola", 1, 0.0, collapsed=True), make_run("cola", 2, 40.0), make_run("wnli", 1, 56.0)]
    results = summary(runs, {"hidden_size of model.source": 256}, "g")
    row = results["tasks"]["sst2"]
    assert list(results["tasks"]) == ["cola", "sst2", "wnli"]
    assert [run["seed"] for run in row["runs"]] == [1, 2, 3]
    assert row["mean"] == statistics.mean(scores.values())
    assert row["std"] == statistics.stdev(scores.values())
    assert (row["median"], row["best"], row["n"], row["collapsed"]) == (82.0, 90.0, 3, 0)
    assert row["metrics"] == {"accuracy": pytest.approx(84.0), "f1": 50.0}
    assert "settings" not in row["runs"][0]
    assert results["tasks"]["cola"]["collapsed"] == 1
    assert results["tasks"]["wnli"]["std"] is None
    assert results["average"] == {"tasks": ["cola", "sst2"], "mean": 52.0, "median": 51.0, "best": 65.0}
    assert results["average_without_wnli"] is None  # six of the eight are missing


def test_the_average_without_wnli_is_of_the_eight() -> None:
    eight = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    runs = [make_run(name, 1, 10.0 * index) for index, name in enumerate([*eight, "wnli"])]
    results = summary(runs, {})
    assert sorted(results["average"]["tasks"]) == sorted(eight)
    assert results["average_without_wnli"] == pytest.approx(35.0)
    undefined = [run if run["task"] != "stsb" else make_run("stsb", 1, None) for run in runs]
    results = summary(undefined, {})
    assert results["average_without_wnli"] is None
    assert results["tasks"]["stsb"]["mean"] is None


def test_an_undefined_score_leaves_the_best_and_no_mean() -> None:
    row = summary([make_run("stsb", 1, 80.0), make_run("stsb", 2, None, collapsed=True)], {})["tasks"]["stsb"]
    assert (row["mean"], row["std"], row["median"], row["best"], row["n"]) == (None, None, None, 80.0, 2)


def test_a_task_of_another_version_is_named() -> None:
    with pytest.raises(UserError, match="'superglue'"):
        summary([make_run("superglue", 1, 1.0)], {})


def test_a_changed_setting_is_a_new_group_and_the_report_names_the_difference(tmp_path: Path) -> None:
    path = str(tmp_path / "results.json")
    store = RunStore(store_path(path))
    store.add(make_run("sst2", 1, 90.0, group="old", **real_settings("optimizer.lr=1e-3")))
    store.add(make_run("cola", 1, 30.0, group="old", **real_settings("optimizer.lr=1e-3")))
    store.add(make_run("sst2", 1, 92.0, group="new", **real_settings()))
    results = write_reports(store, "new", path)
    assert results == json.loads(Path(path).read_text())
    assert [run["score"] for run in results["tasks"]["sst2"]["runs"]] == [92.0]
    assert "cola" not in results["tasks"]
    (other,) = results["other_groups"]
    assert (other["group"], other["runs"], other["differs"]) == ("old", 2, {"optimizer.lr": [0.001, 0.0003]})
    text = (tmp_path / "results.md").read_text()
    assert "- group old, 2 runs of a model: optimizer.lr = 0.001 (here 0.0003)" in text
    old = write_reports(store, "old", path)  # and back again: no run of either is lost
    assert list(old["tasks"]) == ["cola", "sst2"]


def test_the_files_do_not_depend_on_the_order_of_the_runs(tmp_path: Path) -> None:
    runs = [make_run(task, seed, 10.0 * seed, **real_settings()) for task in ("sst2", "cola") for seed in (1, 2, 3)]
    runs.append(make_run("sst2", 1, 1.0, group="other", **real_settings("optimizer.lr=1e-3")))
    contents = []
    for name, order in (("a", runs), ("b", runs[::-1])):
        path = str(tmp_path / name / "results.json")
        store = RunStore(store_path(path))
        for run in order:
            store.add(run)
        write_reports(store, "g", path)
        folder = tmp_path / name
        assert sorted(os.listdir(folder)) == ["results.csv", "results.json", "results.md", "results.png", "runs.jsonl"]
        contents.append([(folder / f"results.{end}").read_bytes() for end in ("json", "md", "csv", "png")])
    assert contents[0] == contents[1]
    assert contents[0][3].startswith(b"\x89PNG")


def test_a_group_with_failures_alone_has_a_report(tmp_path: Path) -> None:
    path = str(tmp_path / "results.json")
    store = RunStore(store_path(path))
    store.add_failure({"group": "g", "task": "rte", "seed": 4, "error": "out of\nmemory", "at": "2026-01-01"})
    results = write_reports(store, "g", path, real_settings()["settings"])
    assert results["tasks"] == {}
    text = (tmp_path / "results.md").read_text()
    assert "No finished run yet" in text
    assert "- RTE, seed 4, 2026-01-01: out of memory" in text
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 1
