"""What stands in the progress bar, and that it stays within the terminal."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import pytest
import torch
from composer.core import Time, Timestamp

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main
from electra_composer.training.progress_bar import BAR_METRICS, BAR_WIDTH, RunProgressBar

METRICS = {
    "loss/train/total": 12.3456,
    "loss/train/mlm": 3.4567,
    "loss/train/rtd": 0.1778,
    "throughput/device/mfu": 0.4321,
    "throughput/samples_per_sec": 17_000.0,
    "data/wait_share": 0.012,
    "data/fill": 0.991,
    "memory/peak_resident_mem": 3.21,
}
IN_ORDER = [
    "loss 12.3456",
    "mlm  3.4567",
    "rtd  0.1778",
    " tok/s",
    "lr 5.00e-04",
    "mfu 43.2%",
    "17.0k sp/s",
    "wait 1.2%",
]
IN_ORDER += ["wait 1.2%", "fill 99.1%", "ram 3.2 GB"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def draw(stream, columns: int | None, metrics=METRICS) -> str:
    """The last drawing of a bar at batch 62,500 of a million."""
    bar = RunProgressBar(stream, seconds=0.0)
    state = SimpleNamespace(
        timestamp=Timestamp(batch=62_500, token=1_000_000),
        max_duration=Time.from_timestring("1000000ba"),
        dataloader_len=None,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 5e-4}])],
    )
    bar.fit_start(state, None)
    bar.bar.dynamic_ncols = lambda _: (columns, None)
    bar.log_metrics(metrics)
    bar.batch_end(state, None)
    bar.bar = bar.bar.close()
    return re.split(r"[\r\n]+", stream.getvalue().strip("\r\n"))[-1]


@pytest.mark.parametrize("columns", [60, 80, 100, 120, 150, 200])
def test_a_narrow_terminal_gets_the_most_wanted_first_and_nothing_by_halves(columns):
    line = draw(Terminal(), columns)
    assert len(line) <= columns
    assert "<" in line  # the time left is always there
    shown = [part in line for part in IN_ORDER]
    assert shown == sorted(shown, reverse=True)
    bar = line.split("|")[1]
    assert len(bar) >= BAR_WIDTH
    if not all(shown):  # one more would not have fitted
        assert len(bar) - BAR_WIDTH < len(IN_ORDER[shown.index(False)]) + len("  ") + len("000.0")


def test_a_wide_terminal_shows_everything():
    line = draw(Terminal(), 240)
    assert all(part in line for part in IN_ORDER)


def test_a_file_gets_whole_lines_of_any_length():
    line = draw(io.StringIO(), 80)
    assert all(part in line for part in IN_ORDER)
    assert "|" not in line


def test_the_bar_shows_what_is_logged_and_no_more():
    line = draw(Terminal(), 240, {"loss/train/total": 1.0, "data/fill": 0.5})
    assert "fill 50.0%" in line
    assert not any(word in line for word in ("mfu", "wait", "sp/s", "GB"))


def test_a_run_logs_everything_that_the_bar_can_show(tiny_yaml, tmp_path):
    """A name that nothing logs would never be shown."""
    overrides = [
        "callbacks={speed_monitor: {window_size: 2, gpu_flops_available: 1e12}, data_wait: {}, memory_monitor: {}}",
        "trainer.max_duration=4ba",
        "schedule.warmup=1ba",
        "checkpoints.milestones=[]",
        "checkpoints.interval=null",
    ]
    main(load_config(str(tiny_yaml), overrides, PretrainConfig))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert set(BAR_METRICS) - names == {"memory/peak_allocated_mem"} - (
        {*names} if torch.cuda.is_available() else set()
    )
    assert {"loss/train/total", "loss/train/mlm", "loss/train/rtd", "time/token"} <= names
