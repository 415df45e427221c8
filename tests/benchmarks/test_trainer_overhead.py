"""The benchmark of the trainer's overhead runs and accounts for its parts."""

from __future__ import annotations

import json

import pytest
import trainer_overhead


@pytest.mark.slow
def test_it_prints_the_overhead_and_its_parts(capsys) -> None:
    trainer_overhead.main(["--steps=12", "--repeats=1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["overhead_ms"] == pytest.approx(line["trainer_ms"] - line["bare_ms"], abs=0.01)
    parts = line["parts_ms"]
    assert {"loader", "dispatch", "callback NumericalGuard", "callback LRMonitor", "logger MetricsFile"} <= set(parts)
    assert all(0 <= part < line["trainer_ms"] for part in parts.values())
    assert line["steps_of_each"] == 12
