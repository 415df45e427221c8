"""WNLI as ranking of candidates (`wnli: coreference`): encoding of the examples.

coreference.py finds the candidates, ranker.py scores them. Training examples with a wrong candidate give no loss in
richarddwang/electra_pytorch (`_utils/wsc_trick.py`); here they are dropped, so that batches are full.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetuning.coreference import Blank, find_blank
from electra_composer.finetuning.data import training_examples
from electra_composer.finetuning.files import Example, read_examples
from electra_composer.finetuning.tasks import Task
from electra_composer.tasks.tokenization import truncated_lengths

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A sentence with one candidate in place of the pronoun.

    Attributes:
        input_ids: int32, `[CLS] … candidate … [SEP]`.
        start, end: token range of the candidate.
    """

    input_ids: NDArray[np.int32]
    start: int
    end: int


class RankedExample(NamedTuple):
    """An example; `rows[0]` has the candidate of the hypothesis, the other rows the competing candidates."""

    rows: tuple[Row, ...]
    label: int | None
    position: int


@dataclass
class RankedExamples(Dataset):
    """Tokenized examples with one row per candidate.

    Attributes:
        labels: int64 `[examples]`, 1 if the candidate of the hypothesis is right; None for a test set.
        source: int64 `[examples]`: the examples' numbers on the server; None except for a test set.
    """

    rows: list[tuple[Row, ...]]
    labels: Tensor | None
    source: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RankedExample:
        return RankedExample(self.rows[index], None if self.labels is None else int(self.labels[index]), index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example's longest row, int64 `[examples]`."""
        return np.array([max(len(row.input_ids) for row in rows) for rows in self.rows], dtype=np.int64)


def encode_ranked(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_seq_length: int, train: bool
) -> RankedExamples:
    """Find candidates and tokenize.

    Args:
        max_seq_length: maximum number of tokens per row; tokens farthest from the candidate are cut off.
        train: keep only examples that give a loss: the candidate is right and has competitors.

    Raises:
        UserError: `max_seq_length` leaves no room, or no training example has a pronoun.
    """
    if max_seq_length < 4:
        raise UserError(
            f"data.max_seq_length is {max_seq_length}; {task.folder} needs at least 4: room for a candidate"
        )
    blanks = [find_blank(*example.texts) for example in examples]
    lost = sum(blank is None for blank in blanks)
    if lost:
        log.warning(
            "%s: %d of %d examples have no pronoun that the hypothesis replaces: %s",
            task.folder,
            lost,
            len(examples),
            "skipping them" if train else "scoring the hypothesis alone",
        )
    # Without a pronoun the hypothesis, after the premise, is the only candidate.
    kept = [
        (example, blank or Blank(f"{example.texts[0]} ", "", example.texts[1], ()))
        for example, blank in zip(examples, blanks, strict=True)
        if not train or (blank is not None and blank.others and example.label == 1)
    ]
    if not kept:
        raise UserError(
            f"{task.folder}: no training example has a pronoun to replace; expected sentences as in the official "
            "files; use those, or set wnli=classification"
        )
    is_test = examples[0].label is None
    return RankedExamples(
        [_rows(blank, tokenizer, max_seq_length) for _, blank in kept],
        None if is_test else torch.tensor([example.label for example, _ in kept], dtype=torch.int64),
        np.array([example.server_index for example, _ in kept], dtype=np.int64) if is_test else None,
    )


def rank_split(
    task: Task,
    split: str,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    limit: int | None = None,
    seed: int = 0,
) -> RankedExamples:
    """Read, sample and encode one split.

    The counterpart of :func:`encode_split` for classification. WNLI is too small to need a cache.

    Raises:
        UserError: see :func:`read_examples` and :func:`encode_ranked`.
    """
    examples = read_examples(task, split, path)
    if split == "train":
        examples = training_examples(task, examples, limit, seed)
    return encode_ranked(task, examples, tokenizer, max_seq_length, train=split == "train")


def _rows(blank: Blank, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> tuple[Row, ...]:
    texts = [blank.before, blank.after, blank.candidate, *blank.others]
    before, after, *candidates = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for candidate in candidates:
        candidate = candidate[: max_seq_length - 2]
        right, left = truncated_lengths(len(after), len(before), max_seq_length - 2 - len(candidate))
        ids = [
            tokenizer.cls_token_id,
            *before[len(before) - left :],
            *candidate,
            *after[:right],
            tokenizer.sep_token_id,
        ]
        rows.append(Row(np.array(ids, dtype=np.int32), 1 + left, 1 + left + len(candidate)))
    return tuple(rows)
