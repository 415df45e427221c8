"""Detect spikes of the training loss."""

from __future__ import annotations

import math


class SpikeDetector:
    """Detects losses more than six standard deviations above their running mean.

    Mean and deviation are exponential averages over about fifty batches. A spike enters them clamped to the threshold.
    Attribute names are keys in checkpoints (:meth:`NumericalGuard.state_dict`).

    Args:
        sigmas: threshold, in standard deviations above the mean.
        share: weight of a new loss in the averages.
        patience: batches before the first report and between two reports.

    Attributes:
        count: spikes so far.
        last: batch of the latest spike; 0: none.
        reports: reports so far.
    """

    def __init__(self, sigmas: float = 6.0, share: float = 0.02, patience: int = 100) -> None:
        self.sigmas, self.share, self.patience = sigmas, share, patience
        self.count = self.last = self.reports = 0
        self._seen = self._reported = self._said = 0
        self._mean = self._variance = 0.0

    def update(self, batch: int, loss: float) -> str | None:
        """Add the loss of a batch.

        Returns:
            A one-line report if the loss is a spike and the last report is at least `patience` batches ago, else None.
        """
        self._seen += 1
        share = max(self.share, 1 / self._seen)  # a plain mean at first
        sigma = math.sqrt(self._variance)
        limit = self._mean + self.sigmas * max(sigma, 0.005 * abs(self._mean))
        is_spike = self._seen > self.patience and loss > limit
        report = None
        if is_spike:
            self.count += 1
            self.last = batch
            if self._reported == 0 or batch - self._reported >= self.patience:
                more = self.count - self._said - 1
                report = (
                    f"batch {batch}: the loss is {loss:.4g}; its running mean is {self._mean:.4g}, sigma {sigma:.2g}"
                    + (f" ({more} more spikes since the last report)" if more else "")
                )
                self._reported, self._said = batch, self.count
                self.reports += 1
        step = (min(loss, limit) if is_spike else loss) - self._mean
        self._mean += share * step
        self._variance = (1 - share) * (self._variance + share * step * step)
        return report
