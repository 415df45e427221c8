"""Masking of a batch as the objective says: which tokens may be masked, how many are, and the generator's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from electra_composer.config import ObjectiveConfig
from electra_composer.model import masking


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens."""

    pad: int
    cls: int
    sep: int
    mask: int
    unk: int | None = None


class Masked(NamedTuple):
    """Output of :meth:`Masker.mask`. A row has N slots for masked positions."""

    input_ids: Tensor
    """x^masked, integers `[rows, length]`."""
    positions: Tensor
    """m, integers `[rows, N]`, distinct within a row unless drawn with replacement; arbitrary in unused slots."""
    weights: Tensor
    """fp32 `[rows, N]`: 1 for a slot in use, 0 for an unused one."""
    originals: Tensor
    """Ids of the input at `positions`, integers `[rows, N]`."""
    first: Tensor | None
    """First slot of each slot's position, integers `[rows, N]`; None: positions are distinct."""

    def places(self) -> Tensor:
        """True at the masked positions, booleans `[rows, length]`."""
        # An unused slot never has the position of one in use: see choose_positions and choose_with_replacement.
        nowhere = torch.zeros_like(self.input_ids, dtype=torch.bool)
        return nowhere.scatter(1, self.positions, self.weights > 0)


class Masker:
    """Masks batches.

    Args:
        objective: `mask_prob`, `mask_draw` and `mask_style`.
        special_ids: of the tokenizer.
        vocab_size: entries of its vocabulary.
        max_seq_length: tokens per row.

    Attributes:
        slots: number N of slots for masked positions in a row.
    """

    def __init__(self, objective: ObjectiveConfig, special_ids: SpecialIds, vocab_size: int, max_seq_length: int):
        self.objective = objective.resolved()
        self.special_ids = special_ids
        self.vocab_size = vocab_size
        self.slots = masking.num_slots(objective.mask_prob, max_seq_length, objective.mask_draw)

    def candidates(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """True where a token may be masked, `[rows, length]`: not `[CLS]`, `[SEP]`, a literal `[MASK]` or padding.

        With `mask_draw: bernoulli` not `[UNK]` either, as in richarddwang/electra_pytorch.
        """
        special = self.special_ids
        unk = special.unk if self.objective.mask_draw == "bernoulli" else None
        never = (special.cls, special.sep, special.mask, *([] if unk is None else [unk]))
        return masking.maskable(input_ids, sequence_ids, never)

    def counts(self, input_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        """Number of slots that will be used in each row, integers `[rows]`; does not depend on the noise.

        With `mask_draw: bernoulli` they are random numbers that depend on the tokens of the batch and their order, so
        that a resumed run draws the same, and a thread that loads batches draws nothing from the state of training.
        Rows of another batch have other counts: draw them for the complete batch, and pass them to :meth:`mask`.
        """
        objective, candidates = self.objective, self.candidates(input_ids, sequence_ids)
        if objective.mask_draw == "bernoulli":
            places = torch.arange(1, input_ids.numel() + 1, device=input_ids.device)
            generator = torch.Generator(input_ids.device)
            generator.manual_seed(int((input_ids.flatten() * places).sum()))
            return masking.bernoulli_counts(candidates, objective.mask_prob, self.slots, generator)
        return self._fixed_counts(candidates, sequence_ids)

    def _fixed_counts(self, candidates: Tensor, sequence_ids: Tensor) -> Tensor:
        repeats = self.objective.mask_draw == "with_replacement"
        return masking.mask_counts(candidates, sequence_ids, self.objective.mask_prob, self.slots, repeats)

    def mask(
        self,
        input_ids: Tensor,
        sequence_ids: Tensor,
        counts: Tensor | None,
        position_noise: Tensor,
        replace_noise: Tensor,
        random_noise: Tensor,
    ) -> Masked:
        """x^masked = REPLACE(x, m, [MASK]), with new positions m in every forward (paper, section 2).

        Args:
            input_ids, sequence_ids: integers `[rows, length]`.
            counts: output of :meth:`counts` for these rows, integers `[rows]`, read with `mask_draw: bernoulli`; None:
                the position noise decides for each token whether it is masked.
            position_noise: uniform numbers that choose the positions, fp32 `[rows, length]`.
            replace_noise, random_noise: see :func:`masking.mask_tokens`, fp32 `[rows, N]`.
        """
        objective, candidates, first = self.objective, self.candidates(input_ids, sequence_ids), None
        if objective.mask_draw != "bernoulli":
            counts = self._fixed_counts(candidates, sequence_ids)
        elif counts is None:
            counts = masking.bernoulli_counts_of(position_noise, candidates, objective.mask_prob, self.slots)
        if objective.mask_draw == "with_replacement":
            positions, weights = masking.choose_with_replacement(candidates, counts, self.slots, position_noise)
            first, replace_noise = masking.merge_repeats(positions, replace_noise)
            random_noise = random_noise.gather(1, first)
        else:
            positions, weights = masking.choose_positions(candidates, counts, self.slots, position_noise)
        originals = input_ids.gather(1, positions)
        style, mask_id = str(objective.mask_style), self.special_ids.mask
        tokens = masking.mask_tokens(originals, weights, style, mask_id, self.vocab_size, replace_noise, random_noise)
        return Masked(input_ids.scatter(1, positions, tokens), positions, weights, originals, first)
