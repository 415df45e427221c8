"""Pseudo-log-likelihoods: the log probability of each token of a text given all its other tokens, and their sum.

* `objective.kind: electric`: -E(x)_t of all tokens by one forward (Clark et al., arXiv 2012.08561, sections 2.1 and 4).
* `objective.kind: mlm`: log p(x_t | x with [MASK] at t), exactly, by one forward per token (Salazar et al. 2020, arXiv
  1910.14659, section 2.1).

In both, `[CLS]` and `[SEP]` are context and not part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.electric import ElectricForPretraining
from electra_composer.model.kernels.attention import pattern_of
from electra_composer.model.networks import at

Texts = Sequence[Sequence[int]]
"""Ids of the tokens of each text, without `[CLS]` and `[SEP]`."""


def pseudo_log_likelihoods(model: ElectraForPretraining, texts: Texts, batch_size: int) -> list[list[float]]:
    """Compute log p(x_t | x without t) of every token of some texts, fastest for texts of similar lengths.

    Args:
        model: of one of :data:`KINDS`, in evaluation mode.
        texts: at most as long as the positions of the model.
        batch_size: rows of a forward: texts, or copies of them with one token masked.

    Returns:
        For each text a number per token. Those of Electric are up to log Z, which training brings close to 0.
    """
    return KINDS[model.objective.kind](model, texts, batch_size)


def _electric(model: ElectraForPretraining, texts: Texts, batch_size: int) -> list[list[float]]:
    assert isinstance(model, ElectricForPretraining)
    found: list[list[float]] = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        scores = model.log_likelihoods(*_batch(model, part)).tolist()
        found += [row[1 : 1 + len(text)] for row, text in zip(scores, part, strict=True)]
    return found


@torch.no_grad()
def _masked_lm(model: ElectraForPretraining, texts: Texts, batch_size: int) -> list[list[float]]:
    assert model.lm_head is not None
    found: list[list[float]] = [[] for _ in texts]
    masks = [(number, place) for number, text in enumerate(texts) for place in range(len(text))]
    for start in range(0, len(masks), batch_size):
        part = masks[start : start + batch_size]
        ids, types, positions, sequences = _batch(model, [texts[number] for number, _ in part])
        places = torch.tensor([[place + 1] for _, place in part], device=ids.device)
        originals = ids.gather(1, places)
        masked = ids.scatter(1, places, model.special_ids.mask)
        hidden = model.encode(masked, types, positions, pattern_of(sequences, model.attention_path))
        logits = model.lm_logits(model.lm_head(at(hidden, places))).squeeze(1)
        scores = logits.log_softmax(-1).gather(1, originals).squeeze(1)
        for (number, _), score in zip(part, scores.tolist(), strict=True):
            found[number].append(score)
    return found


KINDS: dict[str, Callable[[ElectraForPretraining, Texts, int], list[list[float]]]] = {
    "electric": _electric,
    "mlm": _masked_lm,
}
"""How the texts are scored, by `objective.kind`."""


def _batch(model: ElectraForPretraining, texts: Texts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `input_ids`, `token_type_ids`, `position_ids` and `sequence_ids` of `[CLS] text [SEP]`, padded."""
    special = model.special_ids
    rows = [torch.tensor([special.cls, *text, special.sep]) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=special.pad)
    lengths = torch.tensor([len(row) for row in rows])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    tokens = positions < lengths[:, None]
    device = next(model.parameters()).device
    return ids.to(device), torch.zeros_like(ids).to(device), (positions * tokens).to(device), tokens.long().to(device)
