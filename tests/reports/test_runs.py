"""What is read from a run's folder, and what is said about a folder that is none."""

from __future__ import annotations

import json
import os

import pytest
from made_runs import results_of, rows_of, write_run

from electra_composer.errors import UserError
from electra_composer.reports.runs import read_run, read_runs
from electra_composer.reports.summary import history, progress, scores, state, status_line, summary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such folder"),
        ({}, "no config.yaml in it"),
        ({"config.yaml": "task: {}\ntrainer: {}\n"}, "not the configuration of pretrain.py"),
        ({"config.yaml": "a: [1"}, "cannot be read"),
        ({"config.yaml": "text"}, "not the configuration of pretrain.py"),
    ],
)
def test_no_run(tmp_path, content, message):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_run(str(folder))
    assert str(folder) in str(raised.value)
    assert "expected the folder of a run of pretrain.py" in str(raised.value)


def test_a_run_without_metrics_and_one_cut_off(tmp_path):
    run = read_run(str(write_run(tmp_path / "none")))
    assert "no metrics file" in run.notes[0]
    assert state(run) == "no metrics"
    folder = write_run(tmp_path / "cut", rows_of(3))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')
    run = read_run(str(folder))
    assert run.steps == 200
    assert "1 incomplete or damaged line" in run.notes[0]
    (folder / "metrics.jsonl").write_text("")
    assert "has no rows yet" in read_run(str(folder)).notes[0]


def test_history_tells_interruptions_and_repeated_batches(tmp_path):
    folder = write_run(tmp_path / "run", rows_of(11, 10), trainer__max_duration="200ba")
    events = [("start", 0), ("end", 50), ("start", 40), ("start", 80)]
    lines = [json.dumps({"event": event, "batch": batch, "time": f"t{batch}"}) for event, batch in events]
    (folder / "history.jsonl").write_text("\n".join([*lines, '{"event": "st']))
    run = read_run(str(folder))
    assert [row[3] for row in history(run)] == [
        "until batch 50; 10 of them were repeated",
        "no end recorded: killed; resumed from batch 80",
        "no end recorded: killed",
    ]
    assert progress(run) == pytest.approx(0.5)
    assert state(run) == "killed at 50%"
    assert "100 of 200ba" in status_line(run)
    assert dict(summary([run]))["restarts"] == ["2"]


@pytest.mark.parametrize(
    ("duration", "fraction"), [("400ba", 0.25), ("3200sp", 0.25), ("3276800tok", 0.5), ("2ep", None), ("100ba", 1.0)]
)
def test_progress_in_any_unit(tmp_path, duration, fraction):
    run = read_run(str(write_run(tmp_path / "run", rows_of(11, 10), trainer__max_duration=duration)))
    assert progress(run) == (None if fraction is None else pytest.approx(fraction))


def test_results_are_those_that_started_from_the_run(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "runs" / "mine", rows_of(3))
    for name, content in {
        "glue": results_of(str(folder), {1: 60.0, 2: 62.0}),
        "random": results_of(str(folder / "latest-rank0.pt"), {1: 50.0}, random_init=True),
        "relative": results_of("runs/mine", {1: 61.0}),
        "other": results_of(str(tmp_path / "runs" / "mine-too"), {1: 1.0}),
        "below/deep": results_of(str(folder), {3: 64.0}),
    }.items():
        os.makedirs(tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(content))
    (tmp_path / "runs" / "other" / "broken").mkdir()
    (tmp_path / "runs" / "other" / "broken" / "results.json").write_text("{")
    found = scores([read_run(str(folder))])
    assert {score.model: score.runs for score in found} == {
        "pretrained (glue)": [(1, 60.0), (2, 62.0)],
        "random weights (random)": [(1, 50.0)],
        "pretrained (relative)": [(1, 61.0)],
        "pretrained (deep)": [(3, 64.0)],
    }
    assert found[[score.model for score in found].index("pretrained (glue)")].mean == "61.00 ± 1.41"
    given = [str(tmp_path / "runs" / name / "results.json") for name in ("other", "glue")]
    (run,) = read_runs([str(folder)], given)
    more = {score.model: score.runs for score in scores([run])}
    assert len(more) == 5
    assert more[f"{folder}-too (other)"] == [(1, 1.0)]
    with pytest.raises(UserError, match="not a results file"):
        read_runs([str(folder)], [str(tmp_path / "runs" / "other" / "broken" / "results.json")])
