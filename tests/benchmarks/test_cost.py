"""Time and cost of full runs: the recipes, the ways to estimate a step, and the table of docs/speed.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cost
import pytest

from electra_composer.training.gpus import GPUS

STEP = {"model": "small", "rows": 128, "length": 128, "gpu": "H100 SXM", "bare_ms": 12.0, "trainer_ms": 25.8}
STEP |= {"date": "2026-11-26", "commit": "abc"}
SMALL = cost.Recipe(1_000_000, 128, 128, 10**12)


def estimate(gpu: str, *measured: dict[str, Any], model: str = "small", run: cost.Recipe = SMALL) -> cost.Estimate:
    return cost.estimate(model, run, gpu, list(measured), mfu=0.5)


def test_the_table_of_the_page_is_current_and_its_numbers_are_said_to_be_computed() -> None:
    assert cost.main(["--check"]) == 0
    text = cost.PAGE.read_text()
    assert "**Computed, not measured**" in text.partition(cost.BEGIN)[0]


def test_an_outdated_page_is_reported_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(cost, "recipe", lambda model: SMALL)
    cost.PAGE.write_text(f"before\n{cost.BEGIN}| old |\n{cost.END}after\n")
    assert cost.main(["--check"]) == 1
    assert "is out of date; run python benchmarks/cost.py --write" in capsys.readouterr().err
    assert cost.main(["--write"]) == cost.main(["--check"]) == 0
    text = cost.PAGE.read_text()
    assert (text.startswith("before\n"), text.endswith("after\n"), "old" in text) == (True, True, False)
    cost.PAGE.write_text("no table\n")
    with pytest.raises(cost.UserError, match="expected the lines"):
        cost.main(["--write"])


def test_the_recipes_are_those_of_the_yamls_and_small_needs_what_the_paper_counts() -> None:
    """The paper (table 1) gives 1.4e18 operations for ELECTRA-Small's training, with other rules of counting."""
    small, base = cost.recipe("small"), cost.recipe("base")
    assert small[:3] == (1_000_000, 128, 128)
    assert base[:3] == (766_000, 256, 512)
    assert small.steps * small.flops == pytest.approx(1.4e18, rel=0.2)
    assert base.steps * base.flops == pytest.approx(6.4e19, rel=0.2)


def test_a_step_on_the_card_it_was_measured_on() -> None:
    assert estimate("H100 SXM", STEP) == (25.8, "measured (2026-11-26, abc)")
    newer = STEP | {"date": "2026-12-01", "commit": "def", "trainer_ms": 14.0}
    for measured in ((newer, STEP), (STEP, newer), (newer, STEP | {"gpu": "A100", "date": "2027-01-01"})):
        assert estimate("H100 SXM", *measured).step_ms == 14.0
    assert estimate("H100 SXM", newer, newer | {"trainer_ms": 13.0}).step_ms == 13.0  # the later one of a day


def test_a_step_on_another_card_is_scaled_without_its_host() -> None:
    step_ms, how = estimate("H200", STEP)
    assert step_ms == pytest.approx(12.0 * 3.35 / 4.8 + 13.8)
    assert how == "scaled from H100 SXM by memory bandwidth"
    run = cost.Recipe(1, 256, 512, 10**12)
    of_base = STEP | {"model": "base", "rows": 64, "length": 512}
    step_ms, how = estimate("A100", of_base, model="base", run=run)
    assert step_ms == pytest.approx(4 * 12.0 * 989.5 / 312 + 13.8)
    assert how == "scaled from H100 SXM by bf16 peak"
    assert estimate("H100 SXM", of_base, model="base", run=run).how == "measured (2026-11-26, abc, 4 × 64 rows)"


def test_a_model_without_a_measured_step_gets_an_assumed_mfu() -> None:
    run = cost.Recipe(766_000, 256, 512, 10**14)
    step_ms, how = estimate("B200", STEP, model="base", run=run)
    assert (step_ms, how) == (pytest.approx(1000 * 10**14 / (0.5 * GPUS["B200"].half)), "MFU 50% assumed")


def test_time_and_cost_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "recipe", lambda model: SMALL)
    rows = cost.render([STEP], {**cost.PRICES, "H100 SXM": 2.0}, 0.5).splitlines()
    assert rows[4].endswith("| 25.8 ms | measured (2026-11-26, abc) | 7.2 h | 2.00 | $14 |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--price", "H100=2"], "--price H100=2: expected one of A100,"),
        (["--price", "A100=free"], "dollars above 0"),
        (["--mfu", "40"], r"--mfu is 40.0; expected a fraction in \(0, 1\]"),
        (["--check", "--mfu", "0.3"], "leave them out"),
        (["--add", "results.jsonl"], "--add and --commit"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(cost.UserError, match=message):
        cost.parse(arguments)


def test_steps_of_a_results_file_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "MEASURED", tmp_path / "measured.json")
    cost.MEASURED.write_text(json.dumps([STEP]))
    line = {
        "benchmark": "pretrain_step",
        "options": {"size": "small", "batch": 128, "precision": "amp_bf16", "compile": "true", "overrides": ["a=b"]},
        "length": 128,
        "step_ms": {"ours": {"median": 5.0}, "trainer": {"median": 5.5}},
        "machine": {"gpu": "NVIDIA H200", "date": "2026-12-24", "versions": {"torch": "2.11.0"}},
    }
    without_trainer = {**line, "step_ms": {"ours": {"median": 5.0}}}
    on_a_cpu = {**line, "machine": {**line["machine"], "gpu": None}}
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(each) for each in (without_trainer, on_a_cpu, line)))
    cost.add(str(results), "fff")
    measured = json.loads(cost.MEASURED.read_text())
    assert [step["gpu"] for step in measured] == ["H100 SXM", "H200"]
    assert measured[1]["settings"] == "trainer.compile=true a=b"
    assert estimate("H200", *measured) == (5.5, "measured (2026-12-24, fff)")
    results.write_text(json.dumps(on_a_cpu))
    with pytest.raises(cost.UserError, match="no step of small or base"):
        cost.add(str(results), "fff")
