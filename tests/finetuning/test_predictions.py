"""Test-set predictions: selection of runs, format of the predictions, checks of the submission."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from electra_composer.errors import UserError
from electra_composer.finetuning.predictions import (
    SERVER_ROWS,
    check_indices,
    check_select,
    check_submission,
    format_predictions,
    load_logits,
    save_logits,
    select_runs,
    submission_files,
    submission_problems,
    write_submission,
)
from electra_composer.finetuning.tasks import TASKS


def runs_of(task: str, *scores: float | None) -> list[dict[str, Any]]:
    return [{"task": task, "seed": seed, "score": score} for seed, score in enumerate(scores, 1)]


# --- format of the predictions


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
    assert format_predictions(TASKS[name], torch.eye(len(expected))) == expected


def test_scores_have_three_decimals_and_stay_within_the_scale() -> None:
    task = TASKS["stsb"]  # trained on [0, 1]
    logits = torch.tensor([[-0.3], [0.0], [0.432], [1.0], [1.7]])
    assert format_predictions(task, logits) == ["0.000", "0.000", "2.160", "5.000", "5.000"]
    raw = dataclasses.replace(task, target_scale=1.0)
    assert format_predictions(raw, logits * 5) == format_predictions(task, logits)


# --- selection of runs


def test_the_best_run_on_dev_a_named_one_or_all() -> None:
    task, runs = TASKS["rte"], runs_of("rte", 60.0, 70.0, None, 70.0)
    assert [run["seed"] for run in select_runs(runs, task, "best")] == [2]
    assert [run["seed"] for run in select_runs(runs, task, "3")] == [3]
    assert [run["seed"] for run in select_runs(runs, task, "ensemble")] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"predict.select is 9, but RTE has no finished run with this seed"):
        select_runs(runs, task, "9")
    with pytest.raises(UserError, match="no run of RTE has a dev score"):
        select_runs(runs_of("rte", None), task, "best")
    with pytest.raises(UserError, match=r"'bset'; expected best, ensemble, or one of the seeds \[1, 2\]"):
        check_select("bset", [1, 2])
    check_select("2", [1, 2])


def test_an_ensemble_is_the_mean_of_logits_and_no_vote(tmp_path: Path) -> None:
    """Two of three runs predict class 0 by a small margin, the third class 1 by a large one."""

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
    with pytest.raises(UserError, match=r"no such file: the run had predict.enabled=false"):
        load_logits(str(tmp_path / "b.npz"))
    np.savez(path, a=np.array([{}], dtype=object))  # a pickle
    with pytest.raises(UserError, match="not a readable logits file"):
        load_logits(path)
    Path(path).write_bytes(Path(path).read_bytes()[:20])
    with pytest.raises(UserError, match="not a readable logits file"):
        load_logits(path)


def test_a_test_set_out_of_order_is_refused() -> None:
    check_indices(np.arange(4), "RTE test")
    check_indices(None, "AX test")
    with pytest.raises(UserError, match="RTE test: row 2 has index 3; expected 0, 1, 2"):
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
        ({"RTE.tsv": "index\tprediction\n1\tentailment\n0\tentailment\n"}, "index '1'; expected 0"),
        ({"RTE.tsv": "index\tprediction\n0\t1\n1\tentailment\n"}, "prediction '1' of index 0 is no RTE label"),
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
        with pytest.raises(UserError, match="is no STS-B label"):
            write_submission(str(path), {"STS-B.tsv": (TASKS["stsb"], [answer])})
    assert path.read_bytes() == before


def test_what_a_whole_submission_lacks() -> None:
    whole = {name: (TASKS["cola"], ["0"] * rows) for name, rows in SERVER_ROWS.items()}
    assert submission_problems(whole) is None
    assert set(SERVER_ROWS) == {name for task in TASKS.values() for name in task.submission.values()}
    del whole["AX.tsv"]
    whole["WNLI.tsv"] = (TASKS["wnli"], ["0"] * 10)
    assert submission_problems(whole) == "no AX.tsv; WNLI.tsv has 10 predictions, not 146"
