"""Progress bar of a run: progress, time left and metrics in one line."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from tqdm import tqdm

from electra_composer.training.loggers import plain_numbers

MFU = "throughput/device/mfu"
BAR_METRICS: dict[str, Callable[[float], str]] = {
    MFU: lambda value: f"mfu {value:4.1%}",
    "throughput/samples_per_sec": lambda value: f"{tqdm.format_sizeof(value):>5} sp/s",
    "data/wait_share": lambda value: f"wait {value:4.1%}",
    "data/fill": lambda value: f"fill {value:4.1%}",
    "memory/peak_allocated_mem": lambda value: f"gpu {value:.1f} GB",
    "memory/peak_resident_mem": lambda value: f"ram {value:.1f} GB",
}
"""Metrics of monitors.py and callbacks.py that the bar shows as last logged → their format; by falling priority."""

BAR_WIDTH = 10
"""Minimum columns of the bar itself."""


class RunProgressBar(LoggerDestination):
    """Shows one progress bar for the training, on the first rank of each node.

    Shows the fraction done, the time left, the training losses by the last part of their names, tokens per second (as
    counted by the loader, without padding), MFU on a GPU whose peak is known, the learning rate, and those of
    :data:`BAR_METRICS` that are logged. The line is cut to the width of the terminal by priority. On a terminal it is
    drawn at most twice a second; if the stream is a file or a pipe, a line is written every ten seconds instead.
    Metrics of an evaluation are written as one line at its end. Tokens per second are measured between drawings on
    Composer's clock, without evaluations.

    Args:
        stream: None: standard error.
        seconds: minimum time between drawings; None: 0.5 on a terminal, else 10.
    """

    def __init__(self, stream: TextIO | None = None, seconds: float | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.seconds = seconds if seconds is not None else (0.5 if self.is_terminal else 10.0)
        self.losses: dict[str, float] = {}
        self.shown: dict[str, float] = {}  # of BAR_METRICS
        self.eval_metrics: dict[str, Any] = {}
        self.bar: tqdm | None = None
        self.eval_bar: tqdm | None = None
        self.drawn_at = 0.0
        self.drawn: tuple[float, float] = (0.0, 0.0)  # tokens and seconds of training at the last drawing

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        for name, value in metrics.items():
            if name.startswith("loss/train/"):
                self.losses[name.removeprefix("loss/train/")] = value
            elif name in BAR_METRICS:
                self.shown[name] = value
            elif name.startswith("metrics/") and not name.startswith("metrics/train/"):
                self.eval_metrics[name.removeprefix("metrics/")] = value

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_local_rank() != 0 or self.bar is not None:
            return
        assert state.max_duration is not None
        done, total, unit = _position(state)
        # Without a terminal tqdm only keeps the time, and _draw writes the lines.
        self.bar = tqdm(
            initial=done,
            total=total,
            unit=unit,
            unit_scale=unit == "tok",
            file=self.stream if self.is_terminal else io.StringIO(),
            dynamic_ncols=True,
            miniters=1 << 62,  # drawn by _draw only, not by tqdm's monitoring thread
            maxinterval=math.inf,
            bar_format="{percentage:5.1f}%|{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}]{postfix}",
        )
        self.drawn = (state.timestamp.token.value, state.timestamp.total_wct.total_seconds())
        self.drawn_at = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bar is not None and time.monotonic() - self.drawn_at >= self.seconds:
            self._draw(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self._draw(state)
            self.bar.close()
            self.bar = None

    def eval_start(self, state: State, logger: Logger) -> None:
        self.eval_metrics = {}
        if dist.get_local_rank() == 0 and self.is_terminal:
            total = None if state.dataloader_len is None else int(state.dataloader_len)
            self.eval_bar = tqdm(
                desc=state.dataloader_label, total=total, file=self.stream, leave=False, dynamic_ncols=True
            )

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self.eval_bar is not None:
            self.eval_bar.update()

    def eval_end(self, state: State, logger: Logger) -> None:
        if self.eval_bar is not None:
            self.eval_bar.close()
            self.eval_bar = None
        if dist.get_local_rank() == 0:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in plain_numbers(self.eval_metrics).items())
            tqdm.write(f"step {state.timestamp.batch.value}: {metrics}", file=self.stream)

    def close(self, state: State, logger: Logger) -> None:
        for bar in (self.eval_bar, self.bar):
            if bar is not None:
                bar.close()
        self.eval_bar = self.bar = None

    def _draw(self, state: State) -> None:
        assert self.bar is not None
        tokens, seconds = state.timestamp.token.value, state.timestamp.total_wct.total_seconds()
        rate = (tokens - self.drawn[0]) / max(seconds - self.drawn[1], 1e-9)
        self.drawn, self.drawn_at = (tokens, seconds), time.monotonic()
        self.bar.update(_position(state)[0] - self.bar.n)
        if self.is_terminal:
            self.bar.set_postfix_str(self._fitting(self._parts(state, rate)), refresh=False)
            self.bar.refresh()
        else:
            self.bar.set_postfix_str("  ".join(self._parts(state, rate)), refresh=False)
            print(self._line().strip(), file=self.stream, flush=True)

    def _parts(self, state: State, tokens_per_second: float) -> list[str]:
        """Return the texts after the bar, by falling priority."""
        parts = [f"{'loss' if name == 'total' else name} {value:7.4f}" for name, value in self.losses.items()]
        if state.timestamp.token.value:
            parts.append(f"{tqdm.format_sizeof(tokens_per_second):>5} tok/s")
        lr = max((group["lr"] for optimizer in state.optimizers for group in optimizer.param_groups), default=0.0)
        shown = {name: show(self.shown[name]) for name, show in BAR_METRICS.items() if name in self.shown}
        speed = [shown.pop(MFU)] if MFU in shown else []
        return [*parts, *speed, f"lr {lr:.2e}", *shown.values()]

    def _fitting(self, parts: list[str]) -> str:
        """Join as many of the first parts as fit the terminal beside a bar of :data:`BAR_WIDTH`."""
        assert self.bar is not None
        self.bar.set_postfix_str("", refresh=False)
        columns = self.bar.format_dict["ncols"]
        if columns is None:
            return "  ".join(parts)
        room = columns - len(self._line()) - BAR_WIDTH - len("||, ")
        fitting = ""
        for part in parts:
            longer = f"{fitting}  {part}" if fitting else part
            if len(longer) > room:
                break
            fitting = longer
        return fitting

    def _line(self) -> str:
        """Return the line without the bar itself."""
        assert self.bar is not None
        numbers = {**self.bar.format_dict, "ncols": None, "bar_format": self.bar.bar_format.replace("|{bar}|", "")}
        return tqdm.format_meter(**numbers)


def _position(state: State) -> tuple[int, int | None, str]:
    """Return progress, total and unit of training: batches instead of epochs if the loader has a length."""
    duration = state.max_duration
    assert duration is not None
    if duration.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return state.timestamp.batch.value, duration.value * int(state.dataloader_len), "ba"
    return state.timestamp.get(duration.unit).value, duration.value, duration.unit.value
