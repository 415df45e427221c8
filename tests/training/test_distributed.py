"""One batch on one process or two, replicated or sharded, whole or in microbatches: the same weights come out."""

from __future__ import annotations

import os
from pathlib import Path

import programs
import pytest
import torch
from launcher import COMPOSER, launch
from tiny import ROOT


def steps(folder: Path, processes: int, *arrangements: str) -> Path:
    """Three steps in each of some arrangements, one after another, in `folder/<kind>-<microbatch>`."""
    launch(processes, str(ROOT / "tests" / "distributed_step.py"), str(folder), *arrangements)
    return folder


def result(folder: Path, kind: str, microbatch: int) -> tuple[dict, dict]:
    """The last losses, and the weights."""
    folder = folder / f"{kind}-{microbatch}"
    content = torch.load(folder / "checkpoint" / "latest-rank0.pt", weights_only=False)
    return torch.load(folder / "loss.pt"), content["state"]["model"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("one"), 1, "ddp:8", "ddp:2")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("two"), 2, "ddp:4", "ddp:2", "fsdp:4", "fsdp:2")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "kind", "microbatch"), [(1, "ddp", 2), (2, "ddp", 4), (2, "ddp", 2), (2, "fsdp", 4), (2, "fsdp", 2)]
)
def test_same_gradient(one_process, two_processes, processes, kind, microbatch):
    loss, weights = result(one_process if processes == 1 else two_processes, kind, microbatch)
    expected_loss, expected = result(one_process, "ddp", 8)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # Three steps of lr 0.02: a gradient that is off by 1e-5 moves a weight by 6e-7.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=6e-7, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in expected_loss.items():
        assert loss[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.distributed
def test_bad_input_on_two_processes_ends_in_one_line(tiny_yaml):
    script = ROOT / "electra_composer" / "pretrain.py"
    done = programs.run(
        [str(COMPOSER), "-n", "2", str(script), str(tiny_yaml), "trainer.global_train_batch_size=7"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    assert "error: trainer.global_train_batch_size is 7" in done.stderr
    assert "Traceback" not in done.stderr
