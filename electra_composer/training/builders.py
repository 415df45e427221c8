"""Build optimizer, schedule, callbacks and loggers from the configuration.

All arguments are checked here, before training. Nothing is written or sent until the trainer starts.
"""

from __future__ import annotations

import collections.abc
import inspect
import os
import types
import warnings
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from composer.callbacks import LRMonitor, OptimizerMonitor
from composer.core import Callback
from composer.loggers import LoggerDestination
from composer.utils import MissingConditionalImportError

from electra_composer.config import OptimizerConfig, ScheduleConfig
from electra_composer.errors import UserError, nearest
from electra_composer.ranges import Range, TimeRange, check_range, check_ranges
from electra_composer.training.loggers import MetricsFile, RunConsole
from electra_composer.training.monitors import (
    DataWait,
    RunMemoryMonitor,
    RunRuntimeEstimator,
    RunSystemMetricsMonitor,
    ThroughputMonitor,
)
from electra_composer.training.optim import AdamW, parameter_groups
from electra_composer.training.progress_bar import RunProgressBar
from electra_composer.training.schedules import Schedule
from electra_composer.training.stoppers import RunEarlyStopper, RunThresholdStopper
from electra_composer.training.tensorboard import RunTensorboard
from electra_composer.training.tracking import PACKAGES, RunComet, RunMLflow, RunNeptune, RunWandB

# None of them waits for the device in every batch (docs/configuration.md says when each does).
CALLBACKS: dict[str, type[Callback]] = {
    "data_wait": DataWait,
    "early_stopper": RunEarlyStopper,
    "lr_monitor": LRMonitor,
    "memory_monitor": RunMemoryMonitor,
    "optimizer_monitor": OptimizerMonitor,
    "runtime_estimator": RunRuntimeEstimator,
    "speed_monitor": ThroughputMonitor,
    "system_metrics_monitor": RunSystemMetricsMonitor,
    "threshold_stopper": RunThresholdStopper,
}

NO_LONGER_OFFERED = {
    "callbacks.nan_monitor": "trainer.on_nonfinite does the same without waiting for the device, in every run",
}

LOGGERS: dict[str, type[LoggerDestination]] = {
    "comet": RunComet,
    "console": RunConsole,
    "metrics_file": MetricsFile,
    "mlflow": RunMLflow,
    "neptune": RunNeptune,
    "tensorboard": RunTensorboard,
    "wandb": RunWandB,
}

COUNT = Range(ge=1, le=10**9)

# Ranges of the arguments of callbacks and loggers that are numbers, or times as text, by their names.
ARGUMENTS: dict[str, tuple[Range | TimeRange, ...]] = {
    "batch_log_interval": (COUNT,),
    "flush_interval": (COUNT,),
    "gpu_flops_available": (Range(gt=0, le=1e18),),
    "interval": (TimeRange(units=("ba",)),),
    "log_interval": (TimeRange(), COUNT),
    "min_delta": (Range(ge=0, le=1e9),),
    "patience": (Range(ge=0, le=10**9), TimeRange(units=("ba", "ep"))),
    "skip_batches": (Range(ge=0, le=10**9),),
    "threshold": (Range(ge=-1e9, le=1e9),),
    "window_size": (COUNT,),
}


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> AdamW:
    """Build AdamW over the trainable parameters of `model`, with weight decay and layerwise learning rates.

    Raises:
        UserError: a value out of range, named by its key.
    """
    check_ranges(config, "optimizer.")
    groups = parameter_groups(
        model.named_parameters(), config.weight_decay, config.lr, config.layerwise_decay, config.layerwise_variant
    )
    return AdamW(
        groups,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        bias_correction=config.bias_correction,
    )


def build_scheduler(config: ScheduleConfig, max_duration: str) -> Schedule:
    """Build the learning rate schedule, which is a **callback** of the trainer (see :class:`Schedule`).

    Raises:
        UserError: times that cannot be parsed, compared with `max_duration`, or are longer.
    """
    return Schedule(config.name, config.warmup, max_duration, config.decay)


def build_callbacks(config: dict[str, Any]) -> list[Callback]:
    """Build the callbacks under `callbacks:`, each `name: {argument: value}` or `name: null`.

    Raises:
        UserError: an unknown name or argument (with the nearest valid one), a missing argument, or an invalid value.
    """
    return [_build("callbacks", name, CALLBACKS, arguments, {}) for name, arguments in config.items()]


def build_loggers(
    config: dict[str, Any], run_folder: str, log_interval: str, progress_bar: bool = True
) -> list[LoggerDestination]:
    """Build the loggers under `loggers:`, and the progress bar.

    Args:
        config: each `name: {argument: value}` or `name: null`.
        run_folder: default folder of TensorBoard, Weights & Biases and the metrics file.
        log_interval: default interval of the console, and of the other loggers if it is in batches, else every batch.
        progress_bar: whether to add a progress bar.

    Raises:
        UserError: as in :func:`build_callbacks`; or a package is not installed.
    """
    batches = log_interval if log_interval.endswith("ba") else "1ba"
    defaults: dict[str, dict[str, Any]] = {
        "console": {"log_interval": log_interval},
        "metrics_file": {"path": os.path.join(run_folder, "metrics.jsonl"), "interval": batches},
        "tensorboard": {"log_dir": os.path.join(run_folder, "tensorboard"), "interval": batches},
    }
    loggers = []
    for name, arguments in config.items():
        if name == "wandb":
            arguments = _with_folder(arguments, run_folder)
        if name == "console":
            # Workaround (composer 0.32): Trainer warns of a ConsoleLogger among the loggers that its own console
            # arguments, not used here, are ignored; goes when it warns only if they are given.
            warnings.filterwarnings("ignore", message="Specifying the ConsoleLogger via `loggers`")
        loggers.append(_build("loggers", name, LOGGERS, arguments, defaults.get(name, {})))
    if progress_bar:
        loggers.append(RunProgressBar())
    return loggers


def _with_folder(arguments: Any, run_folder: str) -> Any:
    """Add the run's folder to the arguments of Weights & Biases as the default of `init_kwargs.dir`."""
    if not isinstance(arguments, dict | types.NoneType):
        return arguments  # _build raises the error
    arguments = dict(arguments or {})
    init_kwargs = arguments.get("init_kwargs")
    if isinstance(init_kwargs, dict | types.NoneType):
        arguments["init_kwargs"] = {"dir": run_folder, **(init_kwargs or {})}
    return arguments


def _build(section: str, name: str, table: dict[str, Any], arguments: Any, defaults: dict[str, Any]) -> Any:
    """Create an object of a class in `table`, checking its arguments against the class's signature."""
    key = f"{section}.{name}"
    if key in NO_LONGER_OFFERED:
        raise UserError(f"{key} is no longer offered: {NO_LONGER_OFFERED[key]}; remove it")
    if name not in table:
        raise UserError(f"unknown {key}; {nearest(key, [f'{section}.{valid}' for valid in table])}")
    if not isinstance(arguments, dict | types.NoneType):
        raise UserError(f"{key}: expected its arguments, such as {{name: value}}, or null; found {arguments!r}")
    cls = table[name]
    parameters = {
        parameter: details
        for parameter, details in inspect.signature(cls).parameters.items()
        if details.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    annotations = _annotations(cls)
    for argument, value in (arguments or {}).items():
        full_key = f"{key}.{argument}"
        if argument not in parameters:
            hint = nearest(full_key, [f"{key}.{valid}" for valid in parameters]) if parameters else "it takes none"
            raise UserError(f"unknown argument {full_key}; {hint}")
        if argument in annotations and not _fits(value, annotations[argument]):
            raise UserError(f"{full_key}: {value!r} has the wrong type; expected {parameters[argument].annotation}")
        for allowed in ARGUMENTS.get(argument, ()):
            if value is not None and isinstance(allowed, TimeRange) == isinstance(value, str):
                check_range(full_key, value, allowed)
    arguments = {**defaults, **(arguments or {})}
    required = [p for p, details in parameters.items() if details.default is inspect.Parameter.empty]
    if missing := [parameter for parameter in required if parameter not in arguments]:
        raise UserError(f"{key}: missing {', '.join(f'{key}.{parameter}' for parameter in missing)}")
    try:
        return cls(**arguments)
    except MissingConditionalImportError as error:
        fix = f"pip install 'electra-composer[{name}]'" if name in PACKAGES else f"pip install {error.name or name}"
        raise UserError(f"{key}: a package it needs is not installed; {fix}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error


def _annotations(cls: type) -> dict[str, Any]:
    """Return the resolved annotations of a constructor; none if they use names imported for type checkers only."""
    try:
        return get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:
        return {}


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value from YAML fits an annotation; True if this cannot be decided."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, candidate) for candidate in get_args(annotation))
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (dict, list, collections.abc.Sequence):
        return isinstance(value, origin) and not isinstance(value, str)
    if origin is collections.abc.Callable:
        return False  # YAML has no functions
    return not isinstance(annotation, type) or isinstance(value, annotation)
