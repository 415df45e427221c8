"""Joint head of extractive question answering: the end of an answer given its start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra_composer.model.finetuning import linear_head

HIDDEN = 512  # width of the hidden layers, of google-research/electra
ANSWERABLE_WEIGHT = 0.5  # of the loss of the answerability classifier


class JointHead(nn.Module):
    """Logits of starts, of ends given a start, and of having no answer.

    The hidden states of a token and of the start are concatenated for the end: linear layer, GELU, one logit. The
    classifier reads the state of `[CLS]` and the mean state weighted by the probability of being the start. Weights are
    Xavier-uniform, biases zero. In training the end is given the right start; otherwise a beam of starts is searched.

    Source: `get_prediction_module` of google-research/electra `finetune/qa/qa_tasks.py`, with its flags
    `joint_prediction`, `answerable_classifier` and `answerable_uses_start_logits`. There, the best ends of a beam are
    those among all tokens; here, those with which the answer is valid.

    Args:
        hidden_size: of the encoder.
        beam: number of starts, and of ends per start.
        max_answer_length: tokens.
        classifies: whether questions may have no answer.
    """

    def __init__(self, hidden_size: int, beam: int = 20, max_answer_length: int = 30, classifies: bool = True):
        super().__init__()
        self.beam = beam
        self.max_answer_length = max_answer_length
        self.start = linear_head(hidden_size, 1)
        self.end_dense = linear_head(2 * hidden_size, HIDDEN)
        self.end = linear_head(HIDDEN, 1)
        self.no_answer_dense = linear_head(2 * hidden_size, HIDDEN) if classifies else None
        self.no_answer = linear_head(HIDDEN, 1) if classifies else None

    def forward(
        self, hidden: Tensor, token_type_ids: Tensor, start_positions: Tensor | None, may_start: Tensor | None
    ) -> dict[str, Tensor]:
        """Compute the logits for training, or search for answers.

        Logits are limited to `[CLS]`, the context and its `[SEP]`; those of other tokens are -inf.

        Args:
            hidden: floats `[rows, length, hidden_size]`.
            token_type_ids: `[rows, length]`, 1 for the context and its `[SEP]`.
            start_positions: int64 `[rows]`, the right start; None: search.
            may_start: bool `[rows, length]`, tokens at which an answer may start; read by a search.

        Returns:
            In training `start` and `end`, fp32 `[rows, length]`: the logits. Of a search `starts`, int64, and
            `start_log_probs`, fp32 `[rows, beam]`; `ends`, int64, and `end_log_probs`, fp32 `[rows, beam, beam]`: -inf
            for invalid ones. If the head classifies, `no_answer`, fp32 `[rows]`: the logit of having no answer.
        """
        answer_mask = token_type_ids == 1
        answer_mask[:, 0] = True
        start_logits = self.start(hidden).squeeze(-1).float().masked_fill(~answer_mask, -torch.inf)
        if start_positions is None:
            assert may_start is not None
            outputs = self._search(hidden, answer_mask, start_logits, may_start)
        else:
            rows = torch.arange(len(hidden), device=hidden.device)
            end_logits = self._end_logits(self._token_part(hidden), hidden[rows, start_positions], answer_mask)
            outputs = {"start": start_logits, "end": end_logits}
        if self.no_answer is not None and self.no_answer_dense is not None:
            mean = torch.einsum("rl,rlh->rh", start_logits.softmax(-1).to(hidden.dtype), hidden)
            features = F.gelu(self.no_answer_dense(torch.cat([hidden[:, 0], mean], dim=-1)))
            outputs["no_answer"] = self.no_answer(features).squeeze(-1).float()
        return outputs

    def _token_part(self, hidden: Tensor) -> Tensor:
        """Return the part of the hidden layer that does not depend on the start, `[rows, length, HIDDEN]`."""
        return F.linear(hidden, self.end_dense.weight[:, hidden.shape[-1] :], self.end_dense.bias)

    def _end_logits(self, token_part: Tensor, start: Tensor, answer_mask: Tensor) -> Tensor:
        start_part = F.linear(start, self.end_dense.weight[:, : start.shape[-1]])[:, None]
        logits = self.end(F.gelu(token_part + start_part)).squeeze(-1)
        return logits.float().masked_fill(~answer_mask, -torch.inf)

    def _search(
        self, hidden: Tensor, answer_mask: Tensor, start_logits: Tensor, may_start: Tensor
    ) -> dict[str, Tensor]:
        beam = min(self.beam, hidden.shape[1])
        start_log_probs = start_logits.log_softmax(-1).masked_fill(~may_start, -torch.inf)
        start_log_probs, starts = start_log_probs.topk(beam)
        places = torch.arange(hidden.shape[1], device=hidden.device)
        # The context: neither [CLS] nor [SEP], which is the last token of the mask.
        context = answer_mask & F.pad(answer_mask[:, 1:], (0, 1)) & (places > 0)
        token_part = self._token_part(hidden)
        rows = torch.arange(len(hidden), device=hidden.device)
        found = []
        for start in starts.unbind(1):  # one at a time: all together would take beam times the memory
            log_probs = self._end_logits(token_part, hidden[rows, start], answer_mask).log_softmax(-1)
            length = places - start[:, None] + 1
            valid = context & (length >= 1) & (length <= self.max_answer_length)
            found.append(log_probs.masked_fill(~valid, -torch.inf).topk(beam))
        return {
            "starts": starts,
            "start_log_probs": start_log_probs,
            "ends": torch.stack([indices for _, indices in found], dim=1),
            "end_log_probs": torch.stack([values for values, _ in found], dim=1),
        }


def joint_loss(
    outputs: dict[str, Tensor], start_positions: Tensor, end_positions: Tensor, impossible: Tensor
) -> Tensor:
    """Return the loss of google-research/electra, a mean over rows.

    Args:
        outputs: of :class:`JointHead` in training.
        start_positions, end_positions: int64 `[rows]`.
        impossible: `[rows]`, 1 for questions without an answer; read if the head classifies.
    """
    loss = span_loss(outputs["start"], outputs["end"], start_positions, end_positions)
    if "no_answer" in outputs:
        targets = impossible.to(outputs["no_answer"].dtype)
        loss = loss + ANSWERABLE_WEIGHT * F.binary_cross_entropy_with_logits(outputs["no_answer"], targets)
    return loss


def span_loss(starts: Tensor, ends: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Return half the sum of the cross-entropies of the start and of the end, given logits `[rows, length]`."""
    return (F.cross_entropy(starts, start_positions) + F.cross_entropy(ends, end_positions)) / 2
