"""Warns of training that goes nowhere, while there is still time to do something about it."""

from __future__ import annotations

import logging

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)

NOTHING_LEARNT = 0.97  # of the loss without context
CHANCE = 0.55  # AUC


class LearningWatch(Callback):
    """Looks at every evaluation from a quarter of training on, and warns once of each thing that is wrong.

    A generator whose MLM loss is that of word frequencies has learnt nothing from context, and what it proposes teaches
    the discriminator nothing. A discriminator whose AUC is chance says of every token the same, the way out of the RTD
    loss that the paper describes ("fails to learn at all beyond the majority class", section 3.3).

    Args:
        loss_without_context: see :mod:`electra_composer.batches.baselines`; None if unknown: the generator is then
            not watched.
        after: share of training from which on.
    """

    def __init__(self, loss_without_context: float | None, after: float = 0.25) -> None:
        self.loss_without_context = loss_without_context
        self.after = after
        self._warned: set[str] = set()

    def eval_end(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        metrics = state.eval_metrics.get("eval", {})
        if elapsed is None or float(elapsed) < self.after or not {"mlm_loss", "rtd_auc"} <= metrics.keys():
            return
        # Composer has computed them already, on all processes: this reads what is there.
        loss, auc = float(metrics["mlm_loss"].compute()), float(metrics["rtd_auc"].compute())
        if self.loss_without_context is not None and loss > NOTHING_LEARNT * self.loss_without_context:
            self._warn(
                "generator",
                f"the generator's MLM loss on held-out text is {loss:.2f}; word frequencies alone give "
                f"{self.loss_without_context:.2f}. It has learnt nothing from context. Look at: the learning rate, the "
                "length of the warmup (optimizer.bias_correction for short runs), objective.mask_prob, and whether the "
                "text is what you think (python -m electra_composer.preview)",
            )
        if auc < CHANCE:
            self._warn(
                "discriminator",
                f"the discriminator's AUC on held-out text is {auc:.2f}; saying the same of every token gives 0.50. "
                "Look at: objective.disc_weight (lower for short runs), model.generator_size (one that is too good "
                "leaves nothing to find), the learning rate, model.tie_encoder for short runs",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned and dist.get_global_rank() == 0:
            log.warning(message)
        self._warned.add(what)
