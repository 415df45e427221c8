"""Composer time strings such as `10ba`: parsing, and what happens at intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from electra_composer.ranges import TimeRange, check_range

INTERVAL = TimeRange()


def parse_time(text: str, key: str, allowed: TimeRange = INTERVAL) -> Time[Any]:
    """Parse a Composer time string in batches, epochs, samples, tokens or a fraction of training.

    Args:
        text: `10000ba`, `1ep`, `5e9tok`, `0.1dur`.
        key: the configuration key, for error messages.
        allowed: by default any time above 0.

    Raises:
        UserError: not a time string, another unit, or out of range.
    """
    check_range(key, text, allowed)
    return Time.from_timestring(text)


def interval_scheduler(text: str, key: str) -> Callable[[State, Event], bool]:
    """Create a function `(state, event) → bool` that tells, at the end of a batch or epoch, whether an interval ends.

    Args:
        text: a Composer time such as `10ba`.
        key: the configuration key, for error messages.

    Raises:
        UserError: not a positive Composer time.
    """
    interval = parse_time(text, key)
    if interval.unit == TimeUnit.BATCH:
        # One modulo per batch and callback. Composer's scheduler takes 30 µs for arithmetic on `Time` objects.
        return lambda state, event: event == Event.BATCH_END and state.timestamp.batch.value % interval.value == 0
    return create_interval_scheduler(
        text, checkpoint_events=False, final_events={Event.BATCH_END}, include_end_of_training=True
    )


class IntervalCallback(Callback):
    """Base class of callbacks that log at an interval and at the end of training.

    Args:
        log_interval: a Composer time such as `10ba`.

    Raises:
        UserError: not a positive Composer time.
    """

    def __init__(self, log_interval: str = "10ba") -> None:
        self.is_due = interval_scheduler(log_interval, "log_interval")

    def log(self, state: State, logger: Logger) -> None:
        raise NotImplementedError

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END):
            self.log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self.log(state, logger)
