"""Groups of finetuning runs, their summary, and the files written from the record."""

from __future__ import annotations

import csv
import functools
import json
import os
import resource
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from finetuning_runs import SOURCE, glue_config, make_run, settings_of

from electra_composer.errors import UserError
from electra_composer.finetuning.results import check_results_path, group_of, open_store, summary, write_reports
from electra_composer.finetuning.store import RunStore, store_path
from electra_composer.glue_config import GlueConfig


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., GlueConfig]:
    return functools.partial(glue_config, f"checkpoints.folder={tmp_path}")


def test_reports_on_a_full_disk_keep_the_former_ones(tmp_path: Path) -> None:
    path = str(tmp_path / "results.json")
    store = RunStore(store_path(path))
    store.add(make_run("sst2", 1, 90.0, settings=settings_of()))
    write_reports(store, "g", path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    store.add(make_run("sst2", 2, 91.0, settings=settings_of()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*all finished runs are kept in .*runs\.jsonl"):
            write_reports(store, "g", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    del before["runs.jsonl"]
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name != "runs.jsonl"}
    assert after == before  # and no temporary file
    assert write_reports(store, "g", path)["tasks"]["sst2"]["n"] == 2


def test_groups_change_with_what_changes_scores_and_with_nothing_else(
    make_config: Callable[..., GlueConfig],
) -> None:
    key, settings = group_of(make_config(), SOURCE)
    assert (len(key), settings["optimizer.lr"]) == (12, 3e-4)
    assert settings["weights_sha256 of model.source"] == SOURCE["weights_sha256"]
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
    # Random weights have no hash; only their sizes distinguish models.
    sources = [{**SOURCE, "weights_sha256": "cc"}, {**SOURCE, "sizes": {"hidden_size": 128, "dropout": 0.1}}]
    keys += [group_of(make_config(), source)[0] for source in sources]
    assert len({key, *keys}) == len(keys) + 1


def test_a_store_is_opened_for_resuming_or_for_starting_anew(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config()
    store = open_store(config, "g")
    store.add(make_run("sst2", 1, 90.0))
    assert open_store(config, "g").is_done("g", "sst2", 1)
    alone = make_config("checkpoints.resume=false")
    with pytest.raises(UserError, match=r"checkpoints\.resume is false; .*checkpoints\.overwrite=true"):
        open_store(alone, "g")
    assert open_store(alone, "other").runs("other") == []  # no runs with these settings
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
    store.add(make_run("sst2", 1, 90.0, settings=settings_of()))
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
    store.add(make_run("sst2", 1, 90.0, group="old", settings=settings_of("optimizer.lr=1e-3")))
    store.add(make_run("cola", 1, 30.0, group="old", settings=settings_of("optimizer.lr=1e-3")))
    store.add(make_run("sst2", 1, 92.0, group="new", settings=settings_of()))
    results = write_reports(store, "new", path)
    assert results == json.loads(Path(path).read_text())
    assert [run["score"] for run in results["tasks"]["sst2"]["runs"]] == [92.0]
    assert "cola" not in results["tasks"]
    (other,) = results["other_groups"]
    assert (other["group"], other["runs"], other["differs"]) == ("old", 2, {"optimizer.lr": [0.001, 0.0003]})
    text = (tmp_path / "results.md").read_text()
    assert "- group old, 2 runs of a model: optimizer.lr = 0.001 (here 0.0003)" in text
    old = write_reports(store, "old", path)  # switch back: no run of either group is lost
    assert list(old["tasks"]) == ["cola", "sst2"]


def test_the_files_do_not_depend_on_the_order_of_the_runs(tmp_path: Path) -> None:
    runs = [
        make_run(task, seed, 10.0 * seed, settings=settings_of()) for task in ("sst2", "cola") for seed in (1, 2, 3)
    ]
    runs.append(make_run("sst2", 1, 1.0, group="other", settings=settings_of("optimizer.lr=1e-3")))
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
    results = write_reports(store, "g", path, settings_of())
    assert results["tasks"] == {}
    text = (tmp_path / "results.md").read_text()
    assert "No finished run yet" in text
    assert "- RTE, seed 4, 2026-01-01: out of memory" in text
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 1
