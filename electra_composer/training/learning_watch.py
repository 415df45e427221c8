"""Warn early of training that does not learn."""

from __future__ import annotations

import logging

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

log = logging.getLogger(__name__)

NOTHING_LEARNT = 0.97  # fraction of the loss without context
CHANCE = 0.55  # AUC


class LearningWatch(Callback):
    """Warns once each of a generator and a discriminator that do not learn, at evaluations from `after` on.

    A generator whose MLM loss is that of word frequencies has learnt nothing from context, and its samples teach the
    discriminator nothing. A discriminator with an AUC of chance predicts the same for every token, the degenerate
    solution of the RTD loss that the paper describes ("fails to learn at all beyond the majority class", section 3.3).

    Args:
        loss_without_context: see :mod:`electra_composer.batches.baselines`; None: do not check the generator.
        after: fraction of training before the first check.
    """

    def __init__(self, loss_without_context: float | None, after: float = 0.25) -> None:
        self.loss_without_context = loss_without_context
        self.after = after
        self._warned: set[str] = set()

    def eval_end(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        metrics = state.eval_metrics.get("eval", {})
        if elapsed is None or float(elapsed) < self.after:
            return
        # Computed already by Composer on all ranks: this reads cached values.
        found = {name: float(metrics[name].compute()) for name in ("mlm_loss", "rtd_auc") if name in metrics}
        loss, auc = found.get("mlm_loss"), found.get("rtd_auc")
        baseline = self.loss_without_context
        if loss is not None and baseline is not None and loss > NOTHING_LEARNT * baseline:
            self._warn(
                "generator",
                f"the MLM loss on held-out text is {loss:.2f}; word frequencies alone give {baseline:.2f}. Nothing has "
                "been learnt from context. Check the learning rate, the length of the warmup "
                "(optimizer.bias_correction for short runs), objective.mask_prob, and the text itself "
                "(python -m electra_composer.preview)",
            )
        if auc is not None and auc < CHANCE:
            self._warn(
                "discriminator",
                f"the discriminator's AUC on held-out text is {auc:.2f}; predicting the same for every token gives "
                "0.50. Check objective.disc_weight (lower for short runs), model.generator_size (a generator that is "
                "too good leaves nothing to detect), the learning rate, model.tie_encoder for short runs",
            )

    def _warn(self, subject: str, message: str) -> None:
        if subject not in self._warned and dist.get_global_rank() == 0:
            log.warning(message)
        self._warned.add(subject)
