"""Compare pretraining runs: weights, metrics and recorded rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback
from recorded_run import read_record

from electra_composer.checkpoints.weights import read_checkpoint

CLOCKS = ("time/", "throughput/", "memory/")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of the metrics file, without metrics that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def assert_same_run(left: Path, right: Path) -> None:
    assert read_record(left / "record") == read_record(right / "record")
    assert metrics(left) == metrics(right)
    mine, other = (read_checkpoint(str(folder / "run")).state for folder in (left, right))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


class Kill(Callback):
    """Interrupt a run after a batch."""

    def __init__(self, after: int):
        self.after = after

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.after:
            raise KeyboardInterrupt
