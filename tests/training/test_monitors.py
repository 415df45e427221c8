"""Throughput, MFU, data waiting time and memory, with a clock set by the test and numbers computed by hand."""

from __future__ import annotations

import datetime
import time
from types import SimpleNamespace

import pytest
import torch
from composer import Callback, ComposerModel, Trainer
from composer.core import DataSpec, Timestamp
from composer.loggers import InMemoryLogger

from electra_composer.errors import UserError
from electra_composer.training import monitors
from electra_composer.training.monitors import (
    DataWait,
    RunMemoryMonitor,
    ThroughputMonitor,
    device_flops_available,
)

ROWS, TOKENS, FLOPS, SECONDS = 4, 10, 3_000, 0.5  # per batch


class Scored(ComposerModel):
    """Reports invented FLOPs of its batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, batch):
        return self.layer(batch["x"])

    def loss(self, outputs, batch):
        return outputs.square().mean()

    def flops_per_batch(self, batch):
        return FLOPS * len(batch["x"]) // ROWS


class Uncounted(Scored):
    flops_per_batch = property()  # no such attribute


class Clock(Callback):
    """Sets the time of every batch to half a second. Must come before the monitors."""

    def batch_end(self, state, logger):
        now = state.timestamp
        state.timestamp = Timestamp(
            **{
                name: getattr(now, name)
                for name in ("epoch", "batch", "sample", "token", "batch_in_epoch", "sample_in_epoch", "token_in_epoch")
            },
            total_wct=datetime.timedelta(seconds=SECONDS * now.batch.value),
        )


def train(callbacks, model=None, batches=7, rows=64, dataset=None, tokens=TOKENS) -> InMemoryLogger:
    memory = InMemoryLogger()
    model = model or Scored()
    data = torch.utils.data.DataLoader(dataset or [{"x": torch.ones(4)}] * rows, batch_size=ROWS)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=DataSpec(
            data, get_num_samples_in_batch=lambda batch: ROWS, get_num_tokens_in_batch=lambda batch: tokens
        ),
        max_duration=f"{batches}ba",
        callbacks=callbacks,
        loggers=[memory],
        progress_bar=False,
        device="cpu",
        precision="fp32",
    )
    trainer.fit()
    trainer.close()
    return memory


def logged(memory: InMemoryLogger, name: str) -> list[tuple[int, float]]:
    return [(int(when.batch), value) for when, value in memory.data.get(name, [])]


def test_throughput_of_whole_windows_and_of_the_one_that_the_end_cuts_short():
    memory = train([Clock(), ThroughputMonitor(window_size=4, gpu_flops_available=60_000.0)])
    # The first batch is in no window; batches 2 to 5 are one window, 6 and 7 an incomplete one.
    for name, of_a_batch in (("batches", 1), ("samples", ROWS), ("tokens", TOKENS), ("flops", FLOPS)):
        expected = [(5, of_a_batch / SECONDS), (7, of_a_batch / SECONDS)]
        assert logged(memory, f"throughput/{name}_per_sec") == expected
        assert logged(memory, f"throughput/device/{name}_per_sec") == expected
    assert logged(memory, "throughput/device/mfu") == [(5, pytest.approx(0.1)), (7, pytest.approx(0.1))]
    assert logged(memory, "time/train") == [(5, 2.5 / 3600), (7, 3.5 / 3600)]
    assert logged(memory, "time/total") == [(5, 2.5 / 3600), (7, 3.5 / 3600)]


def test_a_run_that_ends_with_its_window_logs_it_once():
    memory = train([Clock(), ThroughputMonitor(window_size=3)])
    assert [batch for batch, _ in logged(memory, "throughput/tokens_per_sec")] == [4, 7]


def test_what_cannot_be_known_is_not_logged():
    """A CPU has no peak, the model may not count FLOPs, and the loader may not count tokens."""
    memory = train([ThroughputMonitor(window_size=2)])
    assert "throughput/flops_per_sec" in memory.data
    assert "throughput/device/mfu" not in memory.data
    memory = train([ThroughputMonitor(window_size=2, gpu_flops_available=1.0)], model=Uncounted(), tokens=0)
    assert "throughput/samples_per_sec" in memory.data
    assert not {"throughput/flops_per_sec", "throughput/device/mfu", "throughput/tokens_per_sec"} & set(memory.data)


def test_operations_are_counted_once_a_window():
    """Counting them synchronises with the device of the batch."""
    counted = []
    model = Scored()
    model.flops_per_batch = lambda batch: counted.append(1) or FLOPS
    train([ThroughputMonitor(window_size=3)], model=model, batches=7)
    assert len(counted) == 2


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "peak"),
    [
        ("gpu", "amp_bf16", True, 989.5e12),  # dense: half of the 1,979 of the data sheet
        ("gpu", "fp32", False, 67e12),
        ("gpu", "fp32", True, 494.5e12),
        ("cpu", "fp32", True, 0.0),  # a run on the CPU of a machine with a GPU
    ],
)
def test_the_peak_is_dense_and_of_the_precision_that_is_computed_in(monkeypatch, device, precision, tf32, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        state = SimpleNamespace(device=SimpleNamespace(name=device), precision=SimpleNamespace(value=precision))
        assert device_flops_available(state) == peak
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_memory_is_logged_at_its_interval_and_at_the_end(monkeypatch, recwarn):
    peaks = iter([1_000_000_000, 2_500_000_000, 3_000_000_000])
    monkeypatch.setattr(monitors, "peak_resident_bytes", lambda: next(peaks))
    memory = train([RunMemoryMonitor("3ba")])
    assert logged(memory, "memory/peak_resident_mem") == [(3, 1.0), (6, 2.5), (7, 3.0)]
    assert not [warning for warning in recwarn if "memory monitor" in str(warning.message)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_the_gpu():
    memory = InMemoryLogger()
    model = Scored()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=DataSpec(
            torch.utils.data.DataLoader([{"x": torch.ones(4)}] * 16, batch_size=ROWS),
            get_num_samples_in_batch=lambda batch: ROWS,
        ),
        max_duration="4ba",
        callbacks=[RunMemoryMonitor("2ba")],
        loggers=[memory],
        progress_bar=False,
        device="gpu",
    )
    trainer.fit()
    trainer.close()
    assert len(memory.data["memory/peak_allocated_mem"]) == 2


@pytest.mark.parametrize("interval", ["0ba", "soon"])
@pytest.mark.parametrize("monitor", [DataWait, RunMemoryMonitor])
def test_intervals_that_are_none(monitor, interval):
    with pytest.raises(UserError, match="log_interval"):
        monitor(interval)


def test_data_wait_is_the_share_of_time_that_the_loader_takes():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, index):
            time.sleep(0.01)
            return {"x": torch.ones(4)}

    shares = logged(train([DataWait("3ba")], dataset=Slow(), batches=6), "data/wait_share")
    assert [batch for batch, _ in shares] == [3, 6]
    assert all(0.3 < share <= 1.0 for _, share in shares)  # 40 ms of waiting per batch, whose step takes a few
