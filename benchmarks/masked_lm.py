"""The masked-LM head: our loss, gradients and sample against plain PyTorch's, in turns; prints one JSON line.

    python benchmarks/masked_lm.py --device cuda --precision bf16

`ours` is what `objective.masked_lm: auto` picks for the device. `plain` makes all logits at once, as the paper's code
does: `F.cross_entropy`, autograd, and a sample by noise over the whole vocabulary. Liger's and Apple's fused linear
cross entropies are measured where they are installed: loss and gradients only, for they draw no sample. Fails if losses
or gradients of `ours` and `plain` differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import PeakMemory, describe, interleave, median_ms
from torch import Tensor

from electra_composer.errors import report_user_errors
from electra_composer.model.kernels.masked_lm import masked_lm, resolve_implementation
from electra_composer.model.kernels.sampling import SAMPLING_BLOCK

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative; TF32, where it is on, is within those of bf16."""

Loss = Callable[[], Tensor]


class Problem:
    """Inputs at the scale of a fresh model's, the same for all that are measured.

    Args:
        rows: masked positions of a batch.
        vocab_size: tokens; the table has padding rows beyond.
        hidden: embedding size.
        precision: `fp32`, or `bf16` by autocast over fp32 parameters.
        device: `cpu` or `cuda`.
    """

    def __init__(self, rows: int, vocab_size: int, hidden: int, precision: str, device: str):
        torch.manual_seed(0)
        self.vocab_size, self.precision, self.device = vocab_size, precision, device
        padded = -(-vocab_size // SAMPLING_BLOCK) * SAMPLING_BLOCK
        self.features = torch.randn(rows, hidden, device=device).requires_grad_()
        self.weight = (torch.randn(padded, hidden, device=device) * 0.1).requires_grad_()
        self.bias = torch.zeros(padded, device=device).requires_grad_()
        self.targets = torch.randint(vocab_size, (rows,), device=device)
        self.row_weights, self.noise = torch.ones(rows, device=device), torch.rand(rows, device=device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def ours(self) -> Tensor:
        """Loss and sample of `masked_lm`."""
        with self._autocast():
            return masked_lm(
                self.features, self.weight, self.bias, self.targets, self.row_weights, self.noise, self.vocab_size
            ).loss

    def plain(self) -> Tensor:
        """Loss and sample with all logits at once."""
        with self._autocast():
            logits = F.linear(self.features, self.weight[: self.vocab_size], self.bias[: self.vocab_size]).float()
        loss = F.cross_entropy(logits, self.targets, reduction="sum")
        with torch.no_grad():
            probabilities = logits.softmax(-1)
            (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
        return loss

    def liger(self) -> Loss:
        """Liger-Kernel's fused linear cross entropy.

        Raises:
            ImportError: it is not installed.
        """
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: loss(*self._low_precision(), bias=self._cast(self.bias[: self.vocab_size]))

    def _low_precision(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._cast(self.weight[: self.vocab_size]), self._cast(self.features), self.targets

    def cut_cross_entropy(self) -> Loss:
        """Apple's cut cross entropy.

        Raises:
            ImportError: it is not installed.
        """
        from cut_cross_entropy import linear_cross_entropy

        def loss() -> Tensor:
            weight, features, targets = self._low_precision()
            bias = self._cast(self.bias[: self.vocab_size])
            return linear_cross_entropy(features, weight, targets, bias=bias, reduction="sum")

        return loss

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if self.precision == "bf16" else tensor

    def step(self, loss: Loss) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients of features, embeddings and bias."""
        value = loss()
        return value.detach(), torch.autograd.grad(value, (self.features, self.weight, self.bias))


def _others(problem: Problem) -> tuple[dict[str, Loss], dict[str, str]]:
    """Fused cross entropies that can be measured here, and why the rest cannot."""
    available: dict[str, Loss] = {}
    reasons: dict[str, str] = {}
    for name in ("liger", "cut_cross_entropy"):
        if problem.device != "cuda":
            reasons[name] = "needs CUDA"
            continue
        try:
            candidate = getattr(problem, name)()
            problem.step(candidate)
            available[name] = candidate
        except ImportError:
            reasons[name] = "not installed"
        except Exception as error:  # another project's kernel: its failure is a result, not the end of the run
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return available, reasons


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _agreement(problem: Problem) -> dict[str, float]:
    """Relative differences of ours from plain PyTorch's."""
    loss, gradients = problem.step(problem.ours)
    expected, expected_gradients = problem.step(problem.plain)
    names = ("features", "weight", "bias")
    return {
        "loss": _relative(loss, expected),
        **{
            f"gradient_{name}": _relative(ours, theirs)
            for name, ours, theirs in zip(names, gradients, expected_gradients, strict=True)
        },
    }


def _disagreements(agreement: dict[str, float], precision: str) -> list[str]:
    # Written so that NaN disagrees.
    limits = {name: (LOSS_TOLERANCE if name == "loss" else GRADIENT_TOLERANCE)[precision] for name in agreement}
    return [
        f"{name} {value:.1e} > {limits[name]:.0e}" for name, value in agreement.items() if not value <= limits[name]
    ]


def measure(problem: Problem, repeats: int, warmup: int) -> dict[str, object]:
    """Times, memory, agreement; see `main` for what is added."""
    others, reasons = _others(problem)
    losses: dict[str, Loss] = {"ours": problem.ours, "plain": problem.plain, **others}
    steps = {name: (lambda loss=loss: problem.step(loss)) for name, loss in losses.items()}
    agreement = _agreement(problem)
    seconds = interleave(steps, repeats, warmup, problem.device)
    peaks: dict[str, int | None] = {}
    for name, step in steps.items():
        with PeakMemory(problem.device) as peak:
            step()
        peaks[name] = peak.bytes
    rows, ours = len(problem.targets), peaks["ours"]
    # A step that holds all logits needs at least one tensor of them, in the precision of the products; gradients are
    # in the peak too, so that being below is proof, and being above is not at small sizes.
    logits_bytes = rows * problem.vocab_size * (2 if problem.precision == "bf16" else 4)
    results: dict[str, object] = {
        name: {"median_ms": median_ms(taken), "min_ms": median_ms([min(taken)]), "peak_bytes": peaks[name]}
        for name, taken in seconds.items()
    }
    return {
        **results,
        **dict.fromkeys(reasons),
        "absent": reasons,
        "plain_over_ours": round(median_ms(seconds["plain"]) / median_ms(seconds["ours"]), 2),
        "all_logits_bytes": logits_bytes,
        "ours_peak_below_all_logits": None if ours is None else ours < logits_bytes,
        "relative_difference": agreement,
    }


@report_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Measure and print one JSON line; 1 where ours and plain PyTorch differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2432, help="masked positions; 128 rows × 19 for ELECTRA-Small")
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--hidden", type=int, default=128, help="embedding size")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_args(arguments)
    for name in ("rows", "vocab", "hidden", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda and there is none here; use --device cpu")
    problem = Problem(options.rows, options.vocab, options.hidden, options.precision, options.device)
    implementation = resolve_implementation("auto", options.device, *problem.weight.shape)
    results = measure(problem, options.repeats, options.warmup)
    print(
        json.dumps(
            {
                "benchmark": "masked_lm",
                **vars(options),
                "implementation": implementation,
                "what": "forward and backward; ours and plain also draw a sample",
                **results,
                "machine": describe(),
            }
        ),
        flush=True,
    )
    wrong = _disagreements(results["relative_difference"], options.precision)  # type: ignore[arg-type]
    if wrong:
        print(f"ours and plain PyTorch differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
