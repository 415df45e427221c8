"""Profile a variant of the pretraining-step benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from variants import BareSteps


def profile(variant: BareSteps, path: str, result: dict[str, Any], steps: int = 5, largest: int = 10) -> None:
    """Profile some steps; write the largest kernels to `path` as a JSON line and to stderr as a table.

    Ranked by self time: of kernels on CUDA, of operators on the CPU.
    """
    on_gpu = variant.clock.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        variant.block(steps)
    averages = profiler.key_averages()
    by_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # On CUDA, the operator that launched a kernel carries the kernel's time too.
    events = [event for event in averages if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: getattr(event, by_time), reverse=True)
    total = sum(getattr(event, by_time) for event in events)
    kernels = [
        {
            "name": event.key,
            "calls_per_step": event.count / steps,
            "ms_per_step": round(getattr(event, by_time) / 1000 / steps, 4),
            "share": round(getattr(event, by_time) / total, 4),
        }
        for event in events[:largest]
    ]
    print(averages.table(sort_by=by_time, row_limit=largest), file=sys.stderr)
    about = {"benchmark": "profile", "clock": by_time, "options": result["options"], "length": result["length"]}
    Path(path).write_text(json.dumps({**about, "kernels": kernels, "machine": result["machine"]}) + "\n")
