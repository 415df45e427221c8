"""The engine calls what Composer's would call, in the same order."""

from __future__ import annotations

from typing import Any

import pytest
from composer import Algorithm, Callback, Event, Trainer
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from tiny_trainer import Tiny, make_trainer

from electra_composer.training.engine import RunEngine
from electra_composer.training.trainer import RunTrainer

Calls = list[tuple[str, str]]


def every_event(base: type, name: str, calls: Calls) -> Any:
    """Return a callback of `base` that implements every event and notes each call."""

    def note(event: Event) -> Any:
        return lambda self, state, logger: calls.append((name, event.value))

    return type(name, (base,), {event.value: note(event) for event in Event})()


class OneMethod(Callback):
    """Implements `run_event` instead of single events."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        self.calls.append(("one method", event.value))


class Silent(Callback):
    """Implements nothing."""


class Halves(Algorithm):
    """Composer's documented form of an algorithm: halves the loss before the backward."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.calls.append(("algorithm", event.value))
        state.loss["total"] = state.loss["total"] / 2  # type: ignore[index]


def run(trainer_class: type[Trainer], with_algorithm: bool, microbatch: int) -> tuple[Calls, dict[str, Any]]:
    calls: Calls = []
    callbacks = [Silent(), every_event(Callback, "first", calls), OneMethod(calls)]
    trainer = make_trainer(
        "7ba",
        callbacks=[*callbacks, every_event(Callback, "last", calls)],
        loggers=[every_event(LoggerDestination, "logger", calls)],
        algorithms=[Halves(calls)] if with_algorithm else [],
        device_train_microbatch_size=microbatch,
        trainer_class=trainer_class,
    )
    trainer.fit()
    trainer.close()
    return calls, {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


@pytest.mark.parametrize("microbatch", [4, 2, 3])
@pytest.mark.parametrize("with_algorithm", [False, True])
def test_calls_and_weights_are_composers(with_algorithm: bool, microbatch: int) -> None:
    """Five batches an epoch, an evaluation every fourth: every event of a run is among them."""
    expected, weights = run(Trainer, with_algorithm, microbatch)
    found, ours = run(RunTrainer, with_algorithm, microbatch)
    assert found == expected
    assert {event for _, event in found} > {"batch_start", "after_backward", "eval_end", "epoch_end", "fit_end"}
    assert all((ours[name] - value).abs().max() < 1e-6 for name, value in weights.items())


def test_callbacks_that_come_later_are_called() -> None:
    calls: Calls = []
    trainer = make_trainer("1ba", trainer_class=RunTrainer)
    assert isinstance(trainer.engine, RunEngine)
    trainer.engine.run_event(Event.BATCH_START)
    trainer.state.callbacks.append(every_event(Callback, "late", calls))
    trainer.engine.run_event(Event.BATCH_START)
    trainer.state.callbacks.pop()
    trainer.engine.run_event(Event.BATCH_START)
    assert calls == [("late", "batch_start")]


def test_a_closed_engine_refuses() -> None:
    trainer = make_trainer("1ba", model=Tiny(), trainer_class=RunTrainer)
    trainer.close()
    with pytest.raises(RuntimeError, match="already closed"):
        trainer.engine.run_event(Event.BATCH_START)
