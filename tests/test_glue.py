"""Finetuning end to end on tiny data: results, resuming, failures, settings, errors."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning_runs import glue_config
from glue_tiny import settings, write_data, write_source

from electra_composer import glue
from electra_composer.checkpoints.weights import load_source
from electra_composer.errors import UserError
from electra_composer.finetuning.model import build_classifier
from electra_composer.finetuning.one_run import config_of_task
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue_config import GlueConfig, GlueModelConfig
from electra_composer.training import devices


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("glue"))


@pytest.fixture
def make_config(source: str, data: str, tmp_path: Path) -> Callable[..., GlueConfig]:
    return functools.partial(glue_config, *settings(source, data, tmp_path))


def test_two_tasks_and_seeds_from_files_to_table(
    make_config: Callable[..., GlueConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("tasks=[SST-2, stsb]", "seeds=[1, 2]", "trainer.max_duration=1ep")
    results = glue.main(config)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["failures"] == []
    assert list(results["tasks"]) == ["sst2", "stsb"]
    sst2, stsb = results["tasks"]["sst2"], results["tasks"]["stsb"]
    assert [run["seed"] for run in sst2["runs"]] == [1, 2]
    scores = [run["score"] for run in sst2["runs"]]
    assert all(run["score"] == run["metrics"]["accuracy"] for run in sst2["runs"])
    # Accuracy × 100 over 23 examples, each counted once.
    assert all(score * 23 / 100 == pytest.approx(round(score * 23 / 100), abs=1e-3) for score in scores)
    assert sst2["mean"] == pytest.approx(sum(scores) / 2)
    assert sst2["std"] == pytest.approx(abs(scores[0] - scores[1]) / math.sqrt(2))
    assert [run["steps"] for run in sst2["runs"]] == [8, 8]
    assert [(run["train_examples"], run["steps"]) for run in stsb["runs"]] == [
        (128, 16),
        (128, 16),
    ]  # swapped
    assert set(stsb["runs"][0]["metrics"]) == {"spearman", "pearson"}
    out = capsys.readouterr().out
    assert "0 of 4 runs done" in out
    assert "STS-B, seed 2: 128 training, 23 dev examples" in out
    assert out.index("STS-B, seed 1") < out.index("SST-2, seed 1")  # longest first
    assert re.search(r"stsb-seed1: .* in \d+ s; 1 of 4 runs done, about \d+ s left", out)
    assert "4 of 4 runs done\n" in out
    assert (tmp_path / "run" / "results.md").read_text() in out


def test_finetuning_learns_what_can_be_learnt(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config(
        "trainer.max_duration=20ep", "optimizer.lr=5e-3", "optimizer.layerwise_decay=null", "model.dropout=0.0"
    )
    assert glue.main(config)["tasks"]["sst2"]["mean"] > 85


def test_same_seed_same_score_and_epochs_of_the_task(make_config: Callable[..., GlueConfig], tmp_path: Path) -> None:
    first = glue.main(make_config("trainer.max_duration=null"))["tasks"]["sst2"]["runs"][0]
    again = make_config("trainer.max_duration=null", f"results={tmp_path}/again.json")
    second = glue.main(again)["tasks"]["sst2"]["runs"][0]
    assert first["metrics"] == second["metrics"]
    assert first["steps"] == 3 * 8  # three epochs of 64 examples in batches of 8


def test_autocast_on_the_cpu_runs(make_config: Callable[..., GlueConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)  # emulated, slowly, where it does not
    assert 0 <= glue.main(make_config("trainer.precision=amp_bf16"))["tasks"]["sst2"]["mean"] <= 100


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the started runs in order; seed 3 fails, seed 4 is interrupted."""
    names: list[str] = []
    finetune = glue.finetune

    def counted(config: Any, source: Any, run: Any, *rest: Any) -> dict[str, Any]:
        names.append(run.name)
        if run.seed == 3:
            raise RuntimeError("CUDA out of memory")
        if run.seed == 4:
            raise KeyboardInterrupt
        return finetune(config, source, run, *rest)

    monkeypatch.setattr(glue, "finetune", counted)
    return names


def test_a_later_start_does_what_is_missing(make_config: Callable[..., GlueConfig], trained: list[str]) -> None:
    before = glue.main(make_config())
    with pytest.raises(KeyboardInterrupt):
        glue.main(make_config("seeds=[1, 2, 4]"))
    assert trained == ["sst2-seed1", "sst2-seed2", "sst2-seed4"]
    after = glue.main(make_config("seeds=[1, 2]"))
    assert trained == ["sst2-seed1", "sst2-seed2", "sst2-seed4"]  # earlier runs were kept
    assert after["tasks"]["sst2"]["runs"][0] == before["tasks"]["sst2"]["runs"][0]
    assert [run["seed"] for run in after["tasks"]["sst2"]["runs"]] == [1, 2]


def test_runs_are_kept_if_nothing_changes_that_affects_scores(
    make_config: Callable[..., GlueConfig], trained: list[str], tmp_path: Path
) -> None:
    before = glue.main(make_config())
    other = ["run_name=other", "data.num_workers=1", f"data.cache={tmp_path / 'cache'}", "trainer.eval_interval=1dur"]
    other += ["trainer.device_eval_batch_size=7", "trainer.log_interval=1ba", "checkpoints.interval=1ep"]
    other += ["callbacks={}", "loggers={}", "predict.select=ensemble"]
    assert glue.main(make_config(*other))["tasks"] == before["tasks"]
    assert trained == ["sst2-seed1"]
    with pytest.raises(UserError, match=r"sst2-seed1\.npz: no such file: the run had predict\.enabled=false"):
        glue.main(make_config("predict.enabled=true"))


def test_a_failed_run_is_reported_and_the_others_go_on(
    make_config: Callable[..., GlueConfig], trained: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for start in (1, 2):
        with pytest.raises(SystemExit) as exit_:
            glue.main(make_config("seeds=[3, 5]"))
        assert exit_.value.code == 1
        assert trained.count("sst2-seed3") == start  # once per start
    assert trained.count("sst2-seed5") == 1
    assert "1 runs failed; rerun the same command to retry them:\n  sst2-seed3: RuntimeError: CUDA out of memory" in (
        capsys.readouterr().err
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [run["seed"] for run in results["tasks"]["sst2"]["runs"]] == [5]
    assert [failure["seed"] for failure in results["failures"]] == [3]


def test_another_setting_is_another_group_and_never_mixed(
    make_config: Callable[..., GlueConfig], trained: list[str], tmp_path: Path
) -> None:
    glue.main(make_config())
    after = glue.main(make_config("optimizer.lr=1e-3"))
    assert trained == ["sst2-seed1"] * 2
    assert after["tasks"]["sst2"]["n"] == 1
    (other,) = after["other_groups"]
    assert other["differs"] == {"optimizer.lr": [2e-3, 1e-3]}
    with pytest.raises(UserError, match=r"checkpoints\.resume is false"):
        glue.main(make_config("checkpoints.resume=false"))
    glue.main(make_config("checkpoints.overwrite=true"))
    assert trained == ["sst2-seed1"] * 3


def test_scores_of_every_epoch_are_kept(make_config: Callable[..., GlueConfig]) -> None:
    run = glue.main(make_config())["tasks"]["sst2"]["runs"][0]
    assert [(epoch["epoch"], epoch["step"]) for epoch in run["epochs"]] == [(1, 8), (2, 16)]
    assert run["epochs"][-1]["metrics"] == run["metrics"]
    assert run["collapsed"] in (False, True)


def test_a_model_that_gives_one_answer_has_collapsed(make_config: Callable[..., GlueConfig], source: str) -> None:
    """After steps at a far too high learning rate without clipping, the output is constant."""
    learnt = glue.main(make_config("trainer.max_duration=20ep", "optimizer.lr=5e-3", "model.dropout=0.0"))
    assert learnt["tasks"]["sst2"]["collapsed"] == 0
    dead = glue.main(make_config("optimizer.lr=3.0", "optimizer.layerwise_decay=null", "trainer.gradient_clip=null"))
    assert dead["tasks"]["sst2"]["collapsed"] == 1
    assert dead["tasks"]["sst2"]["runs"][0]["collapsed"] is True


@pytest.mark.parametrize(
    ("name", "predictions", "constant"),
    [
        ("sst2", [[1, 1], [1]], True),
        ("sst2", [[1, 1], [0]], False),
        ("stsb", [[0.5, 0.5004], [0.5001]], True),  # of 0…1
        ("stsb", [[0.5, 0.5004], [0.52]], False),
    ],
)
def test_one_answer_to_all_is_a_collapse(
    source: str, name: str, predictions: list[list[float]], constant: bool
) -> None:
    model = build_classifier(load_source(source), TASKS[name], GlueModelConfig(source=source))
    metric = model.get_metrics(is_train=False)["collapsed"]
    for batch in predictions:
        metric.update(torch.tensor(batch), torch.zeros(len(batch)))
    assert bool(metric.compute()) is constant


def test_settings_of_one_task(make_config: Callable[..., GlueConfig]) -> None:
    config = make_config(
        "tasks=[sst2, stsb]",
        "trainer.max_duration=1ep",
        "task_settings.STS-B.epochs=2",
        "task_settings.STS-B.batch_size=16",
        "double_unordered=false",
    )
    results = glue.main(config)
    assert [(run["train_examples"], run["steps"]) for run in results["tasks"]["stsb"]["runs"]] == [(64, 8)]
    assert [(run["train_examples"], run["steps"]) for run in results["tasks"]["sst2"]["runs"]] == [(64, 8)]
    mine = config_of_task(
        make_config("task_settings={sst2: {lr: 1e-5, layerwise_decay: 1.0, warmup: 3ba}}"), TASKS["sst2"]
    )
    assert (mine.optimizer.lr, mine.optimizer.layerwise_decay, mine.schedule.warmup) == (1e-5, 1.0, "3ba")
    others = config_of_task(make_config("task_settings={sst2: {lr: 1e-5}}"), TASKS["stsb"])
    assert others.optimizer.lr == 2e-3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[sst-3]"], r"no task called 'sst-3'; did you mean sst2\?"),
        (["tasks=[]"], "tasks is empty"),
        (["seeds=[1, 1]"], "seeds is .*different"),
        (["max_train_examples=0"], "max_train_examples is 0"),
        (["data.path=/nowhere"], "/nowhere: no such folder"),
        (["tasks=[sst2, cola]"], "CoLA/train.tsv: no such file"),
        (["data.max_seq_length=64"], "max_seq_length is 64, but .* has 32 positions"),
        (["checkpoints.load_path=x.pt"], "set model.source instead"),
        (["trainer.fsdp={}"], "a finetuning run has one device"),
        (["trainer.precision=amp_fp16"], "trainer.precision"),
        (["trainer.eval_interval=0ba"], "trainer.eval_interval is '0ba'"),
        (["trainer.eval_batches=2"], "all examples are scored"),
        (["task_settings={sst3: {lr: 1.0}}"], r"task_settings.sst3: no such task; did you mean sst2\?"),
        (["task_settings={sst2: {lr: -1.0}}"], r"task_settings.sst2.lr is -1.0; expected a number in \(0, 10\]"),
        (["task_settings={sst2: {warmup: soon}}"], r"task_settings.sst2.warmup is 'soon'"),
        (["intermediate=true"], "add mnli to tasks"),
        (["tasks=[ax]"], "ax is predicted by the runs of mnli; add mnli"),
        (
            ["predict.enabled=true", "predict.select=worst"],
            r"predict.select is 'worst'; expected best, ensemble, .*\[1\]",
        ),
        (["predict.enabled=true"], "SST-2/test.tsv: no such file"),
    ],
)
def test_bad_input_is_one_line(
    make_config: Callable[..., GlueConfig], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        glue.main(make_config(*overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task_settings={sst2: {epoch: 3}}", r"task_settings.sst2.epoch; did you mean task_settings.sst2.epochs\?"),
        ("task_settings={sst2: {epochs: many}}", "task_settings.sst2.epochs is .many.; expected an integer"),
        ("task_settings.sst2=3", "task_settings"),
        ("predict.selcet=best", r"did you mean predict.select\?"),
    ],
)
def test_settings_are_checked_strictly(make_config: Callable[..., GlueConfig], override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(override)
