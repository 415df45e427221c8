"""The optimizer, its parameter groups, and the learning rate over training.

Facts: google-research/electra `model/optimization.py` (its `AdamWeightDecayOptimizer`, `_get_layer_lrs` and
`create_optimizer`); the paper, arXiv 2003.10555, appendix A and B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger

from electra_composer.errors import UserError

# Adam divides its moments by 1 - beta**t. From this count on both factors are exactly 1 in floating point for every
# beta up to 1 - 1e-9: counting from here is Adam without bias correction.
UNCORRECTED_START = 1e12


class AdamW(torch.optim.AdamW):
    """AdamW, by default without bias correction, as google-research/electra trains.

    One step with gradient `g`: `m = β1·m + (1-β1)·g`; `v = β2·v + (1-β2)·g²`;
    `param -= lr · (m / (sqrt(v) + eps) + weight_decay · param)`. With `bias_correction=True` it is
    `torch.optim.AdamW`: `m / (1-β1ᵗ)` and `v / (1-β2ᵗ)` stand in the place of `m` and `v`.

    PyTorch's own fused step does the work (one kernel for all parameters of a group, no synchronisation, DTensor
    parameters too). Without bias correction its step count starts at :data:`UNCORRECTED_START`, where the correction
    is exactly one. State per parameter, as PyTorch's: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        params: parameters or groups of them, such as :func:`parameter_groups` gives; fp32 or bf16.
        lr: learning rate; may be changed between steps in `param_groups`.
        betas: decay rates of the two moments.
        eps: added to `sqrt(v)`.
        weight_decay: decoupled weight decay, for groups that name none.
        bias_correction: whether the moments are corrected for their start at zero.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.bias_correction = bias_correction

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient, after `closure` (Composer's forward and backward)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.bias_correction:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None and not self.state[param]:
                        self.state[param] = {
                            "step": torch.full((), UNCORRECTED_START, dtype=torch.float32, device=param.device),
                            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
                        }
        super().step()
        return loss


def decays(name: str, param: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter: not to biases and not to LayerNorm (google-research/electra)."""
    parts = name.split(".")
    return param.ndim > 1 and parts[-1] != "bias" and not any(part.endswith("norm") for part in parts)


def layer_exponents(names: Iterable[str], variant: Literal["google", "paper"] = "google") -> dict[str, int]:
    """The power of the layerwise decay with which each parameter's learning rate is multiplied.

    A stack of `n` layers (`encoder`, `generator` or `discriminator`), counted from the input: heads have depth `n + 2`,
    layer `i` has `i + 1`, the embeddings and their projection 0. `google`, what the code does: `n + 2 - depth`, so the
    last layer is at `d²`. `paper`, what the text says, one factor per layer: the last layer is at `d`, and all below
    the heads has one power less than in `google`; heads are at `lr` in both.

    Args:
        names: parameter names, with or without what Composer (`model.`), DDP or `torch.compile` put before them.
        variant: `google` or `paper`.

    Returns:
        name → exponent, at least 0.

    Raises:
        ValueError: a name that is part of no known module; a new module needs its place here.
    """
    places = {name: _place(name) for name in names}
    stack_sizes: dict[str, int] = {}
    for stack, layer in places.values():
        if isinstance(layer, int):
            stack_sizes[stack] = max(stack_sizes.get(stack, 0), layer + 1)
    deepest = max(stack_sizes.values(), default=0)
    exponents = {}
    for name, (stack, layer) in places.items():
        if layer == "head":
            exponents[name] = 0
            continue
        depth = layer + 1 if isinstance(layer, int) else 0
        exponents[name] = stack_sizes.get(stack, deepest) + 2 - depth - (variant == "paper")
    return exponents


def _place(name: str) -> tuple[str, int | Literal["head", "embeddings"]]:
    """Stack and layer of a parameter, or `head`, or `embeddings` for all that lies below the first layer."""
    parts = name.split(".")
    for stack in ("encoder", "generator", "discriminator"):
        if layer := re.search(rf"(?:^|\.){stack}\.(?:_orig_mod\.)?layers\.(\d+)\.", name):
            return stack, int(layer[1])
        if stack in parts and "project" in parts:
            return stack, "embeddings"
    if "embeddings" in parts:
        return "", "embeddings"
    if "generator_embeddings" in parts:
        return "generator", "embeddings"
    if {"head", "mlm_head", "rtd_head"} & set(parts):
        return "", "head"
    raise ValueError(f"parameter {name} has no place in layerwise decay: expected embeddings, a layer or a head")


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    weight_decay: float,
    lr: float,
    layerwise_decay: float | None = None,
    variant: Literal["google", "paper"] = "google",
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and learning rate.

    Args:
        named_parameters: `model.named_parameters()`: tied parameters once. Frozen ones are left out.
        weight_decay: for all but LayerNorm and biases, which get 0.
        lr: learning rate of the heads, and of everything where there is no layerwise decay.
        layerwise_decay: factor of the learning rate per layer downwards, see :func:`layer_exponents`.
        variant: see :func:`layer_exponents`.

    Returns:
        Groups for an optimizer, each with `params`, `lr` and `weight_decay`; highest learning rate first.

    Raises:
        ValueError: layerwise decay with a parameter whose place is unknown.
    """
    parameters = {name: param for name, param in named_parameters if param.requires_grad}
    exponents = dict.fromkeys(parameters, 0)
    if layerwise_decay is not None:
        exponents = layer_exponents(parameters, variant)
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, param in parameters.items():
        groups.setdefault((exponents[name], not decays(name, param)), []).append(param)
    return [
        {
            "params": params,
            "lr": lr * (layerwise_decay or 1.0) ** exponent,
            "weight_decay": 0.0 if undecayed else weight_decay,
        }
        for (exponent, undecayed), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def electra(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Linear decay over all steps times `min(1, step / warmup)`: both at once, from step 0 (google-research/electra).

    Like the other schedules: `step` is 0 for the first update and `total - 1` for the last; `warmup` and `decay` are
    lengths in the same unit; the result is the multiple of the learning rate.
    """
    return max(0.0, 1 - step / total) * (min(1.0, step / warmup) if warmup else 1.0)


def linear(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Linear from 0 to 1 over `warmup`, then linear to 0 over the rest (transformers, Composer)."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / (total - warmup)) if total > warmup else 1.0


def one_cycle(step: float, total: float, warmup: float, decay: float = 0.0) -> float:
    """Cosine from 1/25 up to 1 at the last step of `warmup`, cosine down to 1/250000 at the last step of training.

    The defaults of `torch.optim.lr_scheduler.OneCycleLR` (`div_factor` 25, `final_div_factor` 1e4), which count the
    phases from their last steps.
    """
    peak, last = max(warmup - 1, 0.0), total - 1
    if step < peak:
        return _cosine(1 / 25, 1.0, step / peak)
    return _cosine(1.0, 1 / 25e4, min(1.0, (step - peak) / (last - peak)) if last > peak else 0.0)


def constant(step: float, total: float, warmup: float, decay: float) -> float:
    """Linear from 0 to 1 over `warmup`, flat, and linear to 0 over the last `decay` steps."""
    down = (total - step) / decay if decay else 1.0
    return max(0.0, min(1.0, step / warmup if warmup else 1.0, down))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Callable[[float, float, float, float], float]] = {
    "electra": electra,
    "linear": linear,
    "one_cycle": one_cycle,
    "constant": constant,
}


class Schedule(Callback):
    """Sets the learning rate of every batch; give it to the trainer among the **callbacks**, not as a scheduler.

    Composer steps its schedulers before it advances its clock: batches 0 and 1 both get the rate of step 0, and every
    later batch that of the batch before. So the rate is set here, at the start of each batch, from the clock as it
    then stands. It depends on nothing but the clock, so it holds over resuming, a changed duration included. Called
    with a state it answers the multiplier, as a `ComposerScheduler` does.

    Args:
        name: a key of :data:`SCHEDULES`.
        warmup: a Composer time: `10000ba`, `0.1dur`, `1ep`; `0ba` for none.
        max_duration: a Composer time.
        decay: a Composer time, of `constant` only.

    Raises:
        UserError: not a time, a unit that does not fit `max_duration`'s, or phases longer than the training. What
            depends on the length of an epoch is checked when training starts.
    """

    def __init__(self, name: str, warmup: str, max_duration: str, decay: str = "0.1dur"):
        self.function = SCHEDULES[name]
        self.phases = {"schedule.warmup": parse_time(warmup, "schedule.warmup")}
        if name == "constant":
            self.phases["schedule.decay"] = parse_time(decay, "schedule.decay")
        duration = parse_time(max_duration, "trainer.max_duration")
        if duration.unit == TimeUnit.DURATION:
            raise UserError(f"trainer.max_duration: {max_duration!r} is a share of itself; expected such as 1000ba")
        for key, time in self.phases.items():
            units = {time.unit, duration.unit}
            if TimeUnit.DURATION not in units and len(units) > 1 and units != {TimeUnit.EPOCH, TimeUnit.BATCH}:
                raise UserError(
                    f"{key}: {time.to_timestring()} cannot be compared with trainer.max_duration {max_duration}; "
                    f"give it in {duration.unit.value}, or as a share of training such as 0.1dur"
                )
        if {time.unit for time in self.phases.values()} <= {duration.unit, TimeUnit.DURATION}:
            self._lengths(duration, batches_per_epoch=1)  # units cancel: what is too long can be told already

    def __call__(self, state: State) -> float:
        """The multiple of the learning rate for the batch that starts now."""
        assert state.max_duration is not None
        batches_per_epoch = None if state.dataloader_len is None else int(state.dataloader_len)
        total, warmup, decay = self._lengths(state.max_duration, batches_per_epoch)
        unit = TimeUnit.BATCH if state.max_duration.unit == TimeUnit.EPOCH else state.max_duration.unit
        return self.function(float(state.timestamp.get(unit).value), total, warmup, decay)

    def init(self, state: State, logger: Logger) -> None:
        """Remember each group's full rate where PyTorch's schedulers do, so that it is part of the checkpoints."""
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def fit_start(self, state: State, logger: Logger) -> None:
        self(state)  # the epoch's length is known now: what is wrong with it shows before the first batch

    def batch_start(self, state: State, logger: Logger) -> None:
        multiplier = self(state)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier

    def _lengths(self, duration: Time[Any], batches_per_epoch: int | None) -> tuple[float, float, float]:
        """Total, warmup and decay: in batches where training is counted in epochs, else in its own unit."""
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


def parse_time(text: str, key: str) -> Time[Any]:
    """A Composer time string counted in batches, epochs, samples, tokens or shares of training.

    Raises:
        UserError: naming `key`, if it is something else.
    """
    try:
        time = Time.from_timestring(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {text!r} is not a time; expected such as 10000ba, 1ep, 5e9tok or 0.1dur") from error
    if time.unit in (TimeUnit.SECOND, TimeUnit.ITERATION) or time.value < 0:
        raise UserError(f"{key}: {text!r}: expected a count of ba, ep, sp or tok, or a share of training (dur)")
    return time
