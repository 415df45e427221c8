"""One batch gives the same weights on one or two ranks, under DDP or FSDP2, with or without microbatches."""

from __future__ import annotations

import os
from pathlib import Path

import programs
import pytest
import torch
from launcher import COMPOSER, launch
from tiny import ROOT

OTHERS = ("all_tokens_mlm", "electric")  # objectives with other networks and losses


def steps(folder: Path, processes: int, *arrangements: str) -> Path:
    """Run three steps in each arrangement, in `folder/<kind>-<microbatch>`."""
    launch(processes, str(ROOT / "tests" / "distributed_step.py"), str(folder), *arrangements)
    return folder


def result(folder: Path, arrangement: str) -> tuple[dict, dict]:
    """Return the last losses and the weights."""
    folder = folder / arrangement.replace(":", "-")
    content = torch.load(folder / "checkpoint" / "latest-rank0.pt", weights_only=False)
    return torch.load(folder / "loss.pt"), content["state"]["model"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return steps(tmp_path_factory.mktemp("one"), 1, "ddp:8", "ddp:2", *(f"ddp:8:{name}" for name in OTHERS))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    others = [f"fsdp:2:{name}" for name in OTHERS]
    return steps(tmp_path_factory.mktemp("two"), 2, "ddp:4", "ddp:2", "fsdp:4", "fsdp:2", *others)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "arrangement", "objective"),
    [
        *((1, "ddp:2", ""), (2, "ddp:4", ""), (2, "ddp:2", ""), (2, "fsdp:4", ""), (2, "fsdp:2", "")),
        *((2, "fsdp:2", f":{name}") for name in OTHERS),
    ],
)
def test_same_gradient(one_process, two_processes, processes, arrangement, objective):
    loss, weights = result(one_process if processes == 1 else two_processes, arrangement + objective)
    expected_loss, expected = result(one_process, "ddp:8" + objective)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # Three steps with lr 0.02: a gradient error of 1e-5 moves a weight by 6e-7.
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
