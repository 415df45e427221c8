"""On a machine with a GPU, a run on the CPU leaves the GPU alone, and a run on the GPU asks for pinned memory."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import programs
import pytest
import torch
from glue_tiny import settings, write_data, write_source, write_wnli
from launcher import launch
from tiny import ROOT
from without_cuda import TouchedCUDA, fake_gpu

from electra_composer import glue, quickstart
from electra_composer.batches.shards import read_data
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.finetuning import fit
from electra_composer.finetuning.loader import split_ranked
from electra_composer.glue_config import GlueConfig
from electra_composer.training import preparation

WITHOUT_CUDA, YAML = str(ROOT / "tests/without_cuda.py"), str(ROOT / "yamls/glue.yaml")
TWO_TASKS = ["tasks=[sst2, wnli]", "wnli=coreference", "data.max_seq_length=32", "trainer.max_duration=2ba"]


def test_one_place_asks_whether_there_is_a_gpu() -> None:
    """Everything else asks for the device of the run: those that the machine has do not say which one is used."""
    pattern = re.compile(r"torch\.(cuda|accelerator)\.is_available|torch\.accelerator\.|get_device\((None)?\)")
    sources = sorted((ROOT / "electra_composer").rglob("*.py")) + sorted((ROOT / "data_prep").rglob("*.py"))
    found = {path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == {"devices.py"}


def test_the_detector_detects(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch.setattr)
    assert torch.cuda.is_available()
    for touch in (torch.cuda.current_device, torch.cuda.get_device_name, torch.zeros(2).pin_memory):
        with pytest.raises(TouchedCUDA):
            touch()


@pytest.mark.distributed
def test_pretraining_on_the_cpu_of_a_gpu_machine(tiny_yaml: Path) -> None:
    """Two ranks under FSDP2, with evaluation, a sharded checkpoint and the callbacks that need no arguments."""
    names = ("data_wait", "memory_monitor", "optimizer_monitor", "system_metrics_monitor")
    overrides = [
        *("trainer.device=cpu", "trainer.fsdp={state_dict_type: sharded}", "data.num_workers=auto"),
        *("trainer.max_duration=2ba", "trainer.eval_interval=2ba", "schedule.warmup=1ba"),
        *("checkpoints.interval=null", "checkpoints.milestones=[1.0]"),
        *(f"callbacks.{name}={{}}" for name in names),
    ]
    output = launch(2, WITHOUT_CUDA, str(ROOT / "electra_composer/pretrain.py"), str(tiny_yaml), *overrides)
    assert "held-out text" in output  # it has evaluated


def test_finetuning_on_the_cpu_of_a_gpu_machine(tmp_path: Path) -> None:
    """A classifier and a ranker, trained and evaluated."""
    source, data = write_source(tmp_path / "source"), write_data(tmp_path / "data")
    write_wnli(tmp_path / "data")
    command = [sys.executable, WITHOUT_CUDA, str(ROOT / "electra_composer/glue.py"), YAML]
    overrides = [*settings(source, data, tmp_path), *TWO_TASKS, "data.num_workers=auto"]
    done = programs.run([*command, *overrides], capture_output=True, text=True, timeout=200, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 of 2 runs done" in done.stdout


@pytest.mark.parametrize(("device", "pinned"), [("gpu", True), ("cpu", False)])
def test_loaders_of_pretraining(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool) -> None:
    config = load_config(str(tiny_yaml), [], PretrainConfig)
    monkeypatch.setattr(preparation, "resolve_device", lambda _: (device, "fp32", False))
    model: Any = SimpleNamespace(count_batch=lambda batch: batch)
    specs = preparation.build_data(config, read_data(config.data), model)
    assert [spec.dataloader.pin_memory for spec in specs] == [pinned, pinned]


class Built(Exception):
    """Instead of a trainer: the loaders it would have got."""


@pytest.mark.parametrize(("device", "pinned"), [("gpu", True), ("cpu", False)])
@pytest.mark.parametrize("task", ["sst2", "wnli"])
def test_loaders_of_finetuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, device: str, pinned: bool
) -> None:
    source, data = write_source(tmp_path / "source"), write_data(tmp_path / "data")
    write_wnli(tmp_path / "data")
    overrides = [*settings(source, data, tmp_path), *TWO_TASKS, f"tasks=[{task}]"]

    def build(config: GlueConfig, model: Any, train: Any, dev: Any, *_: Any, **__: Any) -> None:
        raise Built(train.dataloader, dev.dataloader)

    monkeypatch.setattr(fit, "build_trainer", build)
    monkeypatch.setattr(fit, "resolve_device", lambda _: (device, "fp32", False))
    monkeypatch.setattr(fit, "use_layer_kernels", lambda *_: None)
    monkeypatch.setattr(fit, "resolve_layer_kernels", lambda *_: "torch")
    monkeypatch.setattr(glue, "run_all", lambda plan, *rest: rest[3](plan[0]))
    with pytest.raises(Built) as built:
        glue.main(load_config(YAML, overrides, GlueConfig))
    assert [loader.pin_memory for loader in built.value.args] == [pinned, pinned]


def test_microbatches_of_a_ranked_batch_are_views_of_it() -> None:
    """So that they stay pinned, and each has the rows of its examples."""
    ids = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    batch = {"example_ids": ids, "input_ids": torch.arange(7), "indices": torch.arange(4), "num_tokens": 7}
    parts = split_ranked(batch, 2)
    assert [part["input_ids"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [part["example_ids"].tolist() for part in parts] == [[0, 0, 1], [0, 0, 0, 1]]
    whole = batch["input_ids"].untyped_storage().data_ptr()
    assert {part["input_ids"].untyped_storage().data_ptr() for part in parts} == {whole}


@pytest.mark.parametrize(
    ("device", "bfloat16", "overrides"),
    [
        ("gpu", True, ["trainer.precision=amp_bf16"]),
        ("gpu", False, []),  # such as a T4, which the program would refuse with amp_bf16
        ("cpu", True, ["trainer.precision=amp_bf16"]),
        ("cpu", False, ["trainer.max_duration=4000ba"]),
    ],
)
def test_precision_of_the_quickstart(
    monkeypatch: pytest.MonkeyPatch, device: str, bfloat16: bool, overrides: list[str]
) -> None:
    monkeypatch.setattr(quickstart, "resolve_device", lambda _: (device, "fp32", False))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(quickstart, "cpu_multiplies_bfloat16", lambda: bfloat16)
    assert quickstart.precision_and_duration() == overrides
