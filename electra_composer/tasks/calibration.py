"""Calibration of probabilities by a temperature (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math

from torch import Tensor

LARGEST = 100.0  # temperatures are searched in [1 / LARGEST, LARGEST]
STEPS = 40  # halvings of that interval: a relative precision of 1e-11


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T for which `logits / T` give the labels the largest likelihood.

    The negative log likelihood is convex in 1/T, and its derivative there is the expected minus the actual logit of
    the label, summed over the examples: its zero is found by bisection of log T.

    Args:
        logits: `[examples, labels]`.
        labels: integers `[examples]`, or for several labels per example 0 and 1, `[examples, labels]`.

    Returns:
        T; 1 if the examples do not determine it: if all predictions are right, the likelihood grows as T goes to 0, and
        if they are no better than chance, as it goes to infinity.
    """
    logits = logits.double()
    is_single = labels.dim() == 1
    actual = (logits.gather(1, labels.long()[:, None]) if is_single else logits * labels).sum()

    def is_too_sure(log_temperature: float) -> bool:
        """Return whether a larger temperature is more likely."""
        scaled = logits * math.exp(-log_temperature)
        probabilities = scaled.softmax(1) if is_single else scaled.sigmoid()
        return bool((probabilities * logits).sum() > actual)

    low, high = -math.log(LARGEST), math.log(LARGEST)
    if not is_too_sure(low) or is_too_sure(high):
        return 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_sure(middle) else (low, middle)
    return math.exp((low + high) / 2)
