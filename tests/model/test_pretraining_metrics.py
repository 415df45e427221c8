"""Validation metrics and the count of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import BinaryAUROC

from electra_composer.config import ObjectiveConfig
from electra_composer.model.pretraining import ElectraPretraining, RunBinaryAUROC

Batch = dict[str, torch.Tensor]
Make = Callable[..., Any]
VOCAB_SIZE = 99

FULL = [[(12, 20)], [(32, 0)], [(16, 16)]]  # one example of 32 tokens in every row
# 32, 2, 6, 32, 3, 12, 30 and 20 tokens, masked 5 to none: a mean of the microbatches' means would be far off.
VERY_UNEVEN = [[(12, 20)], [(2, 0)], [(6, 0)], [(8, 4), (20, 0)], [(3, 0)], [(7, 5)], [(10, 10), (10, 0)], [(20, 0)]]


def outputs_of(logits: list[list[float]], truth: list[list[int]], **stats: float) -> dict[str, Any]:
    """Outputs in the format of the forward, with counts given by the test."""
    return {
        "rtd_logits": torch.tensor(logits),
        "replaced": torch.tensor(truth).bool(),
        "stats": {name: torch.tensor(value) for name, value in stats.items()},
    }


def computed(model: ElectraPretraining, updates: list[tuple[Batch, dict[str, Any]]]) -> dict[str, float]:
    metrics = model.get_metrics(is_train=False)
    for batch, outputs in updates:
        for metric in metrics.values():
            model.update_metric(batch, outputs, metric)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def test_metrics_of_two_batches_counted_by_hand(make_model: Make) -> None:
    """Seven tokens in the first batch (one padding), three in the second.

    First: logits + + + - - - -, truth R O R R O O O: 2 true and 1 false positives, 1 false and 3 true negatives.
    Second: + - -, truth O O R: 1 false positive, 1 true and 1 false negative.
    Together: precision 2/4, recall 2/4, accuracy 6/10, replaced 4/10.
    """
    first = outputs_of(
        [[3.0, 2.0, 1.0, -1.0], [-2.0, -3.0, -4.0, 9.0]],
        [[1, 0, 1, 1], [0, 0, 0, 0]],
        masked=5.0,
        mlm_correct=2.0,
        sampled_correct=2.0,
        tokens=7.0,
        replaced=3.0,
        true_positive=2.0,
        false_positive=1.0,
        false_negative=1.0,
        true_negative=3.0,
        mlm_loss_sum=10.0,
        rtd_loss_sum=3.5,
    )
    second = outputs_of(
        [[5.0, -0.5, -2.5, 0.0]],
        [[0, 0, 1, 0]],
        masked=1.0,
        mlm_correct=1.0,
        sampled_correct=0.0,
        tokens=3.0,
        replaced=1.0,
        true_positive=0.0,
        false_positive=1.0,
        false_negative=1.0,
        true_negative=1.0,
        mlm_loss_sum=1.0,
        rtd_loss_sum=6.0,
    )
    first["judged"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    second["judged"] = torch.tensor([[1, 1, 1, 0]]).bool()
    updates: list[tuple[Batch, dict[str, Any]]] = [({}, first), ({}, second)]
    found = computed(ElectraPretraining(make_model()), updates)
    assert found.pop("total_loss") == pytest.approx(11 / 6 + 50 * 9.5 / 10)
    # Positives 3, 1, -1, -2.5 against negatives 2, -2, -3, -4, 5, -0.5: of 24 pairs 5 + 4 + 3 + 2 are in order.
    assert found.pop("rtd_auc") == pytest.approx(14 / 24, abs=1e-3)
    assert found == pytest.approx(
        {
            "mlm_loss": 11 / 6,
            "mlm_accuracy": 3 / 6,
            "sampled_accuracy": 2 / 6,
            "rtd_loss": 9.5 / 10,
            "rtd_accuracy": 6 / 10,
            "rtd_precision": 2 / 4,
            "rtd_recall": 2 / 4,
            "replaced_share": 4 / 10,
        }
    )


@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_auc_against_the_rank_statistic(make_model: Make, shift: float) -> None:
    """Fraction of (replaced, original) pairs in the right order, ties counted half; also at low probabilities."""
    model = ElectraPretraining(make_model())
    generator = torch.Generator().manual_seed(5)
    metric = model.get_metrics(is_train=False)["rtd_auc"]
    positives, negatives = [], []
    for _ in range(2):
        replaced = torch.rand(20, 50, generator=generator) < 0.1
        logits = torch.randn(20, 50, generator=generator) + shift + replaced * 1.5
        present = torch.rand(20, 50, generator=generator) < 0.9
        logits[~present] = 30.0  # would spoil the curve if padding were counted
        model.update_metric({}, {"rtd_logits": logits, "replaced": replaced & present, "judged": present}, metric)
        positives.append(logits[replaced & present])
        negatives.append(logits[~replaced & present])
    pairs = torch.cat(positives)[:, None] - torch.cat(negatives)[None]
    expected = ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()
    assert 0.8 < expected < 0.9
    assert metric.compute().item() == pytest.approx(expected, abs=1e-3)


def test_metrics_are_numbers_when_nothing_was_called_replaced(make_model: Make, make_batch: Make) -> None:
    """Precision is 0, not NaN, if no token is predicted replaced, as early in training."""
    model = ElectraPretraining(make_model())
    with torch.no_grad():
        model.model.rtd_head.out.bias.fill_(-100.0)
    batch = make_batch(VERY_UNEVEN)
    found = computed(model, [(batch, model.eval_forward(batch))])
    assert found["rtd_precision"] == 0.0
    assert found["rtd_recall"] == 0.0


def test_training_metrics_are_left_to_the_callback(make_model: Make) -> None:
    assert ElectraPretraining(make_model()).get_metrics(is_train=True) == {}


@pytest.mark.parametrize("sampling", ["gumbel", "inverse_cdf"])
def test_evaluation_masks_depend_on_the_batch_alone(make_model: Make, make_batch: Make, sampling: str) -> None:
    """Repeated evaluations are identical, other rows get other masks, torch's random state is unchanged."""
    model = ElectraPretraining(make_model(objective=ObjectiveConfig(sampling=sampling))).eval()
    batch, other = make_batch(VERY_UNEVEN), make_batch(VERY_UNEVEN, seed=1)
    before = torch.get_rng_state()
    first = model.eval_forward(batch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(17)
    second = model.eval_forward(batch)
    for name in ("masked_positions", "corrupted_ids", "rtd_logits", "mlm_loss"):
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["masked_positions"], model.eval_forward(other)["masked_positions"])
    assert "noise" not in batch


@pytest.mark.parametrize(
    "sizes", [{}, {"embedding_size": 32, "generator_layers": 1}, {"hidden_size": 64, "embedding_size": 64}]
)
def test_operations_against_torchs_counter(
    make_model: Make, make_batch: Make, tiny_model_config: Make, sizes: dict[str, Any]
) -> None:
    """Torch's counter sums all matrix products of forward and backward. Attention uses the math backend, whose products
    are counted once. Each row is one full example, so that nothing is padding. The masked-LM head is one operator to
    the counter, of three products: logits, gradients of features and embeddings, without padding rows."""

    def head_operations(features: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 3 * 2 * features[0] * features[1] * VOCAB_SIZE

    model = ElectraPretraining(make_model(tiny_model_config(**sizes)))
    batch = model.count_batch(make_batch(FULL))
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(
            display=False, custom_mapping={torch.ops.electra_composer.masked_lm_chunked: head_operations}
        ) as counter,
    ):
        model.loss(model(batch), batch)["total"].backward()
    assert model.flops_per_batch(batch) == counter.get_total_flops()


def test_operations_by_hand(make_model: Make, make_batch: Make) -> None:
    """Two layers of 32 (generator: 16), feed-forward 128 (64), embeddings of 16, vocabulary of 99; rows of 20 tokens in
    two examples of 12 and 8, and of 6 tokens: 26 tokens, squared lengths 144 + 64 + 36 = 244, 3 + 1 masked."""
    discriminator = 6 * 26 * (2 * (4 * 1_024 + 2 * 4_096) + 512) + 12 * 2 * 32 * 244  # projection from 16 to 32
    generator = 6 * 26 * (2 * (4 * 256 + 2 * 1_024)) + 12 * 2 * 16 * 244  # no projection
    mlm_head = 6 * 4 * (16 * 16 + 16 * 99)
    rtd_head = 6 * 26 * (32 * 32 + 32)
    assert (discriminator, generator, mlm_head, rtd_head) == (4_101_120, 1_052_160, 44_160, 164_736)
    model = ElectraPretraining(make_model())
    assert model.flops_per_batch(make_batch([[(5, 7), (8, 0)], [(6, 0)]])) == 5_362_176


def test_padding_and_other_examples_of_a_row_are_no_operations(make_model: Make, make_batch: Make) -> None:
    model = ElectraPretraining(make_model())
    short, long = make_batch([[(6, 0)]], length=8), make_batch([[(6, 0)]], length=32)
    assert model.flops_per_batch(short) == model.flops_per_batch(long)
    packed, apart = make_batch([[(20, 0), (10, 0)]]), make_batch([[(20, 0)], [(10, 0)]])
    head = 6 * 16 * (16 + 99)  # 4 of the 30 tokens of a row are masked (its slots), 3 + 2 of those of two rows
    assert model.flops_per_batch(apart) - model.flops_per_batch(packed) == head


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_area_under_the_curve_counts_as_torchmetrics_does(deterministic: bool) -> None:
    """With deterministic algorithms torchmetrics needs 30 GB for 1,000 tokens."""
    thresholds = torch.sigmoid(torch.linspace(-12, 12, 961))
    preds, target = torch.cat([torch.rand(500), thresholds[::3], torch.tensor([0.0, 1.0])]), torch.randint(0, 2, (823,))
    ours, theirs = RunBinaryAUROC(thresholds=thresholds), BinaryAUROC(thresholds=thresholds)
    theirs.update(preds, target)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for part in (slice(0, 100), slice(100, None)):
            ours.update(preds[part], target[part])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ours.confmat, theirs.confmat)
    assert ours.compute() == theirs.compute()
