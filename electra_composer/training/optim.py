"""The AdamW optimizer and its parameter groups.

Sources: google-research/electra `model/optimization.py` (`AdamWeightDecayOptimizer`, `_get_layer_lrs`,
`create_optimizer`); the paper, arXiv 2003.10555, appendix A and B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch

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

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, after `closure` (Composer's forward and backward)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
