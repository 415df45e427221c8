"""Largest kernels of some steps of a variant; for pretrain_step.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from variants import BareSteps, TrainerSteps

COPIES = ("Memcpy", "Memset")


def profile(variant: BareSteps | TrainerSteps, steps: int = 5, largest: int = 10) -> dict[str, Any]:
    """Profile some steps; print a table of the largest kernels to stderr.

    On CUDA the kernels are those that ran on the device, also within CUDA graphs; on the CPU they are operators.

    Returns:
        `clock`: the profiler's time that is summed; `kernels`: the `largest` ones by their own time;
        `kernels_per_step`: number of all; `copies_per_step`: copies and fills of memory; `ms_per_step`: time of all.
    """
    on_gpu = variant.clock.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        variant.block(steps)
    averages = profiler.key_averages()
    by_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=by_time, row_limit=largest), file=sys.stderr)
    return {"clock": by_time, **summary(list(averages), by_time, on_gpu, steps, largest)}


def summary(events: list[Any], by_time: str, on_gpu: bool, steps: int, largest: int) -> dict[str, Any]:
    """Summarize the profiler's averages; see :func:`profile`."""
    # On CUDA, the operator that launched a kernel carries its time too, and so does a range such as Optimizer.step.
    kinds = {torch.autograd.DeviceType.CUDA} if on_gpu else {torch.autograd.DeviceType.CPU}
    events = [event for event in events if event.device_type in kinds and not event.is_user_annotation]
    events = sorted(events, key=lambda event: getattr(event, by_time), reverse=True)
    total = sum(getattr(event, by_time) for event in events)
    copies = sum(event.count for event in events if event.key.startswith(COPIES))
    return {
        "kernels": [
            {
                "name": event.key,
                "calls_per_step": event.count / steps,
                "ms_per_step": round(getattr(event, by_time) / 1000 / steps, 4),
                "share": round(getattr(event, by_time) / total, 4),
            }
            for event in events[:largest]
        ],
        "kernels_per_step": (sum(event.count for event in events) - copies) / steps,
        "copies_per_step": copies / steps,
        "ms_per_step": round(total / 1000 / steps, 4),
    }
