"""Names of the losses and sums that the forward of an objective returns, and the metrics that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Over = Literal["masked", "tokens", "candidates"]
"""What a mean is over: the masked positions, all tokens but padding, or all tokens that may be masked."""


class LossTerm(NamedTuple):
    """One term of an objective: a mean, times a weight."""

    name: str
    """The forward returns the sum as `<name>_loss`, and among its statistics as `<name>_loss_sum`."""
    weight: float
    """Factor in the total loss."""
    over: Over


STATS = (
    "masked",  # positions that are masked
    "mlm_correct",  # of these: the most likely token is the original
    "sampled_correct",  # of these: the sampled token is the original
    "tokens",  # tokens without padding
    "replaced",  # of the tokens that the discriminator is trained on: not the original
    "true_positive",  # replaced and predicted as replaced
    "false_positive",
    "false_negative",
    "true_negative",
    "mlm_loss_sum",
    "rtd_loss_sum",
    "candidates",  # tokens that may be masked
    "cloze_correct",  # of these: the most likely token of two towers is the original
    "cloze_loss_sum",
    "predicted",  # tokens whose originals the discriminator predicts from the generator's samples
    "lm_correct",  # of these: the prediction is the original
    "copied",  # of these: the copy probability is above 1/2
    "lm_loss_sum",
)
"""Every sum that a forward may return, in the order in which they are reduced."""

OF_TERM: dict[str, tuple[str, ...]] = {
    "mlm": ("mlm_correct", "mlm_loss_sum"),
    "cloze": ("candidates", "cloze_correct", "cloze_loss_sum"),
    "lm": ("predicted", "lm_correct", "lm_loss_sum"),
    "rtd": ("replaced", "true_positive", "false_positive", "false_negative", "true_negative", "rtd_loss_sum"),
}
"""The sums that belong to a loss."""


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of sums in the order of :data:`STATS`.

    Raises:
        ValueError: an unknown name.
    """
    return tuple(sorted(names, key=STATS.index))


RATIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mlm_loss": ("mlm_loss_sum", ("masked",)),
    "mlm_accuracy": ("mlm_correct", ("masked",)),
    "sampled_accuracy": ("sampled_correct", ("masked",)),
    "cloze_loss": ("cloze_loss_sum", ("candidates",)),
    "cloze_accuracy": ("cloze_correct", ("candidates",)),
    "lm_loss": ("lm_loss_sum", ("predicted",)),
    "lm_accuracy": ("lm_correct", ("predicted",)),
    "copied_share": ("copied", ("predicted",)),
    "rtd_loss": ("rtd_loss_sum", ("judged",)),
    "rtd_accuracy": ("rtd_correct", ("judged",)),
    "rtd_precision": ("true_positive", ("true_positive", "false_positive")),
    "rtd_recall": ("true_positive", ("true_positive", "false_negative")),
    "replaced_share": ("replaced", ("judged",)),
}
"""Metrics that are ratios of sums: name → (numerator, terms of the denominator); see :func:`with_derived`."""


def ratios_of(stats: Iterable[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the entries of :data:`RATIOS` that follow from sums of these names."""
    known = with_derived(dict.fromkeys(stats, 0.0))
    return {name: ratio for name, ratio in RATIOS.items() if ratio[0] in known}


def with_derived(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Add the sums that follow from others: `rtd_correct`, and `judged`, the tokens the discriminator is trained on."""
    if "true_positive" not in stats:
        return {**stats}
    correct = stats["true_positive"] + stats["true_negative"]
    return {**stats, "rtd_correct": correct, "judged": correct + stats["false_positive"] + stats["false_negative"]}
