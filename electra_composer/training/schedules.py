"""Learning rate schedules, with those of beta1 that belong to them, and the callback that applies them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger

from electra_composer.errors import UserError
from electra_composer.ranges import DURATION, TimeRange
from electra_composer.training.times import parse_time


def electra(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Linear decay over all steps times `min(1, step / warmup)`, both from step 0 (google-research/electra).

    As in all schedules here, `step` is 0 for the first update and `total - 1` for the last; `warmup` and `decay` are
    lengths in the same unit; the result is a multiple of the learning rate.
    """
    return max(0.0, 1 - step / total) * (min(1.0, step / warmup) if warmup else 1.0)


def linear(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Linear from 0 to 1 over `warmup`, then linear to 0 over the rest (transformers, Composer)."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / (total - warmup)) if total > warmup else 1.0


def one_cycle(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Cosine from 1/25 up to 1 at the last step of `warmup`, cosine down to 1/250000 at the last step of training.

    That of `torch.optim.lr_scheduler.OneCycleLR` with its `div_factor` 25 and `final_div_factor` 1e4, which ends phases
    at their last steps, and without its `cycle_momentum`. Not that of fastai, see :func:`one_cycle_fastai`.
    """
    peak, last = max(warmup - 1, 0.0), total - 1
    if step < peak:
        return _cosine(1 / 25, 1.0, step / peak)
    return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)) if last > peak else 0.0)


def one_cycle_fastai(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Cosine from 1/25 up to 1 over `warmup`, cosine down to 1e-5 over the rest, which is reached after the last step.

    fastai's `fit_one_cycle` with its `div` 25 and `div_final` 1e5; its `pct_start` is `warmup / total`. It also changes
    beta1, see :func:`fastai_beta1`.
    """
    return _two_cosines(step, total, warmup, 1 / 25, 1.0, 1e-5)


def adjusted_one_cycle(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Same as :func:`one_cycle_fastai` from 1e-5 on: `div` 1e5 (richarddwang/electra_pytorch, warmup 10,000 steps)."""
    return _two_cosines(step, total, warmup, 1e-5, 1.0, 1e-5)


def fastai_beta1(step: float, total: float, warmup: float) -> float:
    """Return beta1 of fastai's `fit_one_cycle`: cosine from 0.95 to 0.85 over `warmup`, cosine back over the rest."""
    return _two_cosines(step, total, warmup, 0.95, 0.85, 0.95)


def constant(step: float, total: float, warmup: float, decay: float) -> float:
    """Linear from 0 to 1 over `warmup`, constant, then linear to 0 over the last `decay` steps."""
    down = (total - step) / decay if decay else 1.0
    return max(0.0, min(1.0, step / warmup if warmup else 1.0, down))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def _two_cosines(step: float, total: float, warmup: float, start: float, middle: float, end: float) -> float:
    if step < warmup:
        return _cosine(start, middle, step / warmup)
    return _cosine(middle, end, (step - warmup) / (total - warmup) if total > warmup else 0.0)


SCHEDULES: dict[str, Callable[[float, float, float, float], float]] = {
    function.__name__: function
    for function in (electra, linear, one_cycle, one_cycle_fastai, adjusted_one_cycle, constant)
}

BETA1: dict[str, Callable[[float, float, float], float]] = {
    "one_cycle_fastai": fastai_beta1,
    "adjusted_one_cycle": fastai_beta1,
}
"""Schedules that set beta1 too, in place of `optimizer.betas[0]`."""


class Schedule(Callback):
    """Sets the learning rate of every batch, and beta1 with a schedule of :data:`BETA1`.

    Pass it to the trainer among the **callbacks**, not as a scheduler. The values depend on the timestamp alone, also
    in a resumed run and with a changed duration. Calling the schedule with a state returns the multiplier, as with a
    `ComposerScheduler`.

    Args:
        name: a key of :data:`SCHEDULES`.
        warmup: a Composer time: `10000ba`, `0.1dur`, `1ep`; `0ba` for none.
        max_duration: a Composer time.
        decay: a Composer time, for `constant` only.

    Raises:
        UserError: not a time, a unit that cannot be compared with `max_duration`, or phases longer than the training.
            What needs the length of an epoch is checked by :meth:`check`, and at the start of training.
    """

    # Workaround (composer 0.32): Trainer steps its schedulers before it advances the timestamp, so batches 0 and 1 both
    # get the rate of step 0, and every later batch that of the batch before; goes when it steps them afterwards.

    def __init__(self, name: str, warmup: str, max_duration: str, decay: str = "0.1dur") -> None:
        self.name, self.function, self.beta1 = name, SCHEDULES[name], BETA1.get(name)
        phases = {"schedule.warmup": warmup, **({"schedule.decay": decay} if name == "constant" else {})}
        self.phases = {key: parse_time(time, key, TimeRange(positive=False)) for key, time in phases.items()}
        self.duration = duration = parse_time(max_duration, "trainer.max_duration", DURATION)
        for key, time in self.phases.items():
            units = {time.unit, duration.unit}
            if TimeUnit.DURATION not in units and len(units) > 1 and units != {TimeUnit.EPOCH, TimeUnit.BATCH}:
                raise UserError(
                    f"{key}: {time.to_timestring()} cannot be compared with trainer.max_duration {max_duration}; "
                    f"give it in {duration.unit.value}, or as a fraction of training such as 0.1dur"
                )
        if {time.unit for time in self.phases.values()} <= {duration.unit, TimeUnit.DURATION}:
            self.check(batches_per_epoch=1)  # units cancel, so the lengths can be checked already

    def check(self, batches_per_epoch: int) -> None:
        """Refuse phases longer than the training, with the length of an epoch.

        Raises:
            UserError: they are longer.
        """
        self._lengths(self.duration, batches_per_epoch)

    def __call__(self, state: State) -> float:
        """Return the multiple of the learning rate for the batch that starts now."""
        return self.function(*self._now(state))

    def init(self, state: State, logger: Logger) -> None:
        """Store each group's base learning rate as `initial_lr`, as PyTorch's schedulers do, for checkpoints."""
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def fit_start(self, state: State, logger: Logger) -> None:
        self(state)  # the length of an epoch is known now: raise errors before the first batch

    def batch_start(self, state: State, logger: Logger) -> None:
        multiplier = self(state)
        beta1 = None if self.beta1 is None else self.beta1(*self._now(state)[:3])
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if beta1 is not None:
                    group["betas"] = (beta1, group["betas"][1])

    def _now(self, state: State) -> tuple[float, float, float, float]:
        """Return the step that starts now, total, warmup and decay."""
        assert state.max_duration is not None
        batches_per_epoch = None if state.dataloader_len is None else int(state.dataloader_len)
        unit = TimeUnit.BATCH if state.max_duration.unit == TimeUnit.EPOCH else state.max_duration.unit
        lengths = self._lengths(state.max_duration, batches_per_epoch)
        return float(state.timestamp.get(unit).value), *lengths

    def _lengths(self, duration: Time[Any], batches_per_epoch: int | None) -> tuple[float, float, float]:
        """Return total, warmup and decay in the unit of `duration`, in batches if that is epochs."""
        times = [duration, *self.phases.values()]
        if batches_per_epoch is None and any(time.unit == TimeUnit.EPOCH for time in times):
            raise UserError("the loader has no length, so epochs cannot be used: give all times in batches (ba)")
        total = float(duration.value * (batches_per_epoch or 1) if duration.unit == TimeUnit.EPOCH else duration.value)
        factors = {TimeUnit.DURATION: total, TimeUnit.EPOCH: float(batches_per_epoch or 1)}
        lengths = [float(time.value) * factors.get(time.unit, 1.0) for time in self.phases.values()]
        if sum(lengths) > total:
            phases = " and ".join(f"{key} {time.to_timestring()}" for key, time in self.phases.items())
            raise UserError(f"{phases}: longer than the training, trainer.max_duration {duration.to_timestring()}")
        return total, lengths[0], lengths[1] if len(lengths) > 1 else 0.0
