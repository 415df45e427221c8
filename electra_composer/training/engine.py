"""Composer's `Engine` with a table of the callbacks that implement each event.

A step of a small model takes milliseconds, and a training batch fires 13 events. Composer 0.32 calls every callback at
each of them, most of which do nothing, after it formats a message for a log that nobody reads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from composer.core import Callback, Engine, Event, State
from composer.core.engine import Traces
from composer.loggers import Logger, LoggerDestination

EVENTS_OF_A_STEP = frozenset(
    {
        *(Event.BEFORE_DATALOADER, Event.AFTER_DATALOADER, Event.BATCH_START, Event.BEFORE_TRAIN_BATCH),
        *(Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS),
        *(Event.BEFORE_BACKWARD, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH),
        *(Event.BATCH_END, Event.BATCH_CHECKPOINT),
    }
)

Hook = Callable[[State, Logger], Any]


class RunEngine(Engine):
    """Engine that calls at each event only the callbacks that implement it.

    A callback implements an event if its class or the object itself overrides the method of that name or `run_event`.
    This concerns the events of a training step. At all others, with an algorithm, with a profiler and with the
    environment variable `ENGINE_DEBUG`, Composer's own method runs. The order is Composer's.
    """

    # Workaround (composer 0.32): Engine has no table of events; goes when `run_event` calls only what is implemented.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._debugs = bool(os.environ.get("ENGINE_DEBUG"))
        self._hooks: dict[Event, list[Hook]] = {}
        self._hooks_of: list[Callback] = []  # the callbacks of which `_hooks` is the table

    def run_event(self, event: Event | str) -> Traces:
        """Run an event, see the class.

        Returns:
            Composer's traces of the algorithms that ran; empty if there is none.
        """
        state = self.state
        if (
            event not in EVENTS_OF_A_STEP
            or self._is_closed
            or self._debugs
            or state.profiler is not None
            or state.algorithms
        ):
            return super().run_event(event)
        for hook in self._hooks_at(event):
            hook(state, self.logger)
        return Traces()

    def forget_hooks(self) -> None:
        """Forget what each callback implements, after a method of one was replaced."""
        self._hooks_of = []

    def _hooks_at(self, event: Event) -> list[Hook]:
        """Return the methods to call at an event: of callbacks first, then of loggers, as Composer orders them."""
        callbacks = self.state.callbacks
        if callbacks != self._hooks_of:
            self._hooks, self._hooks_of = {}, list(callbacks)
        hooks = self._hooks.get(event)
        if hooks is None:
            ordered = sorted(callbacks, key=lambda callback: isinstance(callback, LoggerDestination))
            hooks = self._hooks[event] = [hook for callback in ordered if (hook := hook_of(callback, event))]
        return hooks


def hook_of(callback: Callback, event: Event) -> Hook | None:
    """Return what a callback does at an event, None if nothing."""
    if _is_overridden(callback, "run_event", Callback.run_event):
        return functools.partial(callback.run_event, event)
    if _is_overridden(callback, event.value, getattr(Callback, event.value)):
        hook: Hook = getattr(callback, event.value)
        return hook
    return None


def _is_overridden(callback: Callback, name: str, default: object) -> bool:
    return getattr(getattr(callback, name), "__func__", None) is not default
