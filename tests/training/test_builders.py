"""Names, arguments and values of a configuration's parts: what is right is built, what is wrong is named by its key."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
import time

import pytest
import torch
from composer import Callback, ComposerModel, Trainer
from composer.callbacks import EarlyStopper, LRMonitor, SpeedMonitor
from composer.loggers import TensorboardLogger
from torchmetrics import MeanMetric

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
from electra_composer.training.optim import SCHEDULES
from electra_composer.training.progress_bar import RunProgressBar


class Tiny(ComposerModel):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 1)

    def forward(self, batch):
        return self.head(batch[0])

    def loss(self, outputs, batch):
        loss = outputs.square().mean()
        return {"total": loss, "mlm": loss / 2}

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch)

    def get_metrics(self, is_train):
        return {} if is_train else {"mean_output": MeanMetric()}

    def update_metric(self, batch, outputs, metric):
        metric.update(outputs)


def make_trainer(max_duration: str, **arguments) -> Trainer:
    torch.manual_seed(0)
    model = Tiny()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 2)), batch_size=4)
    return Trainer(
        model=model,
        optimizers=build_optimizer(OptimizerConfig(lr=1e-3), model),
        train_dataloader=data,
        eval_dataloader=data,
        eval_interval="4ba",
        max_duration=max_duration,
        progress_bar=False,
        device="cpu",
        precision="fp32",
        **arguments,
    )


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
        ({"nan_monitor": {"every": 3}}, "unknown argument callbacks.nan_monitor.every; it takes none"),
        ({"speed_monitor": {"window_size": "big"}}, "callbacks.speed_monitor.window_size: 'big' is not what it takes"),
        ({"speed_monitor": {"window_size": True}}, "callbacks.speed_monitor.window_size: True is not what it takes"),
        ({"speed_monitor": {"time_unit": "eons"}}, "callbacks.speed_monitor: Invalid time_unit: eons"),
        ({"speed_monitor": 100}, "callbacks.speed_monitor: expected its arguments"),
        (
            {"early_stopper": {"monitor": "x"}},
            "callbacks.early_stopper: no value for callbacks.early_stopper.data",
        ),
        ({"data_wait": {"log_interval": "often"}}, "callbacks.data_wait: log_interval: 'often' is not a time"),
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
        ({"wandb": {"tags": "one"}}, "loggers.wandb.tags: 'one' is not what it takes"),
        ({"wandb": "on"}, "loggers.wandb: expected its arguments"),
        ({"metrics_file": {"format": "xlsx"}}, "loggers.metrics_file: 'xlsx' is not a format"),
        ({"metrics_file": {"interval": "1ep"}}, "loggers.metrics_file: interval: '1ep': expected a number of batches"),
        ({"console": {"log_interval": "10tok"}}, "loggers.console: The `console_log_interval`"),
    ],
)
def test_what_is_wrong_with_a_logger_is_named_by_its_key(tmp_path, config, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build_loggers(config, str(tmp_path), "10ba")


def test_a_missing_package_is_named_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=re.escape("pip install 'electra-composer[wandb]'")):
        build_loggers({"wandb": None}, str(tmp_path), "10ba")


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
    deadline = time.monotonic() + 60  # wandb writes in a process of its own, and does not wait for it offline
    while b"loss/train/total" not in written.read_bytes():
        assert time.monotonic() < deadline, f"{written.stat().st_size} bytes, no loss among them"
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


# --- the metrics file


def read_metrics(path) -> list[dict]:
    with open(path, newline="") as file:
        if str(path).endswith(".csv"):
            return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_the_metrics_file_has_a_row_per_step_with_losses_and_evaluations(tmp_path, ending):
    path = tmp_path / "deep" / f"metrics.{ending}"
    trainer = make_trainer("10ba", loggers=[MetricsFile(str(path))], callbacks=[SpeedMonitor(window_size=2)])
    trainer.fit()
    trainer.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(11))
    assert all(row["loss/train/total"] == pytest.approx(2 * row["loss/train/mlm"]) for row in rows[:10])
    # The clock of step 4 stands after four batches: that is when the evaluation ran. The end evaluates, too.
    assert [row["step"] for row in rows if "metrics/eval/mean_output" in row] == [4, 8, 10]
    assert "throughput/batches_per_sec" in rows[5]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_an_interval_thins_the_rows_and_loses_no_evaluation(tmp_path, ending):
    path = tmp_path / f"metrics.{ending}"
    trainer = make_trainer("10ba", loggers=[MetricsFile(str(path), interval="5ba")])
    trainer.fit()
    trainer.close()
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert ["metrics/eval/mean_output" in row for row in rows] == [False, True, True]


class Crash(Callback):
    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 7:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_resumed_run_continues_the_file_as_if_it_had_never_stopped(tmp_path, ending):
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    trainer = make_trainer("10ba", loggers=[MetricsFile(str(whole))])
    trainer.fit()
    trainer.close()
    saving = {
        "save_folder": str(tmp_path),
        "save_filename": "ba{batch}.pt",
        "save_interval": "4ba",
        "save_overwrite": True,
    }
    trainer = make_trainer("10ba", loggers=[MetricsFile(str(cut))], callbacks=[Crash()], **saving)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit()
    trainer.engine._is_closed = True  # a killed process closes nothing
    assert read_metrics(cut)[-1]["step"] == 5  # the row of step 6 was in the making
    with open(cut, "a") as file:
        file.write('{"step": 6, "loss/tr' if ending == "jsonl" else "6,0.12")  # cut off in the middle of a line
    resumed = make_trainer("10ba", loggers=[MetricsFile(str(cut))], load_path=str(tmp_path / "ba4.pt"), **saving)
    resumed.fit()
    resumed.close()
    assert read_metrics(cut) == read_metrics(whole)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "old": 1}\n')
    trainer = make_trainer("2ba", loggers=[MetricsFile(str(path))])
    trainer.fit()
    trainer.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]
    assert "old" not in path.read_text()


@pytest.mark.parametrize(("ending", "expected"), [("jsonl", [None, None, 2.5]), ("csv", [math.nan, math.inf, 2.5])])
def test_values_that_json_cannot_say_and_tensors(tmp_path, ending, expected):
    class Odd(Callback):
        def batch_end(self, state, logger):
            logger.log_metrics(
                {"nan": torch.tensor(math.nan), "inf": math.inf, "tensor": torch.tensor([2.5]), "text": "x"}
            )

    path = tmp_path / f"metrics.{ending}"
    trainer = make_trainer("2ba", loggers=[MetricsFile(str(path))], callbacks=[Odd()])
    trainer.fit()
    trainer.close()
    row = read_metrics(path)[1]
    assert "text" not in row
    assert [row["nan"], row["inf"], row["tensor"]] == pytest.approx(expected, nan_ok=True)


# --- progress bar and console


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train_with(*loggers) -> None:
    trainer = make_trainer("8ba", loggers=list(loggers))
    trainer.fit()
    trainer.close()


def test_without_a_terminal_the_bar_writes_few_whole_lines():
    stream = io.StringIO()
    train_with(RunProgressBar(stream))
    text = stream.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    progress = [line for line in lines if "%" in line]
    assert len(progress) == 1  # the end; the ten seconds are not over before
    assert re.fullmatch(r"100\.0% 8/8ba \[\d\d:\d\d<00:00\], loss +[\d.]+  mlm +[\d.]+  lr 1\.00e-03", progress[0])
    assert [line for line in lines if line.startswith("step 4: eval/mean_output ")]


def test_on_a_terminal_it_is_drawn_in_place_and_keeps_its_width():
    stream = Terminal()
    train_with(RunProgressBar(stream, seconds=0.0))
    drawn = [part for part in stream.getvalue().split("\r") if "lr" in part]
    assert len(drawn) >= 8
    starts = {part.index("loss") for part in drawn if "8/8" in part or "7/8" in part}
    assert len(starts) == 1
    assert "loss/train" not in stream.getvalue()


def test_on_a_terminal_it_is_throttled():
    stream = Terminal()
    train_with(RunProgressBar(stream, seconds=60.0))
    assert sum("lr" in part for part in stream.getvalue().split("\r")) <= 2


def test_the_console_prints_metrics_at_its_interval_and_no_configuration():
    stream = io.StringIO()
    train_with(RunConsole(log_interval="4ba", stream=stream))
    text = stream.getvalue()
    assert "Config" not in text
    assert text.count("Train loss/train/total") == 3  # Composer's also prints the first batch
    assert "Eval metrics/eval/mean_output" in text
