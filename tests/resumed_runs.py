"""Uninterrupted runs, and interrupted and resumed ones; test_exact_resume.py starts this on two ranks.

    composer -n 2 tests/resumed_runs.py YAML FOLDER

All runs share one launch, since starting the processes takes most of the time. Each run has its own folder with a
record of its rows and losses.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from composer.core import Callback
from composer.utils import dist, get_device

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import recorded_run

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS

KINDS = {
    "ddp": [],
    "fsdp": ["trainer.fsdp={}"],
    "sharded": ["trainer.fsdp={state_dict_type: sharded}"],
}
SIGNALS = {"ddp": signal.SIGINT, "fsdp": signal.SIGTERM, "sharded": signal.SIGTERM}


class Crash(Callback):
    """Simulates a kill in a process that must survive."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.batch:
            raise RuntimeError("killed")


class CrashAtEnd(Callback):
    """Simulates a kill after all batches are done and saved."""

    def fit_end(self, state, logger):
        raise RuntimeError("killed")


EXTRA = {**recorded_run.EXTRA, "crash": Crash, "crash_at_end": CrashAtEnd}


def run(yaml: str, folder: Path, *overrides: str) -> int:
    """Pretrain in `folder`; return 0, the exit status of a signal, or -9 for a crash."""
    if dist.get_global_rank() == 0:
        (folder / "record").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    settings = [f"checkpoints.folder={folder / 'run'}", f"callbacks.record.folder={folder / 'record'}", *overrides]
    try:
        with patch.dict(CALLBACKS, EXTRA):
            main(load_config(yaml, settings, PretrainConfig))
    except SystemExit as error:
        return error.code
    except RuntimeError as error:
        if "killed" not in str(error):
            raise
        return -9
    return 0


def signal_at(batch: int, number: int, rank: int) -> list[str]:
    values = {"batch": batch, "signal": int(number), "rank": rank}
    return [f"callbacks.signal_at.{name}={value}" for name, value in values.items()]


def all_runs(yaml: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"))
    for kind, overrides in KINDS.items():
        overrides = [*overrides, "trainer.log_interval=3ba", "trainer.max_duration=10ba"]
        assert run(yaml, folder / f"{kind}-uninterrupted", *overrides) == 0
        broken = folder / f"{kind}-interrupted"
        # One rank receives the signal; both stop after the current batch.
        assert run(yaml, broken, *overrides, *signal_at(4, SIGNALS[kind], rank=1)) == 128 + SIGNALS[kind]
        if kind == "sharded":
            assert run(yaml, broken, *overrides, "callbacks.crash.batch=8") == -9
        assert run(yaml, broken, *overrides) == 0
    # Started and finished on one rank by the test itself.
    assert run(yaml, folder / "elastic", *signal_at(9, signal.SIGTERM, rank=1)) == 143


if __name__ == "__main__":
    all_runs(sys.argv[1], Path(sys.argv[2]))
