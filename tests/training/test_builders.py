"""Building of optimizer, schedule, callbacks and loggers from a configuration; errors name the key."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch
from composer import Callback
from composer.callbacks import EarlyStopper, LRMonitor, SpeedMonitor
from composer.loggers import TensorboardLogger
from tiny_trainer import Tiny, make_trainer

from electra_composer.config import OptimizerConfig, ScheduleConfig
from electra_composer.errors import UserError
from electra_composer.training.builders import (
    CALLBACKS,
    build_callbacks,
    build_loggers,
    build_optimizer,
    build_scheduler,
)
from electra_composer.training.loggers import MetricsFile, RunConsole
from electra_composer.training.progress_bar import RunProgressBar
from electra_composer.training.schedules import SCHEDULES
from electra_composer.training.tracking import PACKAGES

# --- optimizer and schedule


def test_the_optimizer_has_the_configurations_settings():
    model = Tiny()
    config = OptimizerConfig(lr=3e-4, betas=[0.8, 0.9], eps=1e-7, weight_decay=0.02, bias_correction=True)
    optimizer = build_optimizer(config, model)
    weight, bias = optimizer.param_groups
    assert weight["params"] == [model.head.weight]
    assert (weight["lr"], weight["betas"], weight["eps"], weight["weight_decay"]) == (3e-4, (0.8, 0.9), 1e-7, 0.02)
    assert (bias["params"], bias["weight_decay"]) == ([model.head.bias], 0.0)
    assert optimizer.bias_correction


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"layerwise_decay": 2.0},
    ],
)
def test_optimizer_values_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=rf"optimizer\.{next(iter(wrong))}"):
        build_optimizer(OptimizerConfig(**{"lr": 1.0, **wrong}), Tiny())


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_of_the_configuration_is_built(name):
    schedule = build_scheduler(ScheduleConfig(name=name, warmup="10ba"), "100ba")
    assert schedule.function is SCHEDULES[name]


# --- callbacks and loggers by name


def test_callbacks_are_built_with_their_arguments():
    speed, lr, early = build_callbacks(
        {
            "speed_monitor": {"window_size": 7},
            "lr_monitor": None,
            "early_stopper": {"monitor": "rtd_auc", "dataloader_label": "eval", "patience": "3ep"},
        }
    )
    assert isinstance(speed, SpeedMonitor)
    assert speed.history_wct.maxlen == 8
    assert isinstance(lr, LRMonitor)
    assert isinstance(early, EarlyStopper)


def test_every_callback_that_needs_nothing_is_built():
    names = set(CALLBACKS) - {"early_stopper", "threshold_stopper"}
    if not torch.cuda.is_available():
        names -= {"memory_monitor"}
    assert all(isinstance(callback, Callback) for callback in build_callbacks(dict.fromkeys(sorted(names))))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lr_monitr": None}, "unknown callbacks.lr_monitr; did you mean callbacks.lr_monitor?"),
        (
            {"speed_monitor": {"windw_size": 3}},
            "unknown argument callbacks.speed_monitor.windw_size; did you mean callbacks.speed_monitor.window_size?",
        ),
        ({"lr_monitor": {"every": 3}}, "unknown argument callbacks.lr_monitor.every; it takes none"),
        ({"nan_monitor": {}}, "callbacks.nan_monitor is no longer offered: trainer.on_nonfinite does the same"),
        ({"speed_monitor": {"window_size": "big"}}, "callbacks.speed_monitor.window_size: 'big' has the wrong type"),
        ({"speed_monitor": {"window_size": True}}, "callbacks.speed_monitor.window_size: True has the wrong type"),
        ({"speed_monitor": {"time_unit": "eons"}}, "callbacks.speed_monitor: Invalid time_unit: eons"),
        ({"speed_monitor": 100}, "callbacks.speed_monitor: expected its arguments"),
        (
            {"early_stopper": {"monitor": "x"}},
            "callbacks.early_stopper: missing callbacks.early_stopper.data",
        ),
        ({"data_wait": {"log_interval": "often"}}, "callbacks.data_wait.log_interval is 'often'; expected a time"),
        ({"speed_monitor": {"window_size": 0}}, "callbacks.speed_monitor.window_size is 0; expected an integer from 1"),
    ],
)
def test_what_is_wrong_with_a_callback_is_named_by_its_key(config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_callbacks(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tensorbord": None}, "unknown loggers.tensorbord; did you mean loggers.tensorboard?"),
        ({"wandb": {"projct": "x"}}, "unknown argument loggers.wandb.projct; did you mean loggers.wandb.project?"),
        ({"wandb": {"tags": "one"}}, "loggers.wandb.tags: 'one' has the wrong type"),
        ({"wandb": "on"}, "loggers.wandb: expected its arguments"),
        ({"metrics_file": {"format": "xlsx"}}, "loggers.metrics_file: 'xlsx' is not a format"),
        ({"metrics_file": {"interval": "1ep"}}, "loggers.metrics_file.interval is '1ep'; expected a time above 0"),
        ({"console": {"log_interval": "10tok"}}, "loggers.console: The `console_log_interval`"),
    ],
)
def test_what_is_wrong_with_a_logger_is_named_by_its_key(tmp_path, config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_loggers(config, str(tmp_path), "10ba")


def test_a_missing_package_is_named_with_its_install_command(tmp_path, monkeypatch):
    for name, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=re.escape(f"pip install 'electra-composer[{name}]'")):
            build_loggers({name: None}, str(tmp_path), "10ba")


def test_building_loggers_writes_nothing_and_fills_in_the_runs_folder(tmp_path):
    folder = tmp_path / "run"
    names = {"console": None, "metrics_file": None, "tensorboard": None, "wandb": {"project": "p"}}
    console, metrics, tensorboard, wandb, bar = build_loggers(names, str(folder), "7ba")
    assert isinstance(console, RunConsole)
    assert int(console.log_interval) == 7
    assert isinstance(metrics, MetricsFile)
    assert metrics.path == str(folder / "metrics.jsonl")
    assert isinstance(tensorboard, TensorboardLogger)
    assert tensorboard.log_dir == str(folder / "tensorboard")
    # Workaround (composer 0.32): WandBLogger has no public access to its arguments; goes when it has.
    assert wandb._init_kwargs["dir"] == str(folder)
    assert isinstance(bar, RunProgressBar)
    assert list(tmp_path.iterdir()) == []
    assert build_loggers({}, str(folder), "7ba", progress_bar=False) == []


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CONSOLE": "off", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = make_trainer("3ba", loggers=build_loggers({"wandb": {"project": "p"}}, str(tmp_path / "run"), "1ba"))
    trainer.fit()
    trainer.close()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60  # wandb writes in its own process, and does not wait for it offline
    while b"loss/train/total" not in written.read_bytes():
        assert time.monotonic() < deadline, f"{written.stat().st_size} bytes without a loss"
        time.sleep(0.05)


def test_tensorboard_gets_the_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        "3ba", run_name="r", loggers=build_loggers({"tensorboard": None}, str(tmp_path), "1ba", False)
    )
    trainer.fit()
    trainer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "r"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train/total")] == [0, 1, 2]
