"""The benchmark of busy neighbours prints a line, and its exit status says which goals are missed."""

from __future__ import annotations

import json

import neighbours as benchmark
import pytest
from neighbours import Block

from electra_composer.errors import UserError
from electra_composer.training import threads

TINY = ["model.num_layers=1", "model.num_heads=1", "model.hidden_size=32", "model.embedding_size=16"]


@pytest.fixture(autouse=True)
def _not_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.FIXED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "START_SECONDS", 0.05)


@pytest.mark.slow
def test_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--pairs=1", "--repeats=1", "--steps=4", "--seconds=1", *TINY])
    line = json.loads(capsys.readouterr().out)
    for name in ("beside_one", "beside_two"):
        for kind in ("adapted", "fixed"):
            assert line[name][kind]["batches_per_second"] > 0
            assert line[name][kind]["threads"] == [1]
    assert list(line["adaption"]) == ["alone", "beside_one", "alone_again"]
    assert 1 <= len(line["others_cores"]) <= 2
    assert any("quiet" in goal for goal in line["missed"])  # one pair is too few


def test_a_fixed_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(UserError, match="unset it"):
        benchmark.parse([])


def pair(adapted: float, fixed: float, others: float = 0.0) -> dict[str, Block]:
    return {"adapted": Block(adapted, 2, others), "fixed": Block(fixed, 2, others)}


@pytest.mark.parametrize(
    ("adapted", "beside_one", "others", "missed"),
    [(9.8, 3.1, 0.0, 0), (9.8, 2.9, 0.0, 1), (9.6, 3.1, 0.0, 1), (9.6, 2.9, 0.0, 2), (9.8, 3.1, 0.5, 1)],
)
def test_goals(adapted: float, beside_one: float, others: float, missed: int) -> None:
    """Of five pairs without neighbours one is not quiet and does not count."""
    idle = [pair(adapted, 10.0, others)] * 4 + [pair(1.0, 10.0, others=0.9)]
    result = benchmark.summarize({0: idle, 1: [pair(beside_one, 1.0)], 2: [pair(1.0, 0.5)]})
    assert result["quiet_pairs"] == (0 if others else 4)
    assert result["idle_loss"] == (None if others else pytest.approx(1 - adapted / 10))
    assert len(benchmark.missed(result)) == missed
