"""Warnings of LearningWatch: conditions, time and number."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torchmetrics import MeanMetric

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main
from electra_composer.training.learning_watch import LearningWatch


def evaluate(watch, loss, auc, elapsed):
    metrics = {"mlm_loss": MeanMetric(), "rtd_auc": MeanMetric()}
    metrics["mlm_loss"].update(torch.tensor(loss))
    metrics["rtd_auc"].update(torch.tensor(auc))
    watch.eval_end(SimpleNamespace(eval_metrics={"eval": metrics}, get_elapsed_duration=lambda: elapsed), None)


@pytest.mark.parametrize(
    ("loss", "auc", "elapsed", "said"),
    [
        (5.3, 0.8, 0.5, ["MLM loss on held-out text is 5.30"]),
        (4.0, 0.51, 0.5, ["AUC on held-out text is 0.51"]),
        (5.4, 0.5, 0.5, ["5.37. Nothing has been learnt", "predicting the same for every token"]),
        (4.0, 0.8, 0.5, []),
        (5.3, 0.5, 0.1, []),  # too early
        (5.3, 0.5, None, []),  # an evaluation outside of training
    ],
)
def test_what_is_warned_of(caplog, loss, auc, elapsed, said):
    with caplog.at_level(logging.WARNING):
        evaluate(LearningWatch(5.37), loss, auc, elapsed)
    assert len(caplog.messages) == len(said)
    for message, part in zip(caplog.messages, said, strict=True):
        assert part in message


def test_each_is_said_once(caplog):
    watch = LearningWatch(5.37)
    for elapsed in (0.3, 0.6, 0.9):
        evaluate(watch, 5.4, 0.5, elapsed)
    assert len(caplog.messages) == 2


def test_an_unknown_baseline_and_other_metrics_say_nothing(caplog):
    evaluate(LearningWatch(None), 9.0, 0.9, 0.9)
    LearningWatch(1.0).eval_end(SimpleNamespace(eval_metrics={}, get_elapsed_duration=lambda: 0.9), None)
    assert not caplog.messages


def test_a_run_that_learns_nothing_is_warned_of(tiny_yaml, caplog):
    main(load_config(str(tiny_yaml), ["optimizer.lr=1e-9"], PretrainConfig))
    assert "Nothing has been learnt from context" in caplog.text
