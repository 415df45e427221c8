"""`ComposerModel` for ELECTRA pretraining: joint loss, validation metrics and FLOPs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAUROC

from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import Layer
from electra_composer.model.flops import step_flops
from electra_composer.model.kernels.attention import ExampleBound
from electra_composer.model.losses import RATIOS, LossTerm, ratios_of, with_derived

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids", "noise", "mask_counts")

EVAL_NOISE_SEED = 20200311
"""Validation masks depend on this seed and the tokens of the batch, not on the random state of training. So checkpoints
are compared on the same masks, and evaluating more often does not change training."""


class ElectraPretraining(ComposerModel):
    """Pretraining with a joint loss that does not depend on how the batch is split.

    For ELECTRA `1.0 × MLM + 50.0 × RTD` (paper, section 2.2): MLM is a mean over the masked tokens, RTD over the
    non-padding tokens **of the complete batch**, over all microbatches and ranks. Composer weights a microbatch by its
    rows only, so :meth:`count_batch` counts the denominators before the batch is split and :meth:`loss` divides by
    them. Other objectives have other terms (`ElectraForPretraining.terms`).

    Args:
        model: the only child module, so that sharding keeps tied parameters in one group.
        cpu_autocast: run the forward under bfloat16 autocast on the CPU (see devices.py).
        gradient_factor: multiplies the gradients, but not the loss (see `devices.fsdp_gradient_factor`).
    """

    def __init__(self, model: ElectraForPretraining, cpu_autocast: bool = False, gradient_factor: float = 1.0):
        super().__init__()
        self.gradient_factor = gradient_factor
        self.model = model
        self.cpu_autocast = cpu_autocast
        self.example_bound: ExampleBound | None = None  # for the attention path varlen
        # Composer reads this from the child module: FSDP shards each Transformer layer as a unit, and keeps the rest,
        # tied parameters included, in one group.
        model.fsdp_wrap_fn = _is_unit  # type: ignore[assignment]

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the model on a batch of shards.py, integers `[rows, length]`, and optionally `noise` (see masking.py)."""
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        if "example_slots" in batch:
            inputs["most_examples"] = batch["example_slots"].shape[1]
        autocast = torch.autocast("cpu", torch.bfloat16) if self.cpu_autocast else contextlib.nullcontext()
        with autocast:
            return self.model(**inputs)

    def count_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add `loss_scale [rows, terms]`, fp32, equal in every row: the factors of the summed losses.

        For use as Composer's `batch_transforms`, which gets the complete batch of this rank before it is split. The
        factors contain the global denominators, compensate for the averaging of DDP and FSDP over ranks, and contain
        the rows of the batch, with which :meth:`loss` undoes Composer's weighting of microbatches.

        With `mask_draw: bernoulli` also `mask_counts [rows]`, the drawn numbers of masked tokens, which the forward of
        each microbatch must use. With an `example_bound` also `example_slots [rows, bound, 0]`: no numbers, but a
        shape, which compiled and recorded steps compare with that of other batches.
        """
        input_ids, sequence_ids = batch["input_ids"], batch["sequence_ids"]
        rows = input_ids.shape[0]
        found = self.model.counts(input_ids, sequence_ids)
        sums = [found[term.over].sum() for term in self.model.terms]
        counts = torch.stack([*sums, torch.tensor(rows, device=input_ids.device)]).double()
        if dist.get_world_size() > 1:
            dist.all_reduce(counts, reduce_operation="SUM")  # on the CPU: the batch is not on the device yet
        *denominators, all_rows = counts.unbind()
        # Gradients are averaged over ranks: × world_size. Composer multiplies by the rows of the microbatch over those
        # of the rank's batch: × the latter, and `loss` divides by the former.
        scale = torch.stack([all_rows / denominator.clamp(min=1) for denominator in denominators]).float()
        counted = {**batch, "loss_scale": scale.expand(rows, -1).contiguous()}
        if self.model.objective.mask_draw == "bernoulli":
            counted["mask_counts"] = found["masked"]
        if self.example_bound is not None:
            counted["example_slots"] = torch.empty(rows, self.example_bound.of(sequence_ids), 0)
        return counted

    def loss(self, outputs: dict[str, Any], batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return `total` and, by the names of the terms, such as `mlm` and `rtd`, their means: fp32 scalars.

        Composer sums them over microbatches, which gives the means over the batch.
        """
        if "loss_scale" not in batch:
            raise KeyError("the batch has no loss_scale: pass it through count_batch before it is split")
        scale = batch["loss_scale"][0] / batch["input_ids"].shape[0]
        terms = self.model.terms
        losses = {term.name: outputs[f"{term.name}_loss"] * scale[place] for place, term in enumerate(terms)}
        # Terms of weight 0 too: DDP waits for a gradient of every trainable parameter.
        total = torch.stack([term.weight * losses[term.name] for term in terms]).sum()
        if self.gradient_factor != 1.0:
            total = total.detach() + self.gradient_factor * (total - total.detach())  # the same value
        return {"total": total, **losses}

    def eval_forward(self, batch: dict[str, Any], outputs: Any = None) -> dict[str, Any]:
        """Run a forward with masks and samples that depend only on the batch."""
        if "noise" not in batch:
            generator = torch.Generator(batch["input_ids"].device)
            generator.manual_seed(EVAL_NOISE_SEED + int(batch["input_ids"].sum()))
            batch = {**batch, "noise": self.model.draw_noise(batch["input_ids"], generator)}
        return self.forward(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """Return validation metrics; a callback sums training metrics, without synchronising with the device."""
        if is_train:
            return {}
        metrics: dict[str, Metric] = {name: NamedMean(name) for name in ratios_of(self.model.stats)}
        metrics["total_loss"] = TotalLoss(self.model.terms)
        if self.model.rtd_head is not None:
            # Fixed thresholds keep memory constant; even steps in logit space resolve the low probabilities of RTD. The
            # logits of Electric contain log q, which reaches down to log(SMALLEST) = -46.
            lowest = -48 if self.model.objective.kind == "electric" else -12
            thresholds = torch.sigmoid(torch.linspace(lowest, 12, 40 * (12 - lowest) + 1))
            metrics["rtd_auc"] = RunBinaryAUROC(thresholds=thresholds)
        return metrics

    def update_metric(self, batch: dict[str, Any], outputs: dict[str, Any], metric: Metric) -> None:
        """Update one metric of :meth:`get_metrics` with one batch."""
        if isinstance(metric, BinaryAUROC):
            judged = outputs["judged"]
            metric.update(outputs["rtd_logits"][judged].sigmoid(), outputs["replaced"][judged].long())
            return
        stats = with_derived(outputs["stats"])
        if isinstance(metric, TotalLoss):
            metric.update(stats)
            return
        assert isinstance(metric, NamedMean)
        numerator, terms = RATIOS[metric.of]
        denominator = sum((stats[term] for term in terms), torch.zeros_like(stats["tokens"]))
        metric.update(stats[numerator] / denominator.clamp(min=1), denominator)

    def flops_per_batch(self, batch: dict[str, Any]) -> int:
        """Floating-point operations of one training step on `batch`, for MFU; see :mod:`electra_composer.model.flops`.

        Args:
            batch: as for :meth:`forward`. Its tokens are counted, which synchronises with the device if it is on a GPU.
        """
        counts = self.model.counts(batch["input_ids"], batch["sequence_ids"])
        sums = {name: int(of_rows.sum()) for name, of_rows in counts.items()}
        # Positions count from 0 in every example and are 0 in padding: an example's sum to length · (length - 1) / 2.
        squared_lengths = 2 * int(batch["position_ids"].sum()) + sums["tokens"]
        return step_flops(self.model, sums, squared_lengths)


def _is_unit(module: nn.Module) -> bool:
    # Workaround (torch 2.7): FSDP2 casts the inputs of its units in the forward, but not when activation checkpointing
    # repeats it, so that dtypes differ. The wrapper of a checkpointed layer is therefore a unit too, which casts before
    # the input is kept; its class is private. Goes when FSDP2 casts both times.
    return isinstance(module, Layer | ActivationWrapper)


class NamedMean(MeanMetric):
    """Weighted mean of one ratio of :data:`RATIOS`."""

    def __init__(self, of: str):
        super().__init__()
        self.of = of

    def compute(self) -> Tensor:
        """Return 0, not NaN, if nothing was counted, for example precision if no token is predicted replaced."""
        return self.mean_value / self.weight.clamp(min=1.0)


class TotalLoss(Metric):
    """Joint loss over a complete evaluation; each of its means has its own denominator."""

    def __init__(self, terms: Sequence[LossTerm]):
        super().__init__()
        self.terms = tuple(terms)
        self.add_state("sums", torch.zeros(2 * len(self.terms), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stats: dict[str, Tensor]) -> None:
        """Add the sums of one batch."""
        names = [name for term in self.terms for name in (f"{term.name}_loss_sum", term.over)]
        self.sums += torch.stack([stats[name] for name in names])

    def compute(self) -> Tensor:
        """Return an fp64 scalar."""
        losses, counts = self.sums.view(-1, 2).unbind(1)
        weights = self.sums.new_tensor([term.weight for term in self.terms])
        return (weights * losses / counts.clamp(min=1)).sum()


class RunBinaryAUROC(BinaryAUROC):
    """BinaryAUROC at fixed thresholds, in increasing order, that counts by buckets.

    The counts are those of BinaryAUROC, also with deterministic algorithms.
    """

    # Workaround (torchmetrics 1.7): with deterministic algorithms, BinaryAUROC compares each pair of a prediction and a
    # threshold with each of its counts: 30 GB for 1,000 tokens; goes when it uses torch.bincount, which without weights
    # is deterministic.

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count predictions at or above each threshold.

        Args:
            preds: floats `[n]` in [0, 1].
            target: integers `[n]`, 0 or 1.
        """
        assert self.thresholds is not None
        width = len(self.thresholds) + 1
        buckets = torch.bucketize(preds, self.thresholds, right=True) + width * target  # thresholds at or below
        counts = torch.bincount(buckets, minlength=2 * width).view(2, width)
        above = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # [class, threshold]
        self.confmat += torch.stack([counts.sum(1, keepdim=True) - above, above], dim=-1).transpose(0, 1)
