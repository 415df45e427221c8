"""benchmarks/masked_lm.py: its results line, and its failure if losses differ."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
import torch
from tiny import BENCHMARKS


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/masked_lm.py`, whose folder comes first on the path as when it is run as a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("masked_lm")


SMALL = ["--device", "cpu", "--rows", "40", "--vocab", "99", "--hidden", "16", "--repeats", "2", "--warmup", "1"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_benchmark_prints_one_line_of_results(
    benchmark: ModuleType, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*SMALL, "--precision", precision]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["implementation"] == "chunked"
    assert results["ours"]["min_ms"] <= results["ours"]["median_ms"]
    assert results["plain_over_ours"] == pytest.approx(
        results["plain"]["median_ms"] / results["ours"]["median_ms"], abs=0.01
    )
    assert results["liger"] is None
    assert results["absent"]["liger"] == "needs CUDA"
    assert torch.__version__.startswith(results["machine"]["versions"]["torch"])


def test_benchmark_of_the_copy_mechanism(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([*SMALL, "--precision", "fp32", "--copy"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["relative_difference"].keys() == {"loss", *(f"gradient_{name}" for name in benchmark.INPUTS)}
    assert results["ours_without_copy"]["min_ms"] <= results["ours_without_copy"]["median_ms"]


def test_benchmark_fails_where_losses_differ(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = benchmark.Problem.plain
    monkeypatch.setattr(benchmark.Problem, "plain", lambda self: plain(self) * 1.01)
    assert benchmark.main(SMALL) == 1
    assert "loss 9.9e-03 > 2e-03" in capsys.readouterr().err
