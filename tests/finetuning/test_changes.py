"""Any key of the GLUE configuration may be changed between two starts, or the start is refused in one line.

Finished runs are kept if the key does not affect scores. Otherwise runs with the new value are another group, which the
reports name (test_glue.py).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from changed_keys import leaf_keys
from finetuning_runs import SOURCE, glue_config

from electra_composer.errors import UserError
from electra_composer.finetuning.results import group_of
from electra_composer.finetuning.settings import check_config
from electra_composer.glue_config import GlueConfig, TaskSettings

# Key → changed value.
KEPT = {
    "run_name": "other",
    "tasks": "[rte, sst2]",
    "seeds": "[7]",
    "results": "elsewhere.json",
    "data.num_workers": "3",
    "data.cache": "elsewhere",
    "trainer.progress_bar": "false",
    "trainer.log_interval": "1ba",
    "trainer.cuda_graph": "false",
    "trainer.layer_kernels": "torch",
    "trainer.eval_interval": "1dur",
    "trainer.device_eval_batch_size": "7",
    "checkpoints.folder": "elsewhere",
    "checkpoints.interval": "7ba",
    "checkpoints.keep": "9",
    "checkpoints.milestones": "[0.5]",
    "checkpoints.resume": "false",
    "checkpoints.overwrite": "true",
    "checkpoints.load_weights_only": "true",
    "callbacks": "{memory_monitor: {}}",
    "loggers": "{console: {}}",
    "predict.enabled": "true",
    "predict.select": "ensemble",
    "predict.file": "elsewhere.zip",
}
ANOTHER_GROUP = {
    "seed": "7",
    "optimizer.lr": "7.0e-5",
    "optimizer.betas": "[0.8, 0.9]",
    "optimizer.eps": "1.0e-5",
    "optimizer.weight_decay": "0.5",
    "optimizer.bias_correction": "true",
    "optimizer.layerwise_decay": "0.7",
    "optimizer.layerwise_variant": "paper",
    "schedule.name": "constant",
    "schedule.warmup": "7ba",
    "schedule.decay": "7ba",
    "trainer.max_duration": "7ep",
    "trainer.global_train_batch_size": "24",
    "trainer.device_train_microbatch_size": "2",
    "trainer.device": "cpu",
    "trainer.precision": "fp32",
    "trainer.gradient_clip": "null",
    "trainer.on_nonfinite": "skip",
    "trainer.compile": "true",
    "trainer.attention": "sdpa",
    "trainer.activation_checkpointing": "true",
    "trainer.deterministic": "true",
    "callbacks": "{early_stopper: {monitor: accuracy, dataloader_label: eval, patience: 1ep}}",
    "data.path": "elsewhere",
    "data.max_seq_length": "32",
    "model.source": "elsewhere",
    "model.random_init": "true",
    "model.dropout": "0.3",
    "model.classifier_dropout": "0.3",
    "task_settings.<name>.epochs": "7",
    "task_settings.<name>.lr": "7.0e-5",
    "task_settings.<name>.batch_size": "7",
    "task_settings.<name>.layerwise_decay": "0.7",
    "task_settings.<name>.warmup": "7ba",
    "regression_targets": "raw",
    "wnli": "coreference",
    "double_unordered": "false",
    "loss_reduction": "sum",
    "intermediate": "true",
    "max_train_examples": "7",
}
REFUSED = {
    "checkpoints.remote": "s3://bucket/run",
    "checkpoints.load_path": "x.pt",
    "trainer.eval_batches": "7",
    "trainer.fsdp": "{}",
}
ONE_VALUE = {"optimizer.name"}


def test_every_key_is_in_one_of_the_tables() -> None:
    keys = {key if not key.startswith("trainer.fsdp.") else "trainer.fsdp" for key in leaf_keys(GlueConfig)}
    assert sorted({*KEPT, *ANOTHER_GROUP, *REFUSED, *ONE_VALUE}) == sorted(keys)
    assert KEPT.keys() & ANOTHER_GROUP.keys() == {"callbacks"}


@pytest.fixture(scope="module")
def base() -> GlueConfig:
    config = glue_config()
    config.task_settings["rte"] = TaskSettings()
    return config


def changed(base: GlueConfig, key: str, value: str) -> GlueConfig:
    config = copy.deepcopy(base)
    *sections, name = key.replace("<name>", "rte").split(".")
    section: Any = config
    for part in sections:
        section = section[part] if isinstance(section, dict) else getattr(section, part)
    assert getattr(section, name) != yaml.safe_load(value), key
    setattr(section, name, yaml.safe_load(value))
    return config


@pytest.mark.parametrize(("key", "value"), KEPT.items())
def test_runs_are_kept(base: GlueConfig, key: str, value: str) -> None:
    assert group_of(changed(base, key, value), SOURCE) == group_of(base, SOURCE)


@pytest.mark.parametrize(("key", "value"), ANOTHER_GROUP.items())
def test_runs_are_of_another_group(base: GlueConfig, key: str, value: str) -> None:
    here, before = group_of(changed(base, key, value), SOURCE), group_of(base, SOURCE)
    assert here[0] != before[0]
    (differs,) = (name for name in here[1].keys() | before[1].keys() if here[1].get(name) != before[1].get(name))
    assert key.replace("<name>", "rte").startswith(differs) or differs == "callbacks.early_stopper"


@pytest.mark.parametrize(("key", "value"), REFUSED.items())
def test_a_key_of_pretraining_alone_is_refused(base: GlueConfig, key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{key} applies to pretraining only"):
        check_config(changed(base, key, value))
