"""TensorBoard: one event file per start of a run, with points at the logging interval."""

from __future__ import annotations

import functools
from typing import Any

from composer.core import State
from composer.loggers import Logger, TensorboardLogger
from composer.utils import dist

from electra_composer.training.loggers import IntervalLogger


class RunTensorboard(IntervalLogger, TensorboardLogger):
    """TensorboardLogger that writes at an interval, and to one file.

    Composer's writes every metric of every batch, and starts a new file every 100 batches: 10,000 files in a run of a
    million batches, each of them copied to the remote.

    Args:
        log_dir: the file goes to its folder of the run's name.
        interval: batches between two points of a curve, such as `100ba`. Metrics that are logged less often have all
            their points; those of an evaluation and of the last batch are always written.
        flush_interval: batches after which the file is complete on disk.
        rank_zero_only: whether only rank 0 writes.

    Raises:
        UserError: an interval that is not a number of batches above 0.
    """

    # Workaround (composer 0.32): the file's end and its upload are the private method `_flush`; goes when
    # TensorboardLogger keeps its file open.

    def __init__(
        self,
        log_dir: str | None = None,
        interval: str = "1ba",
        flush_interval: int = 100,
        rank_zero_only: bool = True,
    ) -> None:
        TensorboardLogger.__init__(self, log_dir, flush_interval, rank_zero_only)
        IntervalLogger.__init__(self, interval)
        self.writer: Any  # SummaryWriter; None before the start and after the end
        self.points: dict[str, tuple[Any, int]] = {}  # metric → latest value and its step, not yet written

    @functools.cached_property
    def writes(self) -> bool:
        return not self.rank_zero_only or dist.get_global_rank() == 0

    def keep(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            self.points[name] = (value, self.step)

    def epoch_end(self, state: State, logger: Logger) -> None:
        pass  # TensorboardLogger starts a new file

    def eval_end(self, state: State, logger: Logger) -> None:
        self._flush(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._flush(logger)
        self._write_hyperparameters()
        self._flush(logger)

    def close(self, state: State, logger: Logger) -> None:
        self._flush(logger)
        if self.writer is not None:
            self.writer.close()
        self.writer = None

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.writer is not None and state.timestamp.batch.value % self.flush_interval == 0:
            self.writer.flush()

    def write_kept(self) -> None:
        points, self.points = self.points, {}
        for name, (value, step) in points.items():
            self.current_metrics[name] = value  # for the table of hyperparameters
            TensorboardLogger.log_metrics(self, {name: value}, step)

    def _flush(self, logger: Logger) -> None:
        self.write_kept()
        if self.writer is not None:
            self.writer.flush()

    def _write_hyperparameters(self) -> None:
        """Write the table of hyperparameters with the last losses and metrics."""
        if self.writer is None or not self.hyperparameters:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = {
            f"hparams/{name}": value
            for name, value in self.current_metrics.items()
            if ("metric" in name or "loss" in name) and isinstance(value, int | float)
        }
        for summary in hparams(self.hyperparameters, metrics):
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value)
