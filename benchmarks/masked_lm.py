"""Masked-LM head: loss, gradients and sample of our kernel compared with plain PyTorch; prints one JSON line.

    python benchmarks/masked_lm.py --device cuda --precision bf16

`ours` is the implementation that `objective.masked_lm: auto` selects for the device. `plain` computes all logits at
once, as the paper's code does: `F.cross_entropy`, autograd, and a sample by noise over the whole vocabulary. The fused
linear cross entropies of Liger and Apple are measured if installed: loss and gradients only, since they draw no sample.
With `--copy` the loss is that of all-tokens MLM, with a copy mechanism; `ours_without_copy` then shows what it costs.
The variants run in alternation. The exit status is 1 if losses or gradients of `ours` and `plain` differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from machine import PeakMemory, interleave, median_ms, print_result, require_positive
from torch import Tensor

from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.kernels.masked_lm import masked_lm, resolve_implementation
from electra_composer.model.kernels.sampling import SAMPLING_BLOCK

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative tolerances; TF32, where it is enabled, is within those of bf16."""

INPUTS = ("features", "weight", "bias", "copy_logits")
"""What a loss is differentiated for; the last with a copy mechanism."""

Loss = Callable[[], Tensor]


class Problem:
    """Inputs at the scale of a newly initialized model, shared by all implementations.

    Args:
        rows: masked positions of a batch.
        vocab_size: number of tokens; the embedding table has padding rows beyond.
        hidden: embedding size.
        precision: `fp32`, or `bf16` by autocast over fp32 parameters.
        device: `cpu` or `cuda`.
        copy: add a copy mechanism, with 85% of the input tokens right.
    """

    def __init__(self, rows: int, vocab_size: int, hidden: int, precision: str, device: str, copy: bool = False):
        torch.manual_seed(0)
        self.vocab_size, self.precision, self.device = vocab_size, precision, device
        padded = -(-vocab_size // SAMPLING_BLOCK) * SAMPLING_BLOCK
        self.features = torch.randn(rows, hidden, device=device).requires_grad_()
        self.weight = (torch.randn(padded, hidden, device=device) * 0.1).requires_grad_()
        self.bias = torch.zeros(padded, device=device).requires_grad_()
        self.targets = torch.randint(vocab_size, (rows,), device=device)
        self.row_weights, self.noise = torch.ones(rows, device=device), torch.rand(rows, device=device)
        self.copies: dict[str, Tensor] = {}
        if copy:
            copy_logits = torch.randn(rows, device=device).requires_grad_()
            self.copies = {"copy_logits": copy_logits, "copied": torch.rand(rows, device=device) < 0.85}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def _masked_lm(self, **copies: Tensor) -> Tensor:
        tensors = (self.features, self.weight, self.bias, self.targets, self.row_weights, self.noise)
        with self._autocast():
            return masked_lm(*tensors, self.vocab_size, **copies).loss

    def ours(self) -> Tensor:
        """Compute loss and sample with `masked_lm`."""
        return self._masked_lm(**self.copies)

    def ours_without_copy(self) -> Tensor:
        """Compute the plain loss, and the sample, where :meth:`ours` has a copy mechanism."""
        return self._masked_lm()

    def plain(self) -> Tensor:
        """Compute loss and sample with all logits at once."""
        with self._autocast():
            logits = F.linear(self.features, self.weight[: self.vocab_size], self.bias[: self.vocab_size]).float()
        losses = F.cross_entropy(logits, self.targets, reduction="none" if self.copies else "sum")
        if self.copies:
            copy = torch.sigmoid(self.copies["copy_logits"])
            losses = -(copy * self.copies["copied"] + (1 - copy) * torch.exp(-losses)).log()
        with torch.no_grad():
            probabilities = logits.softmax(-1)
            (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
        return losses.sum()

    def liger(self) -> Loss:
        """Return Liger-Kernel's fused linear cross entropy.

        Raises:
            ImportError: it is not installed.
        """
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: loss(*self._low_precision(), bias=self._cast(self.bias[: self.vocab_size]))

    def _low_precision(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._cast(self.weight[: self.vocab_size]), self._cast(self.features), self.targets

    def cut_cross_entropy(self) -> Loss:
        """Return Apple's cut cross entropy.

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
        """Compute the loss and its gradients, which :data:`INPUTS` names."""
        value = loss()
        inputs = [self.features, self.weight, self.bias]
        if self.copies and loss != self.ours_without_copy:
            inputs.append(self.copies["copy_logits"])
        return value.detach(), torch.autograd.grad(value, inputs)


def _others(problem: Problem) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the fused cross entropies that can be measured here, and for the others the reason."""
    available: dict[str, Loss] = {}
    reasons: dict[str, str] = {}
    for name in ("liger", "cut_cross_entropy"):
        if problem.device != "cuda":
            reasons[name] = "needs CUDA"
            continue
        if problem.copies:
            reasons[name] = "no copy mechanism"
            continue
        try:
            candidate = getattr(problem, name)()
            problem.step(candidate)
            available[name] = candidate
        except ImportError:
            reasons[name] = "not installed"
        except Exception as error:  # a failure of another project's kernel is a result
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return available, reasons


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def _agreement(problem: Problem) -> dict[str, float]:
    """Compute the relative differences between ours and plain PyTorch."""
    loss, gradients = problem.step(problem.ours)
    expected, expected_gradients = problem.step(problem.plain)
    names = INPUTS if problem.copies else INPUTS[:3]
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
    """Measure times, memory and agreement; `main` adds the options and the machine."""
    others, reasons = _others(problem)
    losses: dict[str, Loss] = {"ours": problem.ours, "plain": problem.plain, **others}
    if problem.copies:
        losses["ours_without_copy"] = problem.ours_without_copy
    steps = {name: (lambda loss=loss: problem.step(loss)) for name, loss in losses.items()}
    agreement = _agreement(problem)
    seconds = interleave(steps, repeats, warmup, problem.device)
    peaks: dict[str, int | None] = {}
    for name, step in steps.items():
        with PeakMemory(problem.device) as peak:
            step()
        peaks[name] = peak.bytes
    rows, ours = len(problem.targets), peaks["ours"]
    # A step that stores all logits needs at least one tensor of them, in the precision of the products. The peak
    # includes gradients: below this size proves that they are not stored, above it proves nothing at small sizes.
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
    """Measure and print one JSON line.

    Returns:
        1 if ours and plain PyTorch differ, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2432, help="masked positions (%(default)s: 128 rows × 19)")
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--hidden", type=int, default=128, help="embedding size")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--copy", action="store_true", help="the loss of all-tokens MLM, with a copy mechanism")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_args(arguments)
    require_positive(options, "rows", "vocab", "hidden", "repeats")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but no CUDA device is available; use --device cpu")
    problem = Problem(options.rows, options.vocab, options.hidden, options.precision, options.device, options.copy)
    implementation = resolve_implementation("auto", options.device, *problem.weight.shape)
    results = measure(problem, options.repeats, options.warmup)
    what = "forward and backward; ours and plain also draw a sample"
    print_result("masked_lm", **vars(options), implementation=implementation, what=what, **results)
    wrong = _disagreements(results["relative_difference"], options.precision)  # type: ignore[arg-type]
    if wrong:
        print(f"ours and plain PyTorch differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
