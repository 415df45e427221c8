"""`ComposerModel` for ELECTRA pretraining: joint loss, validation metrics and FLOPs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAUROC

from electra_composer.config import ObjectiveConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import EncoderConfig, Layer
from electra_composer.model.kernels.attention import ExampleBound

MODEL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "sequence_ids", "noise", "mask_counts")

EVAL_NOISE_SEED = 20200311
"""Validation masks depend on this seed and the tokens of the batch, not on the random state of training. So checkpoints
are compared on the same masks, and evaluating more often does not change training."""

RATIOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mlm_loss": ("mlm_loss_sum", ("masked",)),
    "mlm_accuracy": ("mlm_correct", ("masked",)),
    "sampled_accuracy": ("sampled_correct", ("masked",)),
    "rtd_loss": ("rtd_loss_sum", ("tokens",)),
    "rtd_accuracy": ("rtd_correct", ("tokens",)),
    "rtd_precision": ("true_positive", ("true_positive", "false_positive")),
    "rtd_recall": ("true_positive", ("true_positive", "false_negative")),
    "replaced_share": ("replaced", ("tokens",)),
}
"""Metrics that are ratios of sums returned by the forward: name → (numerator, terms of the denominator)."""


class ElectraPretraining(ComposerModel):
    """ELECTRA pretraining with a joint loss that does not depend on how the batch is split.

    `1.0 × MLM + 50.0 × RTD` (paper, section 2.2): MLM is a mean over the masked tokens, RTD over the non-padding tokens
    **of the complete batch**, over all microbatches and ranks. Composer weights a microbatch by its rows only, so
    :meth:`count_batch` counts both denominators before the batch is split and :meth:`loss` divides by them.

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
        """Add `loss_scale [rows, 2]`, fp32, equal in every row: the factors of the summed MLM and RTD losses.

        For use as Composer's `batch_transforms`, which gets the complete batch of this rank before it is split. The
        factors contain the global denominators, compensate for the averaging of DDP and FSDP over ranks, and contain
        the rows of the batch, with which :meth:`loss` undoes Composer's weighting of microbatches.

        With `mask_draw: bernoulli` also `mask_counts [rows]`, the drawn numbers of masked tokens, which the forward of
        each microbatch must use. With an `example_bound` also `example_slots [rows, bound, 0]`: no numbers, but a
        shape, which compiled and recorded steps compare with that of other batches.
        """
        input_ids, sequence_ids = batch["input_ids"], batch["sequence_ids"]
        rows = input_ids.shape[0]
        mask_counts = self.model.mask_counts(input_ids, sequence_ids)
        counts = torch.stack(
            [
                mask_counts.sum(),
                (sequence_ids > 0).sum(),
                torch.tensor(rows, device=input_ids.device),
            ]
        ).double()
        if dist.get_world_size() > 1:
            dist.all_reduce(counts, reduce_operation="SUM")  # on the CPU: the batch is not on the device yet
        masked, tokens, all_rows = counts.unbind()
        # Gradients are averaged over ranks: × world_size. Composer multiplies by the rows of the microbatch over those
        # of the rank's batch: × the latter, and `loss` divides by the former.
        scale = torch.stack([all_rows / masked.clamp(min=1), all_rows / tokens.clamp(min=1)]).float()
        counted = {**batch, "loss_scale": scale.expand(rows, 2).contiguous()}
        if self.model.objective.mask_draw == "bernoulli":
            counted["mask_counts"] = mask_counts
        if self.example_bound is not None:
            counted["example_slots"] = torch.empty(rows, self.example_bound.of(sequence_ids), 0)
        return counted

    def loss(self, outputs: dict[str, Any], batch: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return `total`, `mlm`, `rtd`: fp32 scalars; summed by Composer over microbatches, means over the batch."""
        if "loss_scale" not in batch:
            raise KeyError("the batch has no loss_scale: pass it through count_batch before it is split")
        scale = batch["loss_scale"][0] / batch["input_ids"].shape[0]
        mlm, rtd = outputs["mlm_loss"] * scale[0], outputs["rtd_loss"] * scale[1]
        total = self.model.objective.gen_weight * mlm + self.model.objective.disc_weight * rtd
        if self.gradient_factor != 1.0:
            total = total.detach() + self.gradient_factor * (total - total.detach())  # the same value
        return {"total": total, "mlm": mlm, "rtd": rtd}

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
        metrics: dict[str, Metric] = {name: NamedMean(name) for name in RATIOS}
        metrics["total_loss"] = TotalLoss(self.model.objective)
        # Fixed thresholds keep memory constant; even steps in logit space resolve the low probabilities of RTD.
        metrics["rtd_auc"] = RunBinaryAUROC(thresholds=torch.sigmoid(torch.linspace(-12, 12, 961)))
        return metrics

    def update_metric(self, batch: dict[str, Any], outputs: dict[str, Any], metric: Metric) -> None:
        """Update one metric of :meth:`get_metrics` with one batch."""
        if isinstance(metric, BinaryAUROC):
            tokens = batch["sequence_ids"] > 0
            metric.update(outputs["rtd_logits"][tokens].sigmoid(), outputs["replaced"][tokens].long())
            return
        stats = {**outputs["stats"]}
        stats["rtd_correct"] = stats["true_positive"] + stats["true_negative"]
        if isinstance(metric, TotalLoss):
            metric.update(stats)
            return
        assert isinstance(metric, NamedMean)
        numerator, terms = RATIOS[metric.of]
        denominator = sum((stats[term] for term in terms), torch.zeros_like(stats["tokens"]))
        metric.update(stats[numerator] / denominator.clamp(min=1), denominator)

    def flops_per_batch(self, batch: dict[str, Any]) -> int:
        """Floating-point operations of one training step on `batch`, for MFU.

        These are model FLOPs as defined by PaLM (arXiv 2204.02311, appendix B), independent of the implementation.
        Generator and discriminator are counted separately, each with its own hidden size h, feed-forward size f
        and layers n. With e the embedding size, v the vocabulary, T the non-padding tokens of the batch, M the masked
        ones, S the sum over its examples of their length squared::

            encoder   6 · T · (n · (4h² + 2hf) + eh)  +  12 · n · h · S      (eh: only where e and h differ)
            MLM head  6 · M · (h · e + e · v)                                (h of the generator)
            RTD head  6 · T · (h · h + h)                                    (h of the discriminator)

        A multiply-add is two operations, and backward is twice the forward: hence 6 per weight of a matrix product, and
        12 for the two products of attention. Not counted: padding, attention to other examples of a row, unused slots,
        recomputation, embedding lookups, LayerNorm, softmax, sampling and the optimizer.

        Args:
            batch: as for :meth:`forward`. Its tokens are counted, which synchronises with the device if it is on a GPU.
        """
        sequence_ids = batch["sequence_ids"]
        tokens = int((sequence_ids > 0).sum())
        masked = int(self.model.mask_counts(batch["input_ids"], sequence_ids).sum())
        # Positions count from 0 in every example and are 0 in padding: an example's sum to length · (length - 1) / 2.
        squared_lengths = 2 * int(batch["position_ids"].sum()) + tokens
        generator, discriminator = self.model.encoder_of_generator.config, self.model.discriminator.config
        mlm_weights = generator.embedding_size * (generator.hidden_size + generator.vocab_size)
        rtd_weights = discriminator.hidden_size * (discriminator.hidden_size + 1)
        return (
            encoder_flops(generator, tokens, squared_lengths)
            + encoder_flops(discriminator, tokens, squared_lengths)
            + 6 * masked * mlm_weights
            + 6 * tokens * rtd_weights
        )


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
    """Joint loss over a complete evaluation; each of its two means has its own denominator."""

    SUMS = ("mlm_loss_sum", "masked", "rtd_loss_sum", "tokens")

    def __init__(self, objective: ObjectiveConfig):
        super().__init__()
        self.weights = (objective.gen_weight, objective.disc_weight)
        self.add_state("sums", torch.zeros(len(self.SUMS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stats: dict[str, Tensor]) -> None:
        """Add the sums of one batch."""
        self.sums += torch.stack([stats[name] for name in self.SUMS])

    def compute(self) -> Tensor:
        """Return an fp64 scalar."""
        mlm, masked, rtd, tokens = self.sums
        return self.weights[0] * mlm / masked.clamp(min=1) + self.weights[1] * rtd / tokens.clamp(min=1)


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


def encoder_flops(config: EncoderConfig, tokens: int, squared_lengths: int) -> int:
    """Operations of forward and backward of one encoder; see `ElectraPretraining.flops_per_batch`.

    Args:
        config: sizes of the encoder.
        tokens: number of tokens without padding.
        squared_lengths: sum over the examples of their squared lengths.
    """
    hidden = config.hidden_size
    layer_weights = 4 * hidden * hidden + 2 * hidden * config.intermediate_size
    projection = config.embedding_size * hidden if config.embedding_size != hidden else 0
    products = 6 * tokens * (config.num_layers * layer_weights + projection)
    # Scores and weighted values of a layer: two products of 2 · length² · hidden operations, three times over.
    attention = 12 * config.num_layers * hidden * squared_lengths
    return products + attention
