"""Host time that Composer's `Trainer` adds to a bare training step, and what it is spent on; prints one JSON line.

    python benchmarks/trainer_overhead.py [--steps 60] [--repeats 30] [key=value …]

The model is so small that a step is all host. Its bare loop (forward, loss, backward, clipping, update) and the trainer
with the callbacks, loggers and loader of `yamls/small.yaml` alternate in short blocks of steps in one process;
`overhead_ms` is the difference between the lower quartiles of their steps. The parts are measured in a block of their
own, in which every hook of a callback, every logger and every wait for the loader is timed. `key=value` overrides
`small.yaml`.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from composer.loggers import LoggerDestination
from machine import describe, require_positive
from pretrain_step import set_up
from tqdm import tqdm
from variants import TrainerSteps

from electra_composer.errors import report_user_errors
from electra_composer.training.engine import RunEngine


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one JSON line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        setup = set_up(options, Path(folder))
        batches = setup.workload.batches(setup.config, options.segment)
        variants = {"bare": setup.build("b", batches), "trainer": setup.build("c", batches)}
        steps: dict[str, list[float]] = {name: [] for name in variants}
        rounds = [(turn, name) for turn in range(options.repeats + 1) for name in variants]
        for turn, name in tqdm(rounds, desc="blocks", file=sys.stderr):
            seconds = variants[name].block(options.warmup + options.segment)[options.warmup - 1 :]
            if turn:  # the first block includes the start of libraries and of the loader
                steps[name] += seconds
        trainer = variants["trainer"]
        assert isinstance(trainer, TrainerSteps)
        parts = measure_parts(trainer, options.warmup + options.segment)
    # The lower quartile: a neighbour on the machine slows whole blocks down, of either kind.
    times = {name: 1e3 * statistics.quantiles(seconds, n=4)[0] for name, seconds in steps.items()}
    medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
    result = {
        "benchmark": "trainer_overhead",
        "bare_ms": round(times["bare"], 3),
        "trainer_ms": round(times["trainer"], 3),
        "overhead_ms": round(times["trainer"] - times["bare"], 3),
        "median_overhead_ms": round(1e3 * (medians["trainer"] - medians["bare"]), 3),
        "parts_ms": parts,
        "steps_of_each": len(steps["trainer"]),
        "machine": describe(),
    }
    print(json.dumps(result), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options; the others that `pretrain_step.set_up` reads are fixed."""
    parser = argparse.ArgumentParser(prog="benchmarks/trainer_overhead.py", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="timed steps per block (%(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="blocks of each kind (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    require_positive(options, "steps", "repeats")
    fixed = {"device": "cpu", "precision": "fp32", "size": "tiny", "batch": 8, "length": None, "vocab": 512}
    fixed |= {"data": None, "compile": "false", "seed": 0, "warmup": 20, "memory_only": None}
    return argparse.Namespace(**fixed, repeats=options.repeats, segment=options.steps, overrides=options.overrides)


def measure_parts(variant: TrainerSteps, batches: int) -> dict[str, float]:
    """Time the parts of one block of steps.

    Returns:
        Milliseconds per step: `loader`: waiting for a batch; `callback NAME`, `logger NAME`: hooks and log calls;
        `dispatch`: the engine without them; descending.
    """
    trainer, totals = variant.trainer, collections.Counter[str]()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                totals[name] += time.perf_counter() - start

        return run

    for callback in trainer.state.callbacks:
        kind = "logger" if isinstance(callback, LoggerDestination) else "callback"
        name = f"{kind} {type(callback).__name__}"
        callback.run_event = timed(name, callback.run_event)
        if isinstance(callback, LoggerDestination):
            callback.log_metrics = timed(name, callback.log_metrics)
    trainer.logger.log_metrics = timed("log calls", trainer.logger.log_metrics)
    engine = trainer.engine
    assert isinstance(engine, RunEngine)
    engine.forget_hooks()
    engine.run_event = timed("events", engine.run_event)
    loader = trainer.state.dataloader
    trainer.state.set_dataloader(TimedLoader(loader, lambda seconds: totals.update(loader=seconds)), "train")
    variant.block(batches)
    hooks = sum(value for name, value in totals.items() if name.startswith(("callback", "logger")))
    totals["dispatch"] = totals.pop("events") + totals.pop("log calls") - hooks
    return {name: round(1e3 * value / batches, 4) for name, value in totals.most_common()}


class TimedLoader:
    """A loader that reports how long each batch was waited for."""

    def __init__(self, loader: Any, report: Callable[[float], None]):
        self.loader, self.report = loader, report

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.report(time.perf_counter() - start)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


if __name__ == "__main__":
    report_user_errors(main)()
