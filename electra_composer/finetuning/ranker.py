"""WNLI as ranking of candidates (`wnli: coreference`): loss and model; ranking.py encodes the examples.

Source of scores, loss and decision: richarddwang/electra_pytorch `_utils/wsc_trick.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.errors import UserError
from electra_composer.finetuning.model import ElectraClassifier
from electra_composer.finetuning.tasks import Task
from electra_composer.glue_config import GlueModelConfig
from electra_composer.model.finetuning import ElectraForReplacedTokens
from electra_composer.tasks.model import encoder_config, load_body


def is_first(example_ids: Tensor) -> Tensor:
    """Return booleans `[rows]`: True for the first row of each example, which has the candidate of the hypothesis."""
    return torch.cat([example_ids.new_ones(1, dtype=torch.bool), example_ids[1:] != example_ids[:-1]])


def ranking_loss(scores: Tensor, example_ids: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy with target "original" for a right candidate and "replaced" for its competitors.

    Args:
        scores: scores of the candidates, fp32 `[rows]`; positive means replaced.
        example_ids: integers `[rows]`, ascending.
        labels: integers `[examples]`. Examples of label 0 give no loss: which competitor is right is unknown.

    Returns:
        Mean over the rows of an example, then over the examples of label 1; 0 if there are none.
    """
    losses = F.binary_cross_entropy_with_logits(scores, (~is_first(example_ids)).float(), reduction="none")
    sums = losses.new_zeros(len(labels)).index_add(0, example_ids, losses)
    counts = losses.new_zeros(len(labels)).index_add(0, example_ids, torch.ones_like(losses))
    right = (labels == 1).float()
    return (right * sums / counts).sum() / right.sum().clamp(min=1)


def ranking_logits(scores: Tensor, example_ids: Tensor, examples: int) -> Tensor:
    """Convert scores `[rows]` to the logits of a classifier, fp32 `[examples, 2]`.

    The logits are 0 and the lowest score of the competitors minus the score of the candidate of the hypothesis. Without
    competitors, 0 takes the place of their score: the candidate must be more likely original than replaced.
    """
    first = is_first(example_ids)
    others = scores.new_full((examples,), torch.inf).scatter_reduce(0, example_ids[~first], scores[~first], "amin")
    margins = torch.where(torch.isinf(others), 0.0, others) - scores[first]
    return torch.stack([torch.zeros_like(margins), margins], dim=1)


class ElectraRanker(ElectraClassifier):
    """Discriminator that ranks candidates by its mean logit over their tokens; the head is the pretrained one."""

    def scores(self, batch: dict[str, Any]) -> Tensor:
        """Return the scores of a batch of :func:`collate_ranked`, fp32 `[rows]`; positive means replaced."""
        logits, candidates = super().forward(batch), batch["candidates"]
        return (logits * candidates).sum(dim=1) / candidates.sum(dim=1).clamp(min=1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Return the `scores` in training, else their `ranking_logits`, which metrics take for a classifier's."""
        scores = self.scores(batch)
        return scores if self.training else ranking_logits(scores, batch["example_ids"], len(batch["indices"]))

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the `ranking_loss` of the scores."""
        return ranking_loss(outputs, batch["example_ids"], batch["labels"])


def build_ranker(source: Pretrained, task: Task, config: GlueModelConfig, cpu_autocast: bool = False) -> ElectraRanker:
    """Build a ranker with copies of the weights of `source`, head included; random weights with `config.random_init`.

    Raises:
        UserError: the source has no discriminator head, or its weights do not fit.
    """
    sizes = encoder_config(source, config.dropout)
    if config.random_init:
        return ElectraRanker(ElectraForReplacedTokens(sizes), task, cpu_autocast)
    if source.rtd_head is None:
        raise UserError(
            f"model.source {source.name}: has no discriminator head, which ranks the candidates of {task.folder}; "
            "expected an ElectraForPreTraining or a checkpoint of this package; use one, or set wnli=classification"
        )
    with torch.device("meta"):
        model = ElectraForReplacedTokens(sizes)
    load_body(model, source, {f"rtd_head.{name}": tensor.clone() for name, tensor in source.rtd_head.items()})
    return ElectraRanker(model, task, cpu_autocast)
