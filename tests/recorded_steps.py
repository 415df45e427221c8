"""Runs of the tests of recorded steps, with a stand-in for CUDA graphs (tape.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import Tape

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.model.kernels import dropout
from electra_composer.pretrain import main
from electra_composer.training.device_graph import GRAPHS

BATCHES = 9
OVERRIDES = (
    f"trainer.max_duration={BATCHES}ba",
    "trainer.eval_interval=5ba",
    "trainer.device_train_microbatch_size=4",
    "checkpoints.interval=null",
    "checkpoints.milestones=[1.0]",
)
RATES = ("throughput", "time/", "wall_clock", "memory", "loader")  # metrics that are measured times

Run = Callable[..., Any]


@pytest.fixture(name="run")
def run_fixture(write_tiny_yaml: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(name, override, …)` pretrains in a folder and returns the trainer; dropout is torch's, as on a GPU."""
    monkeypatch.setitem(GRAPHS, "cpu", Tape)
    monkeypatch.setattr(dropout, "serves", lambda x, p: False)
    monkeypatch.setattr(Tape, "launches", 0)
    monkeypatch.setattr(Tape, "runs", 0)

    def start(name: str, *overrides: str) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        yaml = write_tiny_yaml(tmp_path / name)
        return main(load_config(str(yaml), [*OVERRIDES, *overrides], PretrainConfig))

    return start


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the logged metrics of a run without measured times."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(RATES)} for line in lines]


def assert_equal_weights(left: Any, right: Any) -> None:
    for (name, mine), other in zip(left.state.model.named_parameters(), right.state.model.parameters(), strict=True):
        assert torch.equal(mine, other), name
    mine, other = (trainer.state.optimizers[0].state_dict()["state"] for trainer in (left, right))
    for place, values in mine.items():
        for name, value in values.items():
            assert torch.equal(value, other[place][name]), (place, name)
