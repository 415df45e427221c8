"""TensorBoard: points at the interval, one file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_trainer import make_trainer

from electra_composer.errors import UserError
from electra_composer.training.tensorboard import RunTensorboard

pytest.importorskip("tensorboard")


def test_points_at_the_interval_in_one_file(tmp_path: Path) -> None:
    """An evaluation after the fourth batch, another at the end; metrics of both have their points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunTensorboard(str(tmp_path), interval="3ba", flush_interval=1)
    trainer = make_trainer("8ba", run_name="r", loggers=[logger])
    trainer.fit()
    trainer.close()
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    events = EventAccumulator(str(file))
    events.Reload()
    # The loss of the batch before the evaluation is written with it, and the last one at the end.
    assert [event.step for event in events.Scalars("loss/train/total")] == [0, 3, 6, 7]
    assert [event.step for event in events.Scalars("metrics/eval/mean_output")] == [4, 8]
    assert events.Tags()["scalars"].count("hparams/loss/train/total") == 1


def test_metrics_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = RunTensorboard(str(tmp_path), interval="1ba", flush_interval=2)
    trainer = make_trainer("3ba", run_name="r", loggers=[logger], eval_interval="3ba")
    sizes = []
    batch_end = logger.batch_end

    def watch(state, logger):
        batch_end(state, logger)
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))

    logger.batch_end = watch
    trainer.fit()
    trainer.close()
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("interval", ["1ep", "0ba", "often"])
def test_an_interval_that_is_none(interval: str) -> None:
    with pytest.raises(UserError, match="interval"):
        RunTensorboard(interval=interval)
