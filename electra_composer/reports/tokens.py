"""Rows as tokens, with the masks, the generator's samples and the discriminator's judgements."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.collation import COLUMNS, collate_rows
from electra_composer.batches.row_reader import Rows
from electra_composer.config import ObjectiveConfig
from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.storage.shard_folder import Meta

LEGEND = """  film            original, and judged original
  [film]          masked; the generator sampled the same word
  [film→movie]    masked; the generator sampled another word
  !film           the discriminator says: replaced. Green: correct; red: wrong; yellow without !: replaced, missed"""
GREEN, RED, YELLOW, DIM, RESET = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"


class Token(NamedTuple):
    """A token of a row with the models' predictions."""

    text: str
    segment: int  # 0: A, 1: B
    example: int  # 1, 2, …
    masked: bool = False
    sample: str | None = None  # the generator's sample; the original without a checkpoint
    replaced: bool = False
    flagged: bool = False  # judged replaced by the discriminator

    def render(self, color: bool) -> str:
        """Format the token as described in :data:`LEGEND`."""
        if self.masked:
            text = f"[{self.text}→{self.sample}]" if self.replaced else f"[{self.text}]"
        else:
            text = self.text
        text = f"!{text}" if self.flagged else text
        if not color:
            return text
        if self.flagged:
            return f"{GREEN if self.replaced else RED}{text}{RESET}"
        if self.replaced:
            return f"{YELLOW}{text}{RESET}"
        return f"{DIM}{text}{RESET}" if text in ("[CLS]", "[SEP]") else text


def annotate_tokens(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, meta: Meta, model: ElectraForPretraining | None, seed: int
) -> list[list[Token]]:
    """Return the tokens of some rows, masked as in training and, given a model, with its samples and judgements."""
    packed = torch.from_numpy(collate_rows(rows, meta.max_seq_length, meta.tokenizer.special_ids["pad"]))
    batch = dict(zip(COLUMNS, packed, strict=True))
    ids, sequence_ids = batch["input_ids"], batch["sequence_ids"]
    generator = torch.Generator().manual_seed(seed)
    if model is None:
        special = tuple(meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep"))
        candidates = masking.maskable(ids, sequence_ids, special)
        probability = ObjectiveConfig().mask_prob
        slots = masking.num_slots(probability, meta.max_seq_length)
        counts = masking.mask_counts(candidates, sequence_ids, probability, slots)
        noise = torch.rand(ids.shape, generator=generator)
        positions, weights = masking.choose_positions(candidates, counts, slots, noise)
        corrupted, flagged = ids, torch.zeros_like(ids, dtype=torch.bool)
    else:
        with torch.no_grad():
            outputs = model(**batch, noise=model.draw_noise(ids, generator))
        positions, weights = outputs["masked_positions"], outputs["masked_weights"]
        corrupted, flagged = outputs["corrupted_ids"], outputs["rtd_logits"] > 0
    masked = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, positions, weights > 0)
    result = []
    for row, length in enumerate((sequence_ids > 0).sum(1).tolist()):
        texts = tokenizer.convert_ids_to_tokens(ids[row, :length].tolist())
        samples = tokenizer.convert_ids_to_tokens(corrupted[row, :length].tolist())
        columns = (batch["token_type_ids"], sequence_ids, masked, corrupted != ids, flagged)
        segments, examples, masks, replaced, flags = (column[row, :length].tolist() for column in columns)
        result.append(list(map(Token, texts, segments, examples, masks, samples, replaced, flags)))
    return result
