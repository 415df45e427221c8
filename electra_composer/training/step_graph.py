"""Training steps as CUDA graphs: recorded once, then launched as a whole.

The kernels of a step of a small model take less time than Python needs to launch them one by one. A recorded step is
launched by one call: forward, loss, backward, gradient norm, clipping, the check for non-finite values and AdamW, with
all microbatches. Its inputs are tensors with fixed addresses: the batch, the learning rates and the random state, which
the host writes before each launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from composer.core import Event
from composer.utils import dist
from torch import Tensor

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.training.compilation import MODES_WITH_CUDA_GRAPHS
from electra_composer.training.device_graph import GRAPHS, DeviceGraph
from electra_composer.training.devices import whole_tensors
from electra_composer.training.engine import hook_of
from electra_composer.training.optim import AdamW
from electra_composer.training.schedules import Schedule
from electra_composer.training.step import TrainStep

log = logging.getLogger(__name__)

WARM_UP = 3
"""Ordinary steps before a step is recorded: they compile, choose kernels and allocate what stays allocated."""

RECORDED_EVENTS = (
    *(Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS),
    *(Event.BEFORE_BACKWARD, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH),
)
"""Events whose callbacks are called when the step is recorded, and not when it is launched again."""

T = TypeVar("T")


@runtime_checkable
class RecordedCallback(Protocol):
    """A callback that can be part of a recorded step.

    At :data:`RECORDED_EVENTS` it may only launch work on the device and keep the resulting tensors.
    """

    def after_recording(self) -> Callable[[], None]:
        """Return a function that is called after each launch, in place of the methods for these events."""


class StaticBatch:
    """Tensors on a device that hold one batch after the other.

    Args:
        batch: on the host. Its tensors are not copied yet; its other values, such as the number of tokens, are left
            out, since a recording would keep those of the first batch.
        device: of the copies.

    Attributes:
        tensors: the copies.
    """

    def __init__(self, batch: dict[str, Any], device: torch.device):
        copies: dict[str, Tensor] = {}
        self._wholes: dict[tuple[str, ...], Tensor] = {}
        for names, whole in whole_tensors(_tensors(batch)).items():
            self._wholes[names] = torch.empty(whole.shape, dtype=whole.dtype, device=device)
            parts = self._wholes[names].unbind() if len(names) > 1 else [self._wholes[names]]
            copies |= dict(zip(names, parts, strict=True))
        self.tensors = {name: copies[name] for name in _tensors(batch)}

    def fill(self, batch: dict[str, Any]) -> None:
        """Copy a batch of the same :func:`signature`, without waiting where it is in pinned memory."""
        for names, whole in whole_tensors(_tensors(batch)).items():
            self._wholes[names].copy_(whole, non_blocking=True)


def _tensors(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def signature(batch: Any, weights: list[float]) -> Any:
    """Return what must be equal for two batches to be handled by one recording; None: it cannot be recorded."""
    if not isinstance(batch, dict):
        return None
    layout = tuple((names, whole.shape, whole.dtype) for names, whole in whole_tensors(_tensors(batch)).items())
    return layout, tuple(weights)


class StepGraph:
    """Runs training steps: the first ones as usual, then one that is recorded, and from there on the recording.

    Batches of another shape than the recorded one are trained on as usual; with enough of them in a row, the step is
    recorded for that shape. On several ranks there are two
    recordings, with the averaging of gradients between them, which is not recorded.

    Args:
        step: what to run.
        make: creates a graph.
        required: whether a step that cannot be recorded is an error; otherwise a warning.
    """

    def __init__(self, step: TrainStep, make: Callable[[], DeviceGraph], required: bool = False):
        self.step, self.make, self.required = step, make, required
        self.recording: Recording | None = None
        self.failed = False
        self._unrecorded = make()
        self._last: Any = None
        self._in_a_row = 0

    def run(self, batch: Any, weights: list[float]) -> dict[str, Tensor]:
        """Train on a batch.

        Args:
            batch: on the host.
            weights: factor of the loss of each microbatch.

        Returns:
            Losses of this rank, on the device; valid until the next call.
        """
        found = signature(batch, weights)
        if self.recording is None or found != self.recording.signature:
            self._in_a_row = self._in_a_row + 1 if found == self._last else 1
            if self._in_a_row > WARM_UP and found is not None and not self.failed:
                self._record(batch, weights)
        self._last = found
        if self.recording is not None and found == self.recording.signature:
            return self.recording.launch(batch)
        return self._unrecorded.run(lambda: self.step.run_kernels(batch, weights))

    def _record(self, batch: dict[str, Tensor], weights: list[float]) -> None:
        self.recording = None  # its memory is free for another one
        try:
            self.recording = Recording(self.step, self.make, batch, weights)
        except (RuntimeError, KeyError) as error:  # of CUDA and PyTorch; a value of the batch that is no tensor
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if self.required:
                raise UserError(
                    f"trainer.cuda_graph is true, and the step cannot be recorded: {reason}; "
                    "set trainer.cuda_graph=auto"
                ) from error
            log.warning("CUDA graph: not used, because the step cannot be recorded: %s", reason)
            self.failed = True


class Recording:
    """The recorded step for batches of one shape.

    Args:
        step: what to record. It has run before in :meth:`DeviceGraph.run`.
        make: creates a graph.
        batch: on the host; not trained on yet.
        weights: factor of the loss of each microbatch.

    Raises:
        RuntimeError: an operation that cannot be recorded, such as one that waits for the device.
        KeyError: the step reads a value of the batch that is not a tensor.
    """

    def __init__(
        self, step: TrainStep, make: Callable[[], DeviceGraph], batch: dict[str, Tensor], weights: list[float]
    ):
        self.step = step
        self.signature = signature(batch, weights)
        self.batch = StaticBatch(batch, step.device)
        self.batch.fill(batch)
        state = step.trainer.state
        # They hold the autograd graph of the last step, and with it nodes that belong to another stream.
        state.loss, state.outputs = torch.zeros(()), None
        self.graphs = [make()]
        if dist.get_world_size() == 1:
            self.losses = self.graphs[0].record(lambda: self._compute_and_update(weights))
        else:
            self.losses = self.graphs[0].record(lambda: step.compute(self.batch.tensors, weights))
            self.graphs.append(make())
            self.graphs[1].record(step.update)
        self.gradients = [flat.grad for flat in step.flats]
        recorded = [callback for callback in state.callbacks if isinstance(callback, RecordedCallback)]
        self.after = [callback.after_recording() for callback in recorded]

    def _compute_and_update(self, weights: list[float]) -> dict[str, Tensor]:
        losses = self.step.compute(self.batch.tensors, weights)
        self.step.update()
        return losses

    def launch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Train on a batch; return its losses, which the next launch overwrites."""
        self.batch.fill(batch)
        self.step.load_learning_rates()
        self.step.show_gradients(self.gradients)
        self.graphs[0].launch()
        if len(self.graphs) > 1:
            self.step.average_gradients()
            self.graphs[1].launch()
        for function in self.after:
            function()
        return self.losses


def use_graph(step: TrainStep, setting: bool | str, obstacle: str | None) -> str | None:
    """Let a trainer's step be recorded, if that is possible. Call before training, when all callbacks are known.

    Args:
        step: of the trainer; its `run` is replaced.
        setting: `trainer.cuda_graph`.
        obstacle: a reason against it in the configuration, see :func:`obstacle_in_config`.

    Returns:
        One line for the log; None: there is nothing to say.

    Raises:
        UserError: it is not possible, and `setting` is true.
    """
    if setting is False:
        return None
    reason = obstacle or obstacle_to_recording(step)
    if reason is not None:
        if setting is True:
            raise UserError(f"trainer.cuda_graph is true, and {reason}; set trainer.cuda_graph=auto or false")
        step.run = step.run_kernels
        has_graphs = step.trainer.state.device.name in GRAPHS
        return f"CUDA graph: not used, because {reason}" if has_graphs else None
    if step.run == step.run_kernels:
        for optimizer in step.trainer.state.optimizers:
            assert isinstance(optimizer, AdamW)
            optimizer.keep_learning_rates_on_device()
        step.run = StepGraph(step, GRAPHS[step.trainer.state.device.name], required=setting is True).run
    return "CUDA graph: each training step is one launch, after the first few"


def obstacle_to_recording(step: TrainStep) -> str | None:
    """Return why the steps of a trainer cannot be recorded, in a few words; None: they can."""
    state = step.trainer.state
    if state.device.name not in GRAPHS:
        return f"there are no such graphs on a {state.device.name}"
    if step.unserved is not None:
        return step.unserved
    if not step.flats:
        return "the parameters are not in flat buffers"
    if state.algorithms:
        return f"the algorithm {type(state.algorithms[0]).__name__} may change any part of a step"
    for callback in state.callbacks:
        if isinstance(callback, Schedule) and callback.beta1 is not None:
            # Fused AdamW takes beta1 as a number of the host, and a recording keeps that of its step.
            return f"schedule.name={callback.name} changes beta1 in every step"
        for event in RECORDED_EVENTS:
            if not isinstance(callback, RecordedCallback) and hook_of(callback, event) is not None:
                return f"the callback {type(callback).__name__} is called at {event.value}"
    return None


def check_cuda_graph(trainer: TrainerConfig) -> None:
    """Raise a UserError if `trainer.cuda_graph` is none of its values."""
    if trainer.cuda_graph not in (True, False, "auto"):
        raise UserError(f"trainer.cuda_graph is {trainer.cuda_graph!r}; expected true, false or auto")


def obstacle_in_config(trainer: TrainerConfig, static_shapes: bool) -> str | None:
    """Return which setting does not allow to record steps, in a few words; None: all do.

    Args:
        static_shapes: whether all batches of a loader have one length.
    """
    if not static_shapes:
        return "batches differ in length"
    if trainer.compile in MODES_WITH_CUDA_GRAPHS:
        return f"trainer.compile={trainer.compile} records graphs of its own"
    if trainer.activation_checkpointing:
        # It reads the state of the random generator, which is not possible during a recording.
        return "trainer.activation_checkpointing is true"
    return None
