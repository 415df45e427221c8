"""Statistics over models pretrained with different seeds."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
from finetuning_runs import EIGHT, Scores, cells, make_results, settings_of

from electra_composer import glue_report
from electra_composer.errors import UserError
from electra_composer.finetuning.published import PUBLISHED_MODELS
from electra_composer.glue_report import models_report, over_models


def test_statistics_over_models_are_the_papers() -> None:
    """The best of the runs that all models have: the 99 of the second model's third run does not count."""
    scores: dict[str, Scores] = {
        "a": {"cola": [50.0, 60.0], "sst2": [90.0, 80.0]},
        "b": {"cola": [40.0, 44.0, 99.0], "sst2": [88.0, None]},
        "c": {"cola": [62.0, 10.0], "sst2": [91.0, 92.0]},
    }
    models = {name: make_results(each, settings_of(weights=name * 64)) for name, each in scores.items()}
    found = over_models(models)
    averages = [75.0, 66.0, 77.0]
    assert found["runs"] == 2
    assert [row["average"] for row in found["models"].values()] == averages
    assert found["models"]["b"]["scores"] == {"cola": 44.0, "sst2": 88.0}
    assert (found["mean"], found["max"], found["min"]) == (statistics.mean(averages), 77.0, 66.0)
    assert found["std"] == pytest.approx(statistics.stdev(averages))
    text = models_report(found)
    assert "the best of 2 runs per task" in text
    assert ["these", "72.67", "5.86", "77.00", "66.00", "3"] in cells(text)
    assert "81.38" not in text  # the published statistics are of all eight tasks
    assert over_models({"a": models["a"]})["std"] is None


@pytest.mark.parametrize(("statistic", "average"), [("best", 75.0), ("mean", 60.0), ("median", 62.5)])
def test_the_statistic_of_a_tasks_runs_is_a_choice(statistic: str, average: float) -> None:
    results = make_results({"cola": [10.0, 60.0, 50.0], "sst2": [90.0, 75.0, 75.0]})
    found = over_models({"a": results}, statistic)
    assert found["mean"] == average
    assert f"the {statistic} of 3 runs per task" in models_report(found)


def test_results_of_other_tasks_are_averaged_over_all_of_them() -> None:
    """Those of finetune.py have no average over the tasks of GLUE."""
    models = {}
    for name, score in (("a", 50.0), ("b", 60.0)):
        results = make_results({"synthetic-words": [score]}, settings_of(weights=name * 64))
        models[name] = {key: value for key, value in results.items() if key != "average"}
    found = over_models(models)
    assert found["mean"] == 55.0
    assert ["a", "50.0", "50.00"] in cells(models_report(found))


def test_over_models_of_all_eight_the_published_statistics_stand_beside() -> None:
    models = {
        name: make_results({task: [80.0] for task in EIGHT}, settings_of(weights=name * 64)) for name in ("a", "b")
    }
    rows = cells(models_report(over_models(models)))
    assert ["ELECTRA-Small, best of 10", "81.38", "0.57", "82.23", "80.42", "14"] in rows
    assert PUBLISHED_MODELS["models"] == 14


def test_models_that_do_not_compare_are_refused() -> None:
    one = make_results({"cola": [50.0]}, settings_of(weights="a" * 64))
    fewer = make_results({"sst2": [50.0]}, settings_of(weights="b" * 64))
    other = make_results({"cola": [50.0]}, settings_of("optimizer.lr=1e-3", weights="b" * 64))
    undefined = make_results({"cola": [None]}, settings_of(weights="b" * 64))
    synthetic = make_results({"synthetic-words": [50.0]}, settings_of(weights="b" * 64))
    for second, message in (
        (fewer, "y: has the tasks sst2, but x has cola"),
        (other, "y: was finetuned with optimizer.lr = 0.001, but x with 0.0003"),
        (undefined, "y: CoLA has no defined score in 1 runs"),
        (one, "y and x have the same weights"),
        (synthetic, "y: has the tasks none, but x has cola"),
    ):
        with pytest.raises(UserError, match=message):
            over_models({"x": one, "y": second})
    with pytest.raises(UserError, match="no run of any GLUE task"):
        over_models({"x": synthetic})


def test_the_command_prints_the_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for name, score in (("a", 50.0), ("b", 60.0)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(make_results({"cola": [score]}, settings_of(weights=name * 64))))
    monkeypatch.setattr(sys, "argv", ["glue_report", *paths])
    glue_report.main()
    assert ["these", "55.00", "7.07", "60.00", "50.00", "2"] in cells(capsys.readouterr().out)
    Path(paths[1]).write_text('{"tasks": {}}')
    for wrong, message in (
        (paths, "b.json: not a results file"),
        ([str(tmp_path / "none.json")], "No such file"),
        ([paths[0], paths[0]], "given twice"),
    ):
        with pytest.raises(SystemExit) as end:
            glue_report.main(wrong)
        assert end.value.code == 2
        assert message in capsys.readouterr().err
