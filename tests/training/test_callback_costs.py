"""No callback or logger that the configuration offers waits for the device in every batch.

A CPU that the trainer takes for a GPU stands in for one. What would wait for a GPU is counted per batch: operators and
methods that read a tensor on the host, collectives, and statistics of CUDA. A run without the callback is subtracted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from composer.devices import DeviceCPU
from composer.utils import dist
from tape import waits
from tiny import ROOT
from tiny_trainer import Tiny, make_trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from electra_composer.training.builders import CALLBACKS, LOGGERS, build_callbacks, build_loggers
from electra_composer.training.tracking import PACKAGES
from electra_composer.training.trainer import RunTrainer

INTERVAL, BATCHES = 10, 13
STOPPER = {"monitor": "mean_output", "dataloader_label": "eval"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "early_stopper": {**STOPPER, "patience": "100ba"},
    "speed_monitor": {"window_size": INTERVAL - 1},  # the first batch is in no window
    "threshold_stopper": {**STOPPER, "threshold": 1e9},
}
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")


class Counted(Tiny):
    """Counts its FLOPs, as the pretraining model does."""

    def flops_per_batch(self, batch: Any) -> float:
        return 1.0


class OtherDevice(DeviceCPU):
    """A CPU that the trainer takes for a GPU."""

    name = "gpu"


class Reads(TorchDispatchMode):
    """Counts what waits for the device, by the number of batches that are done."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer
        self.counts: Counter[int] = Counter()

    def add(self) -> None:
        self.counts[self.trainer.state.timestamp.batch.value] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            self.add()
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Counts copies to the host, which for a tensor on the CPU are no operator."""

    def __init__(self, reads: Reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            self.reads.add()
        return func(*args, **(kwargs or {}))


def counted(function: Callable[..., Any], reads: Reads) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        reads.add()
        return function(*args, **kwargs)

    return count


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[int]]:
    """`count(callbacks, loggers)`: batches done → number of waits of a run that evaluates at the interval."""

    def run(callbacks: list[Callback], loggers: list[Any]) -> Counter[int]:
        arguments: dict[str, Any] = {"callbacks": callbacks, "loggers": loggers, "eval_interval": f"{INTERVAL}ba"}
        arguments |= {"trainer_class": RunTrainer, "log_interval": f"{INTERVAL}ba", "model": Counted()}
        trainer = make_trainer(f"{BATCHES}ba", **arguments)
        trainer.state.device = OtherDevice()
        reads = Reads(trainer)
        with monkeypatch.context() as patch:
            for name in COLLECTIVES:
                patch.setattr(dist, name, counted(getattr(dist, name), reads))
            for name in ("memory_stats", "synchronize", "mem_get_info"):
                patch.setattr(torch.cuda, name, counted(lambda *_: {}, reads))
            with HostCopies(reads), reads:
                trainer.fit()
        return reads.counts

    return run


class Probe(Callback):
    def batch_end(self, state: Any, logger: Any) -> None:
        float(state.loss["total"])


def extra(
    count: Callable[..., Counter[int]], callbacks: list[Callback], folder: Path, loggers: dict[str, Any] | None = None
) -> Counter[int]:
    """Count what callbacks add to a run with a metrics file, or loggers to a run without loggers."""

    def built(names: dict[str, Any]) -> list[Any]:
        return build_loggers(names, str(folder), f"{INTERVAL}ba", progress_bar=False)

    without: dict[str, Any] = {"metrics_file": {}} if loggers is None else {}
    found = count(callbacks, built(loggers or without))
    found.subtract(count([], built(without)))
    return +found


def test_a_callback_that_reads_the_loss_is_noticed(count: Callable[..., Counter[int]], tmp_path: Path) -> None:
    assert set(extra(count, [Probe()], tmp_path)) == set(range(1, BATCHES + 1))


def documented() -> dict[str, str]:
    """Name of a callback or logger → when it waits for the device, from the table of docs/configuration.md."""
    text = Path(ROOT, "docs/configuration.md").read_text(encoding="utf-8").partition("## Keys")[0]
    return dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))


@pytest.mark.parametrize("name", [*CALLBACKS, *(name for name in LOGGERS if name not in PACKAGES)])
def test_no_batch_waits_but_at_the_interval(count: Callable[..., Counter[int]], tmp_path: Path, name: str) -> None:
    """And those that wait at no batch are the ones of which the documentation says so."""
    arguments = {name: ARGUMENTS.get(name, {})}
    if name in CALLBACKS:
        found = extra(count, build_callbacks(arguments), tmp_path)
    else:
        found = extra(count, [], tmp_path, arguments)
    # What an evaluation has logged may be read in the batch after it.
    assert set(found) <= {INTERVAL, INTERVAL + 1, BATCHES}
    assert (not found) == (documented()[name] == "never")


def test_all_that_is_offered_is_documented() -> None:
    assert set(documented()) == {*CALLBACKS, *LOGGERS}
