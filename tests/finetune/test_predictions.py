"""Test-set predictions: which runs speak, what the server is told, what it would refuse; and the whole way there."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glue_tiny import settings, write_data, write_source
from safetensors.torch import load_file
from tiny import ROOT

from electra_composer import glue
from electra_composer.checkpoints.weights import load_source
from electra_composer.config import GlueConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune import one_run as glue_finetune
from electra_composer.finetune.data import collate, encode_split
from electra_composer.finetune.one_run import RunFiles, TaskData, finetune
from electra_composer.finetune.predictions import (
    SERVER_ROWS,
    answers,
    check_indices,
    check_select,
    check_submission,
    load_logits,
    missing_of,
    save_logits,
    select_runs,
    submission_files,
    write_submission,
)
from electra_composer.finetune.runs import PlannedRun
from electra_composer.finetune.tasks import TASKS
from electra_composer.training.runs import start

NLI = ("entailment", "neutral", "contradiction")


def runs_of(task: str, *scores: float | None) -> list[dict[str, Any]]:
    return [{"task": task, "seed": seed, "score": score} for seed, score in enumerate(scores, 1)]


# --- what the server is told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnli", ["entailment", "neutral", "contradiction"]),
        ("ax", ["entailment", "neutral", "contradiction"]),
        ("qnli", ["entailment", "not_entailment"]),
        ("rte", ["entailment", "not_entailment"]),
        ("cola", ["0", "1"]),
        ("wnli", ["0", "1"]),
        ("qqp", ["0", "1"]),
    ],
)
def test_classes_are_written_as_the_server_has_them(name: str, expected: list[str]) -> None:
    assert answers(TASKS[name], torch.eye(len(expected))) == expected


def test_scores_have_three_decimals_and_stay_within_the_scale() -> None:
    task = TASKS["stsb"]  # trained as 0…1
    logits = torch.tensor([[-0.3], [0.0], [0.432], [1.0], [1.7]])
    assert answers(task, logits) == ["0.000", "0.000", "2.160", "5.000", "5.000"]
    raw = dataclasses.replace(task, target_scale=1.0)
    assert answers(raw, logits * 5) == answers(task, logits)


# --- which runs speak


def test_the_best_run_on_dev_a_named_one_or_all() -> None:
    task, runs = TASKS["rte"], runs_of("rte", 60.0, 70.0, None, 70.0)
    assert [run["seed"] for run in select_runs(runs, task, "best")] == [2]
    assert [run["seed"] for run in select_runs(runs, task, "3")] == [3]
    assert [run["seed"] for run in select_runs(runs, task, "ensemble")] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"predict.select is 9, but RTE has no finished run of this seed"):
        select_runs(runs, task, "9")
    with pytest.raises(UserError, match="no run of RTE has a score"):
        select_runs(runs_of("rte", None), task, "best")
    with pytest.raises(UserError, match=r"'bset'; expected best, ensemble, or one of the seeds \[1, 2\]"):
        check_select("bset", [1, 2])
    check_select("2", [1, 2])


def test_an_ensemble_is_the_mean_of_logits_and_no_vote(tmp_path: Path) -> None:
    """Two of three say class 0, narrowly; the third says class 1 loudly."""

    def path(name: str) -> str:
        return str(tmp_path / f"{name}.npz")

    for seed, logits in ((1, [[0.2, 0.0]]), (2, [[0.3, 0.0]]), (3, [[0.0, 2.0]])):
        save_logits(path(f"rte-seed{seed}"), {"rte-test": torch.tensor(logits)})
    runs = runs_of("rte", 50.0, 60.0, 55.0)
    tasks = [TASKS["rte"]]
    assert submission_files(tasks, runs, "best", path)["RTE.tsv"][1] == ["entailment"]
    assert submission_files(tasks, runs, "3", path)["RTE.tsv"][1] == ["not_entailment"]
    assert submission_files(tasks, runs, "ensemble", path)["RTE.tsv"][1] == ["not_entailment"]


def test_ax_is_answered_by_the_best_mnli_run(tmp_path: Path) -> None:
    def path(name: str) -> str:
        return str(tmp_path / f"{name}.npz")

    for seed in (1, 2):
        row = torch.nn.functional.one_hot(torch.tensor([seed]), 3).float()
        save_logits(path(f"mnli-seed{seed}"), dict.fromkeys(("mnli-test", "mnli-test_mm", "ax-test"), row))
    files = submission_files([TASKS["mnli"], TASKS["ax"]], runs_of("mnli", 60.0, 70.0), "best", path)
    assert {name: lines for name, (_, lines) in files.items()} == {
        name: ["contradiction"] for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv")
    }


# --- files


def test_logits_come_back_and_run_no_code(tmp_path: Path) -> None:
    path = str(tmp_path / "logits" / "a.npz")
    logits = {"rte-test": torch.randn(5, 2), "ax-test": torch.randn(3, 3)}
    save_logits(path, logits)
    found = load_logits(path)
    assert found.keys() == logits.keys()
    assert all(torch.equal(found[name], logits[name]) for name in logits)
    assert os.listdir(tmp_path / "logits") == ["a.npz"]
    with pytest.raises(UserError, match=r"no such file: the run was done with predict.enabled=false"):
        load_logits(str(tmp_path / "b.npz"))
    np.savez(path, a=np.array([{}], dtype=object))  # a pickle
    with pytest.raises(UserError, match="not the logits of a run"):
        load_logits(path)
    Path(path).write_bytes(Path(path).read_bytes()[:20])
    with pytest.raises(UserError, match="not the logits of a run"):
        load_logits(path)


def test_a_test_set_out_of_order_is_refused() -> None:
    check_indices(np.arange(4), "RTE test")
    check_indices(None, "AX test")
    with pytest.raises(UserError, match="RTE test: index 3 stands at place 2; expected 0, 1, 2"):
        check_indices(np.array([0, 1, 3]), "RTE test")


FILES = {"RTE.tsv": (TASKS["rte"], ["entailment", "not_entailment"]), "STS-B.tsv": (TASKS["stsb"], ["0.000", "4.250"])}


def test_a_submission_has_the_servers_columns_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "submission.zip"
    write_submission(str(path), FILES)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["RTE.tsv", "STS-B.tsv"]
        assert archive.read("RTE.tsv") == b"index\tprediction\n0\tentailment\n1\tnot_entailment\n"
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t0.000\n1\t4.250\n"
    before = path.read_bytes()
    write_submission(str(path), FILES)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path / "out") == ["submission.zip"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"RTE.tsv": "index\tprediction\n0\tentailment\n"}, "RTE.tsv: 1 predictions; expected 2"),
        ({"RTE.tsv": "index\tlabel\n0\tentailment\n1\tentailment\n"}, "the header is 'index.tlabel'"),
        ({"RTE.tsv": "index\tprediction\n1\tentailment\n0\tentailment\n"}, "index '1' stands where 0 is expected"),
        ({"RTE.tsv": "index\tprediction\n0\t1\n1\tentailment\n"}, "prediction '1' of index 0 is none of RTE"),
        ({"CoLA.tsv": "index\tprediction\n"}, "holds CoLA.tsv; expected RTE.tsv"),
    ],
)
def test_what_the_server_would_refuse(tmp_path: Path, contents: dict[str, str], message: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    with pytest.raises(UserError, match=message):
        check_submission(str(path), {"RTE.tsv": (TASKS["rte"], 2)})


def test_wrong_answers_never_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write_submission(str(path), FILES)
    before = path.read_bytes()
    for answer in ("5.001", "nan", "high"):
        with pytest.raises(UserError, match="is none of STS-B"):
            write_submission(str(path), {"STS-B.tsv": (TASKS["stsb"], [answer])})
    assert path.read_bytes() == before


def test_what_a_whole_submission_lacks() -> None:
    whole = {name: (TASKS["cola"], ["0"] * rows) for name, rows in SERVER_ROWS.items()}
    assert missing_of(whole) is None
    assert set(SERVER_ROWS) == {name for task in TASKS.values() for name in task.submission.values()}
    del whole["AX.tsv"]
    whole["WNLI.tsv"] = (TASKS["wnli"], ["0"] * 10)
    assert missing_of(whole) == "no AX.tsv; WNLI.tsv has 10 predictions, not 146"


# --- the whole way


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_source(folder / "source"), write_data(folder / "data", tests=True)


@pytest.fixture
def make_config(tiny: tuple[str, str], tmp_path: Path) -> Callable[..., GlueConfig]:
    common = ["trainer.max_duration=1ep", "trainer.device_eval_batch_size=4", "predict.enabled=true"]

    def make(*overrides: str) -> GlueConfig:
        overrides = (*settings(*tiny, tmp_path), *common, *overrides)
        return load_config(str(ROOT / "yamls" / "glue.yaml"), list(overrides), GlueConfig)

    return make


def predictions(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    return {name: [line.split("\t")[1] for line in text.splitlines()[1:]] for name, text in texts.items()}


@pytest.mark.slow
def test_from_runs_to_a_submission(
    make_config: Callable[..., GlueConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained: list[str] = []
    started: dict[str, Any] = {}  # run → the weights it was built from
    build = glue_finetune.build_classifier

    def recorded_build(source: Any, *rest: Any) -> Any:
        if trained:  # the rehearsal before the first run builds, too
            started[trained[-1]] = source.weights
        return build(source, *rest)

    def recorded(config: Any, source: Any, run: Any, *rest: Any) -> dict[str, Any]:
        trained.append(run.name)
        return finetune(config, source, run, *rest)

    monkeypatch.setattr(glue_finetune, "build_classifier", recorded_build)
    monkeypatch.setattr(glue, "finetune", recorded)
    tasks, file = "tasks=[rte, mnli, ax, stsb, sst2]", tmp_path / "run" / "submission.zip"
    results = glue.main(make_config(tasks, "seeds=[1, 2]", "intermediate=true"))
    (group,) = (tmp_path / "run").glob("*/logits")

    # MNLI: both dev sets, at every evaluation; both test sets and AX.
    mnli = results["tasks"]["mnli"]
    assert (
        set(mnli["runs"][0]["metrics"]) == set(mnli["runs"][0]["epochs"][0]["metrics"]) == {"accuracy", "accuracy_mm"}
    )
    assert mnli["runs"][0]["dev_examples"] == 46
    found = predictions(file)
    assert {name: len(lines) for name, lines in found.items()} == dict.fromkeys(
        ["SST-2.tsv", "STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv", "AX.tsv"], 11
    )
    best = max(mnli["runs"], key=lambda run: run["score"])["seed"]
    logits = load_logits(str(group / f"mnli-seed{best}.npz"))
    assert found["AX.tsv"] == [NLI[index] for index in logits["ax-test"].argmax(-1).tolist()]
    out = capsys.readouterr().out
    assert "the GLUE server expects a complete submission: no CoLA.tsv, MRPC.tsv, QQP.tsv, QNLI.tsv, WNLI.tsv" in out

    # RTE and STS-B start from MNLI's weights of their seed, SST-2 from the source's.
    for name, started_from in (("rte", "mnli-seed2"), ("stsb", "mnli-seed2"), ("sst2", None)):
        assert results["tasks"][name]["runs"][1]["started_from"] == started_from
    kept = load_file(group.parent / "weights" / "mnli-seed2.safetensors")
    assert started["rte-seed2"].keys() == kept.keys() == started["sst2-seed2"].keys()
    assert all(torch.equal(started["rte-seed2"][name], tensor) for name, tensor in kept.items())
    word = "embeddings.word.weight"
    assert not torch.equal(started["rte-seed2"][word], started["sst2-seed2"][word])

    # Another choice of runs trains nothing.
    count = len(trained)
    glue.main(make_config(tasks, "seeds=[1, 2]", "intermediate=true", "predict.select=ensemble"))
    assert len(trained) == count == 8
    both = [load_logits(str(group / f"rte-seed{seed}.npz"))["rte-test"] for seed in (1, 2)]
    expected = answers(TASKS["rte"], torch.stack(both).mean(0))
    assert predictions(file)["RTE.tsv"] == expected

    # Without the weights that others start from, or the logits that are asked for, nothing starts.
    (group.parent / "weights" / "mnli-seed1.safetensors").unlink()
    with pytest.raises(UserError, match=r"mnli-seed1.safetensors: no such file, but runs of RTE"):
        glue.main(make_config(tasks, "seeds=[1, 2, 3]", "intermediate=true", "predict.enabled=false"))
    (group / "sst2-seed1.npz").unlink()
    with pytest.raises(UserError, match=r"sst2-seed1.npz: no such file: the run was done with predict.enabled=false"):
        glue.main(make_config("tasks=[sst2, mnli]", "seeds=[1, 2, 3]", "intermediate=true"))
    assert len(trained) == count


def test_logits_are_in_the_order_of_the_file(
    make_config: Callable[..., GlueConfig], tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are sorted by length; each row alone through the model gives the same."""
    config = make_config("optimizer.lr=1e-12")
    start(config)
    task, source = TASKS["sst2"], load_source(config.model.source)
    split = {name: encode_split(task, name, tiny[1], source.tokenizer, 24) for name in ("train", "dev", "test")}
    lengths = split["test"].lengths
    assert sorted(lengths, reverse=True) != list(lengths)
    models: list[Any] = []
    build = glue_finetune.build_classifier

    def kept(*arguments: Any) -> Any:
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(glue_finetune, "build_classifier", kept)
    files = RunFiles(os.path.join(config.checkpoints.folder, "group"))
    data = TaskData(split["train"], {"dev": split["dev"]}, {"sst2-test": split["test"]})
    record = finetune(config, source, PlannedRun(task, 1, 64), data, files)
    assert json.dumps(record)
    logits = load_logits(files.logits("sst2-seed1"))["sst2-test"]
    with torch.no_grad():
        alone = torch.cat([models[0].eval()(collate([split["test"][i]], 0)) for i in range(len(lengths))])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
