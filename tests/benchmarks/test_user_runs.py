"""Commands of a user in limited time: their end, what is read of them, and the comparison of two runs."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import user_runs
from composer.core import Timestamp
from profiling import summary
from recorded_run import LossTrace

from electra_composer.training.numerical_guard import NumericalGuard


def test_a_command_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time, os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    status, seconds = user_runs.run([sys.executable, "-c", program], 1.5)
    assert status == -signal.SIGTERM
    assert 1.5 <= seconds < 10
    pid = int((tmp_path / "child").read_text())
    for _ in range(100):  # until init has taken it
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child runs on")
    assert user_runs.run([sys.executable, "-c", "import sys; sys.exit(3)"], 30)[0] == 3


def test_sigterm_ends_the_command_and_what_is_there_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGTERM, user_runs.terminate)
    try:
        program = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
        assert user_runs.run([sys.executable, "-c", program], 60)[0] == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_first_batch_that_differs_is_named() -> None:
    first = [{"batch": n, "rows": 7, "total": (0.1 * n).hex()} for n in range(1, 6)]
    second = [dict(line) for line in first[:4]]
    assert user_runs.compare(first, second) == {"batches": 4, "first_difference": None, "differing": 0}
    second[1]["total"], second[3]["total"] = math.nextafter(0.2, 1).hex(), (0.5).hex()
    assert user_runs.compare(first, second) == {
        "batches": 4,
        "first_difference": {"first_run": first[1], "second_run": second[1]},
        "differing": 2,
    }
    with pytest.raises(user_runs.UserError, match="recorded no batch"):
        user_runs.compare(first, [])


def test_values_of_a_metrics_file_that_a_kill_has_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert user_runs.step_ms_of(path) is None
    name = user_runs.MEDIAN["batches_per_second"]
    rows = [{"step": 1}, {"step": 2, name: 50.0}, {"step": 3, name: None}, {"step": 4, name: 40.0}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"step": 5, "thr')
    assert user_runs.step_ms_of(path) == 25.0
    assert len(user_runs.read_lines(path)) == 4


def test_a_folder_of_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(user_runs.UserError, match="no such folder; give one with corpus/ and glue_data/"):
        user_runs.parse(["convert", str(tmp_path), "--data", str(tmp_path / "none")])


def test_a_trace_has_the_exact_losses_and_reads_them_at_its_interval(tmp_path: Path) -> None:
    guard, trace = NumericalGuard(str(tmp_path), 1.0), LossTrace(str(tmp_path), interval=2)
    taken = []
    guard.record_losses = taken.append  # type: ignore[method-assign]
    state = SimpleNamespace(callbacks=[guard, trace], batch={"input_ids": torch.tensor([[3, 4], [5, 6]])})
    trace.fit_start(state, None)
    loss = torch.tensor(0.1)
    for number in range(3):
        guard.record_losses({"loss/train/total": loss, "loss/train/mlm": loss / 3})
        loss += 1  # a graph writes its losses to the same memory again
        state.timestamp = Timestamp(batch=number + 1)
        trace.batch_end(state, None)
        assert len(user_runs.read_lines(trace.path)) == 2 * (number > 0)
    trace.fit_end(state, None)
    lines = user_runs.read_lines(trace.path)
    first = torch.tensor(0.1)
    assert lines[0] == {"batch": 1, "rows": 50, "total": first.item().hex(), "mlm": (first / 3).item().hex()}
    assert [line["batch"] for line in lines] == [1, 2, 3]
    assert float.fromhex(lines[2]["total"]) == (first + 1 + 1).item()
    assert len(taken) == 3


def test_kernels_are_counted_without_copies_operators_and_ranges() -> None:
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(
        key: str, device: torch.autograd.DeviceType, count: int, us: float, note: bool = False
    ) -> SimpleNamespace:
        times = {"self_device_time_total": us, "self_cpu_time_total": 1.0}
        return SimpleNamespace(key=key, device_type=device, count=count, is_user_annotation=note, **times)

    events = [
        event("aten::mm", cpu, 10, 800.0),
        event("small_kernel", cuda, 30, 200.0),
        event("gemm", cuda, 10, 800.0),
        event("Memcpy HtoD (Pinned -> Device)", cuda, 5, 1000.0),
        event("Optimizer.step#AdamW.step", cuda, 5, 300.0, note=True),
    ]
    found = summary(events, "self_device_time_total", on_gpu=True, steps=5, largest=2)
    assert [kernel["name"] for kernel in found["kernels"]] == ["Memcpy HtoD (Pinned -> Device)", "gemm"]
    assert found["kernels"][1] == {"name": "gemm", "calls_per_step": 2.0, "ms_per_step": 0.16, "share": 0.4}
    assert (found["kernels_per_step"], found["copies_per_step"], found["ms_per_step"]) == (8.0, 1.0, 0.4)
    found = summary(events, "self_cpu_time_total", on_gpu=False, steps=5, largest=2)
    assert (found["kernels_per_step"], len(found["kernels"])) == (2.0, 1)
