"""Benchmark of the objectives: what is planned and read of a run, the table and its noise, a start that goes on."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import objectives
import objectives_plan
import objectives_report
import programs
import pytest
from glue_tiny import write_data
from objectives_plan import CONFIGURATIONS, ELECTRA, FLOOR, Configuration

from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.model.pretraining import encoder_flops


def result(name: str, scores: dict[str, list[float]], seed: int = 1, **values: Any) -> dict[str, Any]:
    """Return the line of a configuration; the speed of the floor is not measured."""
    keys = ("steps", "train_seconds", "steps_per_second", "tokens_per_second", "flops_per_step", "flops")
    return {
        "configuration": name,
        "seed": seed,
        "budget_seconds": 80.0,
        **dict.fromkeys(keys),
        **values,
        "tasks": {task: {"metric": "accuracy", "scores": found} for task, found in scores.items()},
    }


SPEED = {"steps": 2000, "train_seconds": 80.0, "steps_per_second": 25.0, "tokens_per_second": 25600.0}
LINES = [
    result(FLOOR, {"a": [50.0, 52.0], "b": [10.0, 10.0]}),
    result("mlm", {"a": [60.0, 64.0], "b": [20.0, 26.0]}, **SPEED, flops_per_step=8e9, flops=16e12),
    result(
        ELECTRA, {"a": [70.0, 72.0], "b": [30.0, 30.0]}, **SPEED | {"steps_per_second": 20.0, "train_seconds": 101.0},
        flops_per_step=12e9, flops=24e12,
    ),
]  # fmt: skip


def rows_of(table: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_speed_and_arithmetic_relative_to_electra_and_scores_with_their_noise() -> None:
    rows = rows_of(objectives_report.report(LINES))
    assert list(rows)[2:] == [ELECTRA, "mlm", FLOOR]
    assert rows["mlm"] == [
        "2,000", "80", "25.0", "25,600", "8.00", "0.80", "0.67", "16.0", "62.0 ± 2.8", "23.0 ± 4.2", "42.5 ± 3.5",
    ]  # fmt: skip
    assert rows[ELECTRA][:7] == ["2,000", "101†", "20.0", "25,600", "12.00", "1.00", "1.00"]
    assert rows[FLOOR] == ["–"] * 8 + ["51.0 ± 1.4", "10.0 ± 0.0", "30.5 ± 0.7"]
    assert objectives_report.draw(LINES).startswith(b"\x89PNG")


def test_without_electra_and_with_one_seed_there_are_no_ratios_and_no_deviations() -> None:
    lines = [result("mlm", {"a": [60.0]}, **SPEED, flops_per_step=8e9, flops=16e12)]
    text = objectives_report.report(lines)
    assert rows_of(text)["mlm"][5:] == ["–", "–", "16.0", "60.0", "60.0"]
    assert "two standard errors" not in text
    assert objectives_report.draw(lines).startswith(b"\x89PNG")


def test_noise_of_finetuning_is_pooled_and_apart_from_that_of_pretraining() -> None:
    runs = np.random.default_rng(0).normal(60, 3, (3, 5))
    lines = [result("mlm", {"a": run.tolist()}, seed) for seed, run in enumerate(runs)]
    within, between = math.sqrt(runs.var(axis=1, ddof=1).mean()), runs.mean(axis=1).std(ddof=1)
    cell = objectives_report.cell(objectives_report.scores(lines, "a"))
    assert cell == f"{runs.mean():.1f} ± {within:.1f} ± {between:.1f}"
    text = objectives_report.report([*lines, result(FLOOR, {"a": runs[0].tolist()})])
    spread = statistics.fmean([within**2, runs[0].var(ddof=1)])
    assert f"by up to {2 * math.sqrt(spread * 2 / 5):.1f} points" in text
    assert "± standard deviation over 3 pretraining seeds" in text


def test_speed_is_read_of_the_windows_after_the_first() -> None:
    def window(rate: float) -> dict[str, float]:
        names = {"batches": rate, "tokens": 100 * rate, "flops": 7e9 * rate}
        return {f"throughput/{name}_per_sec": value for name, value in names.items()}

    rows = [{"step": 0}, window(1.0), window(10.0), {"time/train": 0.02}, window(12.0), window(30.0)]
    found = objectives_plan.speed_of(rows)
    assert found == pytest.approx({"steps_per_second": 12.0, "tokens_per_second": 1200.0, "flops_per_step": 7e9})
    assert objectives_plan.train_seconds_of(rows) == 72.0
    assert objectives_plan.steps_within(80.0, found["steps_per_second"]) == 960
    with pytest.raises(UserError, match="larger --budget"):
        objectives_plan.speed_of(rows[:2])


def test_bad_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--configurations bert: expected some of electra, mlm"):
        objectives.parse(["--configurations", "bert"])
    with pytest.raises(UserError, match=r"--budget is 0; expected seconds above 0"):
        objectives.parse(["--budget", "0"])
    with pytest.raises(UserError, match=r"none: no such folder; expected shards"):
        objectives.parse(["--data", str(tmp_path / "none")])


@pytest.mark.slow
def test_a_tiny_run_is_measured_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two stages, the second from the networks of the first, and the floor; a failure; a second start goes on."""
    monkeypatch.setattr("subprocess.Popen", programs.Program)
    monkeypatch.setitem(CONFIGURATIONS, ELECTRA, Configuration(((), ())))
    monkeypatch.setitem(CONFIGURATIONS, "gdes", Configuration((("model.num_heads=5",),)))
    arguments = ["--smoke", f"--data={shards}", f"--tasks={write_data(tmp_path / 'tasks')}", "--task-names", "sst2"]
    arguments += [f"--output={tmp_path / 'out'}", "--configurations", FLOOR, "gdes", ELECTRA]
    with pytest.raises(UserError, match="failed: gdes"):
        objectives.main(arguments)
    assert "num_heads" in capsys.readouterr().err
    for name in (ELECTRA, FLOOR):  # not again
        monkeypatch.setitem(CONFIGURATIONS, name, Configuration((("no=key",),)))
    objectives.main([*arguments[:-2], ELECTRA])
    *lines, _, _, _, electra, floor, _, _ = capsys.readouterr().out.splitlines()
    found = {line["configuration"]: line for line in map(json.loads, lines)}
    assert list(found) == [ELECTRA, FLOOR]
    assert (electra.split(" | ")[0], floor.split(" | ")[0]) == ("| electra", "| floor")
    assert all(len(line["tasks"]["sst2"]["scores"]) == 2 for line in found.values())
    line = found[ELECTRA]
    warm = objectives_plan.SMOKE_WARM_STEPS
    assert len(line["planned_steps_per_second"]) == len(line["eval"]) == 2
    assert line["steps"] >= 2 * warm
    assert line["train_seconds"] > 0
    # Closed form of two encoders of two layers, 32 and 16 wide; the heads are the smaller part.
    tokens = line["tokens_per_second"] / line["steps_per_second"]
    encoders = [EncoderConfig(99, 32, width, 2, 1, 4 * width, 32, 0.0, 0.0, 0.02, 1e-12) for width in (32, 16)]
    parts = sum(encoder_flops(config, int(tokens), 0) for config in encoders)
    assert parts < line["flops_per_step"] < 2 * parts
    config = (tmp_path / "out" / "electra-1" / "pretrained-1" / "config.yaml").read_text(encoding="utf-8")
    assert f"init_from: {tmp_path / 'out' / 'electra-1' / 'pretrained-0'}" in config
