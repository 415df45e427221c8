"""Rows as tokens, with the masks, the generator's samples and the verdicts of the network that is pretrained."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.collation import COLUMNS, collate_rows
from electra_composer.batches.row_reader import Rows
from electra_composer.config import ObjectiveConfig
from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.storage.shard_folder import Meta

LOGITS_AT_ONCE = 1 << 24
"""Logits over the vocabulary that are computed together: 64 MiB."""

GREEN, RED, YELLOW, DIM, RESET = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
COLORS = {"right": GREEN, "wrong": RED, "missed": YELLOW}

_SAMPLED = """  [film]          masked; the generator sampled the same word
  [film→movie]    masked; the generator sampled another word"""
_COLORS = "Green: correct; red: wrong; yellow without !: "
_PREDICTED = """  [film→movie✓]   the generator sampled another word, and the discriminator predicts the original. Green
  [film→movie⇒it] the discriminator predicts another word than the original. Red"""

LEGENDS = {
    "electra": f"""  film            original, and judged original
{_SAMPLED}
  !film           the discriminator says: replaced. {_COLORS}replaced, missed""",
    "electra_15": f"""  film            original; not judged, since this objective is of masked positions alone
{_SAMPLED}
  ![film→movie]   the discriminator says: replaced. {_COLORS}replaced, missed""",
    "electric": f"""  film            of the text, and judged so
{_SAMPLED}; both are noise
  !film           the discriminator says: noise (its probability is above 1/2). {_COLORS}noise, missed
  !film{{2.5}}      energy of the token there, about its negative log probability; of noise and of what is judged so""",
    "mlm": """  film            original
  [film✓]         masked, and the network predicts the original. Green
  [film⇒movie]    masked, and it predicts another word. Red""",
    "replace_mlm": f"""  film            original; not predicted
  [film✓]         masked; the generator sampled the same word, and the discriminator predicts it. Green
{_PREDICTED}""",
    "all_tokens_mlm": f"""  film            original, and left so by the discriminator
  film⇒movie      original, and the discriminator predicts another word. Red
  [film✓]         masked; the generator sampled the same word, and the discriminator predicts it. Green
{_PREDICTED}""",
}
"""What :meth:`Token.render` writes, by `objective.kind`."""
LEGEND_WITHOUT_MODEL = """  film            original
  [film]          masked"""


class Token(NamedTuple):
    """A token of a row with the models' predictions."""

    text: str
    segment: int  # 0: A, 1: B
    example: int  # 1, 2, …
    masked: bool = False
    sample: str | None = None  # the generator's sample, elsewhere the original; None without a generator
    replaced: bool = False  # what is to be detected: another token than the original; electric: noise
    flagged: bool = False  # judged replaced by the discriminator
    prediction: str | None = None  # of an objective that predicts tokens, where it does
    energy: float | None = None  # of the sample; electric

    @property
    def verdict(self) -> Literal["right", "wrong", "missed"] | None:
        """How the verdict on this token is; None: an original that is left alone, or no verdict."""
        if self.prediction is not None:
            if self.prediction != self.text:
                return "wrong"
            return "right" if self.masked else None
        if self.flagged:
            return "right" if self.replaced else "wrong"
        return "missed" if self.replaced else None

    def describe(self) -> str:
        """Say in words what :meth:`render` says by marks."""
        parts = []
        if self.masked:
            parts.append("masked" if self.sample is None else f"masked, the generator put {self.sample}")
        if self.prediction is not None:
            parts.append(f"predicted {self.prediction}")
        elif self.masked or self.flagged:
            parts.append(f"judged {'replaced' if self.flagged else 'original'}")
        if self.energy is not None:
            parts.append(f"energy {self.energy:.1f}")
        return f"{self.text}: {'; '.join(parts)}" if parts else self.text

    def render(self, color: bool) -> str:
        """Format the token as described in :data:`LEGENDS`."""
        text = self.text
        if self.masked and self.sample not in (None, self.text):
            text += f"→{self.sample}"
        if self.verdict is not None and self.prediction is not None:
            text += "✓" if self.prediction == self.text else f"⇒{self.prediction}"
        text = f"[{text}]" if self.masked else text
        text = f"!{text}" if self.flagged else text
        if self.energy is not None and (self.masked or self.flagged):
            text += f"{{{self.energy:.1f}}}"
        if not color:
            return text
        if self.verdict is not None:
            return f"{COLORS[self.verdict]}{text}{RESET}"
        return f"{DIM}{text}{RESET}" if text in ("[CLS]", "[SEP]") else text


class _Marks(NamedTuple):
    """The fields of :class:`Token` of a batch; tensors `[rows, length]`."""

    masked: Tensor
    samples: Tensor | None
    replaced: Tensor
    flagged: Tensor
    predictions: Tensor | None = None  # ids; negative: none
    energies: Tensor | None = None


def legend_of(model: ElectraForPretraining | None) -> str:
    """Return the legend of the tokens that :func:`annotate_tokens` returns for a model."""
    return LEGEND_WITHOUT_MODEL if model is None else LEGENDS[model.objective.kind]


def annotate_tokens(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, meta: Meta, model: ElectraForPretraining | None, seed: int
) -> list[list[Token]]:
    """Return the tokens of some rows, masked as in training and, given a model, with its samples and verdicts.

    Args:
        rows: at most a few thousand; a model takes all of them at once.
        tokenizer, meta: of the shards.
        model: of any objective.
        seed: of masks and samples.
    """
    packed = torch.from_numpy(collate_rows(rows, meta.max_seq_length, meta.tokenizer.special_ids["pad"]))
    batch = dict(zip(COLUMNS, packed, strict=True))
    ids, sequence_ids = batch["input_ids"], batch["sequence_ids"]
    generator = torch.Generator().manual_seed(seed)
    if model is None:
        marks = _masks(ids, sequence_ids, meta, generator)
    else:
        marks = _verdicts(model, batch, model.draw_noise(ids, generator))

    def texts_of(found: Tensor | None, row: int, length: int) -> list[str | None]:
        if found is None:
            return [None] * length
        wanted = found[row, :length].tolist()
        texts = tokenizer.convert_ids_to_tokens([max(index, 0) for index in wanted])
        return [text if index >= 0 else None for text, index in zip(texts, wanted, strict=True)]

    result = []
    for row, length in enumerate((sequence_ids > 0).sum(1).tolist()):
        texts = texts_of(ids, row, length)
        samples, predictions = (texts_of(found, row, length) for found in (marks.samples, marks.predictions))
        columns = (batch["token_type_ids"], sequence_ids, marks.masked, marks.replaced, marks.flagged)
        segments, examples, masks, replaced, flags = (column[row, :length].tolist() for column in columns)
        energies = [None] * length if marks.energies is None else marks.energies[row, :length].tolist()
        fields = (texts, segments, examples, masks, samples, replaced, flags, predictions, energies)
        result.append([Token(*values) for values in zip(*fields, strict=True)])
    return result


def _masks(ids: Tensor, sequence_ids: Tensor, meta: Meta, generator: torch.Generator) -> _Marks:
    """Mask a batch as training does by default."""
    special = tuple(meta.tokenizer.special_ids[role] for role in ("pad", "cls", "sep"))
    candidates = masking.maskable(ids, sequence_ids, special)
    probability = ObjectiveConfig().mask_prob
    slots = masking.num_slots(probability, meta.max_seq_length)
    counts = masking.mask_counts(candidates, sequence_ids, probability, slots)
    noise = torch.rand(ids.shape, generator=generator)
    positions, weights = masking.choose_positions(candidates, counts, slots, noise)
    nowhere = torch.zeros_like(ids, dtype=torch.bool)
    return _Marks(nowhere.scatter(1, positions, weights > 0), ids, nowhere, nowhere)


@torch.no_grad()
def _verdicts(model: ElectraForPretraining, batch: dict[str, Tensor], noise: Tensor) -> _Marks:
    """Run the forward of an objective, and read its outputs for inspection."""
    outputs = model(**batch, noise=noise)
    corrupted, nowhere = outputs["corrupted_ids"], torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    masked = nowhere.scatter(1, outputs["masked_positions"], outputs["masked_weights"] > 0)
    if "rtd_logits" in outputs:
        flagged = (outputs["rtd_logits"] > 0) & outputs["judged"]
        return _Marks(masked, corrupted, outputs["replaced"], flagged, energies=outputs.get("energies"))
    predictions = predicted_ids(model, outputs)
    if model.objective.kind == "mlm":  # no generator: the masked positions hold [MASK], at times a word
        return _Marks(masked, None, nowhere, nowhere, predictions)
    return _Marks(masked, corrupted, corrupted != batch["input_ids"], nowhere, predictions)


@torch.no_grad()
def predicted_ids(model: ElectraForPretraining, outputs: dict[str, Tensor]) -> Tensor:
    """Return the tokens that the network predicts, from the output of a forward of an objective that predicts tokens.

    With a copy mechanism that is the input token where copying is more probable than not, as in the metrics. The
    logits over the vocabulary are computed for some positions at a time.

    Returns:
        Ids, integers `[rows, length]`; -1 where nothing is predicted.
    """
    features, places, corrupted = outputs["lm_features"], outputs["lm_positions"], outputs["corrupted_ids"]
    copy_logits = outputs.get("copy_logits")
    needed = outputs["masked_weights"] > 0 if copy_logits is None else copy_logits <= 0
    row, slot = needed.nonzero(as_tuple=True)
    parts = features[row, slot].split(max(1, LOGITS_AT_ONCE // model.vocab_size))
    predicted = torch.full_like(corrupted, -1) if copy_logits is None else corrupted.clone()
    predicted[row, places[row, slot]] = torch.cat([model.lm_logits(part).argmax(-1) for part in parts])
    return predicted
