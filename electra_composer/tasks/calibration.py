"""Calibration of probabilities by a temperature (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math

from torch import Tensor

LARGEST = 100.0  # temperatures are in [1 / LARGEST, LARGEST]: the optimum of perfect predictions would be 0
STEPS = 40  # halvings of that interval: a relative precision of 1e-11


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T for which `logits / T` give the labels the largest likelihood.

    The negative log likelihood is convex in 1/T, and its derivative there is the expected minus the actual logit of
    the label, summed over the examples: its zero is found by bisection of log T.

    Args:
        logits: `[examples, labels]`.
        labels: integers `[examples]`, or for several labels per example 0 and 1, `[examples, labels]`.

    Returns:
        A number in [1 / :data:`LARGEST`, :data:`LARGEST`].
    """
    logits = logits.double()
    is_single = labels.dim() == 1
    actual = (logits.gather(1, labels.long()[:, None]) if is_single else logits * labels).sum()
    low, high = -math.log(LARGEST), math.log(LARGEST)
    for _ in range(STEPS):
        middle = (low + high) / 2
        scaled = logits * math.exp(-middle)
        expected = ((scaled.softmax(1) if is_single else scaled.sigmoid()) * logits).sum()
        if expected > actual:  # too sure: a larger T is more likely
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
