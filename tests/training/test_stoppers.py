"""Callbacks that end training by a metric of an evaluation: names that do not exist are refused before it begins."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_trainer import make_trainer

from electra_composer.errors import UserError
from electra_composer.training.builders import build_callbacks

KINDS = {"early_stopper": {}, "threshold_stopper": {"threshold": 0.5}}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monitor": "mean_outptu"}, "monitor: evaluation eval has no metric 'mean_outptu'; did you mean mean_output?"),
        ({"dataloader_label": "train"}, "dataloader_label: no evaluation is named 'train'; "),
    ],
)
def test_a_name_that_does_not_exist(name: str, changes: dict[str, str], message: str) -> None:
    arguments: dict[str, Any] = {"monitor": "mean_output", "dataloader_label": "eval", **KINDS[name], **changes}
    trainer = make_trainer("1ba", callbacks=build_callbacks({name: arguments}))
    with pytest.raises(UserError, match=re.escape(f"callbacks.{name}.{message}")):
        trainer.fit()
    assert trainer.state.timestamp.batch.value == 0


def test_a_threshold_ends_training() -> None:
    arguments = {"monitor": "mean_output", "dataloader_label": "eval", "threshold": -1e9}  # every value is above it
    trainer = make_trainer("20ba", callbacks=build_callbacks({"threshold_stopper": arguments}))
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 4  # the first evaluation
