"""The starts and ends of a run in its folder."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from composer.core import Timestamp

from electra_composer.training.history import RunHistory


def state(batch: int) -> Any:
    return SimpleNamespace(timestamp=Timestamp(batch=batch), device=SimpleNamespace(name="cpu"))


def test_starts_and_ends_are_appended_once(tmp_path):
    def events():
        lines = (tmp_path / "history.jsonl").read_text().splitlines()
        return [(row["event"], row["batch"]) for row in map(json.loads, lines)]

    history = RunHistory(str(tmp_path))
    history.close(state(0), None)  # an evaluation without training
    assert not (tmp_path / "history.jsonl").exists()
    history.fit_start(state(0), None)
    history.close(state(7), None)
    history.close(state(7), None)
    RunHistory(str(tmp_path)).fit_start(state(5), None)
    assert events() == [("start", 0), ("end", 7), ("start", 5)]
    RunHistory(str(tmp_path), replace=True).fit_start(state(0), None)
    assert events() == [("start", 0)]
