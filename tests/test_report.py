"""report.py: the report of a run that was trained, at its end and by the command."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
from made_runs import write_run

from electra_composer import report
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main as pretrain


@pytest.mark.slow
def test_the_report_of_a_trained_run(shards, tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "run"
    pretrain(load_config(str(tiny_yaml), ["report=true"], PretrainConfig))
    said = capsys.readouterr().out
    assert f"report             {folder}/report.html" in said
    page = (folder / "report.html").read_text()
    assert page.count('class="stage"') == 3 * 5  # rows × milestones
    assert "the generator put" in page
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    auc = [row["metrics/eval/rtd_auc"] for row in rows if "metrics/eval/rtd_auc" in row][-1]
    assert f"<td>{auc:.4f}</td>" in page
    assert "until batch 16" in page
    assert any("gradient/norm" in row for row in rows)
    report.main([str(folder), "--output", str(tmp_path / "again.html"), "--no-tokens"])
    said = capsys.readouterr().out
    assert "finished, 16 of 16ba" in said
    assert "left out (--no-tokens)" in (tmp_path / "again.html").read_text()
    assert (tmp_path / "again-curves.png").stat().st_size > 10_000


def test_watching_ends_with_the_run(tmp_path, capsys, monkeypatch):
    rows = [{"step": 100 * number, "gradient/norm": 1.0} for number in range(40)]
    folder = write_run(tmp_path / "run", rows, trainer__max_duration="9000ba")
    locked = iter([True, True, False])
    monkeypatch.setattr("electra_composer.reports.runs.is_locked", lambda folder: next(locked))
    waited: list[int] = []
    pages: list[str] = []

    def sleep(seconds):
        waited.append(seconds)
        pages.append((folder / "report.html").read_text())

    monkeypatch.setattr(report, "time", SimpleNamespace(sleep=sleep))  # not that of threads of other tests
    report.main([str(folder), "--watch", "5"])
    assert waited == [5, 5]
    assert all('http-equiv="refresh" content="5"' in page for page in pages)
    assert 'http-equiv="refresh"' not in (folder / "report.html").read_text()
    said = capsys.readouterr().out
    assert said.count("running, 3,900 of 9000ba") == 2
    assert "stopped at 43.3%" in said


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    folder = write_run(tmp_path / "run", [{"step": 0, "gradient/norm": 1.0}])
    (folder / "report.html").mkdir()
    with caplog.at_level(logging.WARNING):
        assert report.write_report_of_run(str(folder)) is None
    assert caplog.messages[0].startswith(f"no report was written to {folder}/report.html")
    assert "\n" not in caplog.messages[0]
    assert report.write_report_of_run(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["nothing"], "nothing: no such folder; expected the folder of a run"),
        (["nothing", "--output", "a.pdf"], "expected a file name that ends in .html"),
        (["nothing", "--watch", "0"], "--watch: is '0'; expected an integer from 1"),
        ([str(number) for number in range(13)], "13 runs; expected at most 12"),
    ],
)
def test_bad_input(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
