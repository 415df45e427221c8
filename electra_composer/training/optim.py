"""The AdamW optimizer and its parameter groups.

Sources: google-research/electra `model/optimization.py` (`AdamWeightDecayOptimizer`, `_get_layer_lrs`,
`create_optimizer`); the paper, arXiv 2003.10555, appendix A and B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch.optim.adamw import adamw

from electra_composer.model.flat_parameters import FlatParameters

# Adam divides its moments by 1 - beta**t. From this step count on both factors are exactly 1 in floating point for
# every beta up to 1 - 1e-9, so counting from here is Adam without bias correction.
UNCORRECTED_START = 1e12


class AdamW(torch.optim.AdamW):
    """AdamW, by default without bias correction, as in google-research/electra.

    One step with gradient `g`: `m = β1·m + (1-β1)·g`; `v = β2·v + (1-β2)·g²`;
    `param -= lr · (m / (sqrt(v) + eps) + weight_decay · param)`. With `bias_correction=True` it is
    `torch.optim.AdamW`, which uses `m / (1-β1ᵗ)` and `v / (1-β2ᵗ)` instead of `m` and `v`.

    Runs PyTorch's fused step: one kernel for all parameters of a group, no synchronisation, DTensor parameters too. The
    state per parameter is PyTorch's: `step`, `exp_avg`, `exp_avg_sq`.

    Args:
        params: parameters or groups of them, such as :func:`parameter_groups` returns; fp32 or bf16.
        lr: learning rate; may be changed between steps in `param_groups`.
        betas: decay rates of the two moments.
        eps: added to `sqrt(v)`.
        weight_decay: decoupled weight decay, for groups that set none.
        bias_correction: whether to correct the moments for their initialisation with zero.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.bias_correction = bias_correction
        self.flat: FlatParameters | None = None
        self._moments: list[list[dict[str, torch.Tensor]]] = []  # of each group's buffers
        self._rates: list[torch.Tensor] = []  # of each group, if they are read from the device

    def use_flat(self, flat: FlatParameters) -> None:
        """Update flat buffers, whose views the parameters are, instead of single parameters.

        The state per parameter stays what it is without: its moments become views of flat moments.

        Args:
            flat: with the parameters of the groups.
        """
        self.flat = flat
        start = 0.0 if self.bias_correction else UNCORRECTED_START
        for buffers in flat.buffers:
            moments = []
            for buffer in buffers:
                state = {
                    "step": torch.full((), start, dtype=torch.float32, device=buffer.flat.device),
                    "exp_avg": torch.zeros_like(buffer.flat, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(buffer.flat, requires_grad=False),
                }
                moments.append(state)
                averages, squares = buffer.views(state["exp_avg"]), buffer.views(state["exp_avg_sq"])
                for parameter, average, square in zip(buffer.parameters, averages, squares, strict=True):
                    self.state[parameter] = {"step": state["step"], "exp_avg": average, "exp_avg_sq": square}
            self._moments.append(moments)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set gradients to None, also those of flat buffers."""
        if self.flat is None:
            super().zero_grad(set_to_none)
        else:
            self.flat.zero_grad()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and counts, also saved without flat buffers. Settings such as `lr` stay as configured."""
        configured = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, configured, strict=True):
            group.update(own, params=group["params"])
        if self.flat is None:
            return
        for buffers, moments in zip(self.flat.buffers, self._moments, strict=True):
            for buffer, state in zip(buffers, moments, strict=True):
                averages, squares = buffer.views(state["exp_avg"]), buffer.views(state["exp_avg_sq"])
                for parameter, average, square in zip(buffer.parameters, averages, squares, strict=True):
                    loaded = self.state[parameter]
                    state["step"].copy_(loaded["step"])
                    average.copy_(loaded["exp_avg"])
                    square.copy_(loaded["exp_avg_sq"])
                    self.state[parameter] = {"step": state["step"], "exp_avg": average, "exp_avg_sq": square}

    def keep_learning_rates_on_device(self) -> None:
        """Read the learning rates of flat buffers from the device, where a recorded step finds the current ones.

        They are rounded to fp32 there, on a CPU to fp64. Every step then does so, recorded or not.
        """
        assert self.flat is not None
        device = self.flat.flats[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        self._rates = [torch.zeros((), dtype=dtype, device=device) for _ in self.param_groups]

    def load_learning_rates(self) -> None:
        """Copy the groups' learning rates to the device, if they are kept there. Call before :meth:`step`."""
        for rate, group in zip(self._rates, self.param_groups, strict=False):
            rate.fill_(group["lr"])

    def _step_flat(self) -> None:
        assert self.flat is not None
        scale: dict[str, Any] = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for index, (group, buffers, moments) in enumerate(
            zip(self.param_groups, self.flat.buffers, self._moments, strict=True)
        ):
            updated = [
                (buffer.flat, buffer.flat.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
                for buffer, state in zip(buffers, moments, strict=True)
                if buffer.flat.grad is not None
            ]
            if not updated:
                continue
            flats, gradients, averages, squares, steps = (list(tensors) for tensors in zip(*updated, strict=True))
            adamw(
                *(flats, gradients, averages, squares, [], steps),
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=self._rates[index] if self._rates else group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                **scale,
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, after `closure` (Composer's forward and backward)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.flat is not None:
            self._step_flat()
            return loss
        # Workaround (torch 2.7): AdamW has no switch for bias correction, so the step count starts where the correction
        # is exactly 1; goes when it has one.
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


def leaves(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors with the gradients of an optimizer: its flat buffers, or parameters that have a gradient."""
    if isinstance(optimizer, AdamW) and optimizer.flat is not None:
        return [flat for flat in optimizer.flat.flats if flat.grad is not None]
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter for parameter in parameters if parameter.grad is not None]


def decays(name: str, param: torch.Tensor) -> bool:
    """Return whether weight decay applies: not to biases and not to LayerNorm (google-research/electra)."""
    parts = name.split(".")
    return param.ndim > 1 and parts[-1] != "bias" and not any(part.endswith("norm") for part in parts)


def layer_exponents(names: Iterable[str], variant: Literal["google", "paper"] = "google") -> dict[str, int]:
    """Return the exponent `k` of each parameter's learning rate `lr · dᵏ` with layerwise decay `d`.

    In a stack of `n` layers (`encoder`, `generator` or `discriminator`), heads have depth `n + 2`, layer `i` counted
    from the input `i + 1`, the embeddings and their projection 0. `google`, as in the code: `n + 2 - depth`, so the
    last layer has `d²`. `paper`, as in the text, one factor per layer: the last layer has `d`, and everything below the
    heads one power less than in `google`. Heads have `lr` in both.

    Args:
        names: parameter names, with or without the prefixes of Composer (`model.`), DDP or `torch.compile`.
        variant: `google` or `paper`.

    Returns:
        name → exponent, at least 0.

    Raises:
        ValueError: a name of an unknown module; a new module needs its depth here.
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
    """Return the stack of a parameter, and its layer, `head`, or `embeddings` (everything below the first layer)."""
    parts = name.split(".")
    # Workaround (torch 2.7): torch.compile of a module puts the private name `_orig_mod` into its parameters' names;
    # goes when names stay.
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
        named_parameters: `model.named_parameters()`, which has tied parameters once. Frozen parameters are left out.
        weight_decay: of all parameters except LayerNorm and biases, which get 0.
        lr: learning rate of the heads, and of all parameters without layerwise decay.
        layerwise_decay: factor of the learning rate per layer towards the input, see :func:`layer_exponents`.
        variant: see :func:`layer_exponents`.

    Returns:
        Groups for an optimizer, each with `params`, `lr` and `weight_decay`; highest learning rate first.

    Raises:
        ValueError: layerwise decay, and a parameter of an unknown module.
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
