"""benchmarks/launches.py counts what can be counted by hand, and fails where too many operators are left."""

from __future__ import annotations

import json
from typing import Any

import launches
import pytest

LINEAR = 4 * 4 + 1 + 1 + 2  # of two encoders of two layers each, the projection, and both heads
NORMS = 2 * 4 + 2 + 1  # of the layers, the embeddings in two models, and the generator's head


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    launches.main(["--size", "tiny", "--batch", "4", *arguments])
    return json.loads(capsys.readouterr().out)


def test_operators_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Three products per linear layer; forward and backward of every LayerNorm, dropout and attention."""
    torch_kinds = run(capsys, "--skip-inductor", "--layer-kernels", "torch")["by_kind"]
    result = run(capsys, "--skip-inductor")
    kinds = result["by_kind"]
    assert torch_kinds["products"] == kinds["products"] == 3 * LINEAR
    assert torch_kinds["bias_sums"] == LINEAR
    assert kinds["bias_sums"] == 4 + 1 + 1  # of queries, keys and values, the projection and the last layer
    assert torch_kinds["layer_norm"] == 2 * NORMS
    assert kinds["layer_norm"] == 3 * (NORMS - 2) + 2 * (1 + launches.KERNELS["embed_backward"])
    assert torch_kinds["dropout"] == 2 * (NORMS - 1)
    assert "dropout" not in kinds
    assert torch_kinds["attention"] == kinds["attention"] == 2 * 4
    assert torch_kinds["gelu"] == 2 * (4 + 2)
    assert kinds["optimizer"] == 4
    assert sum(kinds.values()) == result["computing"] < result["all"]


def test_too_many_operators_fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launches.BEFORE, "computing", 400)
    with pytest.raises(SystemExit) as exited:
        run(capsys, "--skip-inductor", "model.num_layers=1")
    assert exited.value.code == 1


@pytest.mark.long
def test_kernels_of_the_compiled_step(capsys: pytest.CaptureFixture[str]) -> None:
    """Products and operators of ours remain kernels of their own; the rest is fused."""
    result = run(capsys, "model.num_layers=1")
    counted = result["inductor"]
    assert counted["all"] == counted["forward"] + counted["backward"]
    assert result["by_kind"]["products"] < counted["all"] < result["computing"]
