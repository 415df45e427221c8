"""WNLI as a choice among candidates (`wnli: coreference`): data and model; coreference.py finds the candidates.

Source: richarddwang/electra_pytorch `_utils/wsc_trick.py`, for score, loss and decision. Its training examples whose
candidate is wrong give no loss; here they are left out, so that batches are full.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from composer.core import DataSpec
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.workers import loader_workers
from electra_composer.checkpoints.weights import Pretrained
from electra_composer.config import GlueModelConfig
from electra_composer.errors import UserError
from electra_composer.finetune.coreference import Blank, find_blank
from electra_composer.finetune.data import pad_rows, training_examples
from electra_composer.finetune.files import Example, read_examples
from electra_composer.finetune.model import ElectraClassifier, load_body, sizes_of
from electra_composer.finetune.sampler import LengthGroupedSampler
from electra_composer.finetune.tasks import Task
from electra_composer.model.finetuning import ElectraForReplacedTokens

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A sentence with one candidate in the pronoun's place.

    Attributes:
        input_ids: int32, `[CLS] … candidate … [SEP]`.
        start, end: where the candidate is.
    """

    input_ids: NDArray[np.int32]
    start: int
    end: int


class RankedExample(NamedTuple):
    """One example: `rows[0]` has the candidate in question, the others compete with it."""

    rows: tuple[Row, ...]
    label: int | None
    position: int


@dataclass
class RankedExamples(Dataset):
    """Examples as rows to be ranked.

    Attributes:
        labels: int64 `[examples]`, 1 where the candidate in question is right; None for a test set.
        indices: int64 `[examples]`: by which the server knows the examples of a test set; None elsewhere.
    """

    rows: list[tuple[Row, ...]]
    labels: Tensor | None
    indices: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RankedExample:
        return RankedExample(self.rows[index], None if self.labels is None else int(self.labels[index]), index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the longest row of each example, int64 `[examples]`."""
        return np.array([max(len(row.input_ids) for row in rows) for rows in self.rows], dtype=np.int64)


def encode_ranked(
    task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_seq_length: int, train: bool
) -> RankedExamples:
    """Find the candidates and tokenize.

    Args:
        max_seq_length: most tokens of a row; what is farthest from the candidate is cut off.
        train: keep only what gives a loss: the candidate is right, and there are others.

    Raises:
        UserError: a length that leaves no room, or no training example with a pronoun.
    """
    if max_seq_length < 4:
        raise UserError(
            f"data.max_seq_length is {max_seq_length}; {task.folder} needs at least 4: room for a candidate"
        )
    blanks = [find_blank(*example.texts) for example in examples]
    lost = sum(blank is None for blank in blanks)
    if lost:
        log.warning(
            "%s: %d of %d examples have no pronoun that the hypothesis replaces; they are %s",
            task.folder,
            lost,
            len(examples),
            "left out" if train else "judged by the hypothesis alone",
        )
    kept = [
        (example, blank or _whole(*example.texts))
        for example, blank in zip(examples, blanks, strict=True)
        if not train or (blank is not None and blank.others and example.label == 1)
    ]
    if not kept:
        raise UserError(
            f"{task.folder}: no training example with a pronoun to replace; expected sentences as in the official "
            "files, or set wnli=classification"
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
    """Read and encode one split: as `glue_data.encode_split` does for classification, without a cache of so little.

    Raises:
        UserError: as :func:`glue_files.read_examples` and :func:`encode_ranked`.
    """
    examples = read_examples(task, split, path)
    if split == "train":
        examples = training_examples(task, examples, limit, seed)
    return encode_ranked(task, examples, tokenizer, max_seq_length, train=split == "train")


def build_ranking_loader(
    examples: RankedExamples, pad_id: int, device_batch_size: int, num_workers: int, shuffle_seed: int | None
) -> DataSpec:
    """Batches of `device_batch_size` examples, each with all of its rows; otherwise as `glue_data.build_loader`."""
    loader: DataLoader = DataLoader(
        examples,
        batch_size=device_batch_size,
        sampler=LengthGroupedSampler(examples, examples.lengths, device_batch_size, shuffle_seed),
        collate_fn=functools.partial(collate_ranked, pad_id=pad_id),
        persistent_workers=num_workers > 0,
        **loader_workers(num_workers),
    )
    return DataSpec(
        loader,
        split_batch=split_ranked,
        get_num_samples_in_batch=lambda batch: len(batch["indices"]),
        get_num_tokens_in_batch=lambda batch: batch["num_tokens"],
    )


def _whole(premise: str, hypothesis: str) -> Blank:
    """The hypothesis as the candidate, after the premise and alone in its race."""
    return Blank(f"{premise} ", "", hypothesis, ())


def _rows(blank: Blank, tokenizer: PreTrainedTokenizerFast, max_seq_length: int) -> tuple[Row, ...]:
    texts = [blank.before, blank.after, blank.candidate, *blank.others]
    before, after, *candidates = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for candidate in candidates:
        candidate = candidate[: max_seq_length - 2]
        left, right = len(before), len(after)
        while left + right > max_seq_length - 2 - len(candidate):
            if left >= right:
                left -= 1
            else:
                right -= 1
        ids = [
            tokenizer.cls_token_id,
            *before[len(before) - left :],
            *candidate,
            *after[:right],
            tokenizer.sep_token_id,
        ]
        rows.append(Row(np.array(ids, dtype=np.int32), 1 + left, 1 + left + len(candidate)))
    return tuple(rows)


def collate_ranked(items: Sequence[RankedExample], pad_id: int) -> dict[str, Any]:
    """Rows of all examples, one after another, padded to the longest, rounded up to a multiple of 8.

    Returns:
        `input_ids`, `token_type_ids` (0), `position_ids`, `sequence_ids`, `candidates` (1: a token of the candidate),
        int64 `[rows, length]`; `example_ids`, int64 `[rows]`: which example of the batch a row is of, ascending;
        `indices` and, but for a test set, `labels`, int64 `[examples]`; `num_tokens`, an int.
    """
    rows = [row for item in items for row in item.rows]
    arrays, positions = pad_rows([row.input_ids for row in rows], pad_id)
    starts, ends = (np.array([getattr(row, name) for row in rows])[:, None] for name in ("start", "end"))
    arrays |= {
        "token_type_ids": np.zeros_like(arrays["input_ids"]),
        "candidates": ((positions >= starts) & (positions < ends)).astype(np.int64),
        "example_ids": np.repeat(np.arange(len(items)), [len(item.rows) for item in items]),
        "indices": np.array([item.position for item in items], dtype=np.int64),
    }
    if items[0].label is not None:
        arrays["labels"] = np.array([item.label for item in items])
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
    batch["num_tokens"] = int(arrays["sequence_ids"].sum())
    return batch


def split_ranked(batch: dict[str, Any], examples: int) -> list[dict[str, Any]]:
    """Microbatches of at most `examples` examples with all of their rows."""
    parts = []
    for start in range(0, len(batch["indices"]), examples):
        ids = batch["example_ids"]
        here = (ids >= start) & (ids < start + examples)
        part = {
            name: value[start : start + examples] if name in ("indices", "labels") else value[here]
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        parts.append({**part, "example_ids": part["example_ids"] - start, "num_tokens": batch["num_tokens"]})
    return parts


def is_first(example_ids: Tensor) -> Tensor:
    """Booleans `[rows]`: the first row of each example, which has the candidate in question."""
    return torch.cat([example_ids.new_ones(1, dtype=torch.bool), example_ids[1:] != example_ids[:-1]])


def ranking_loss(scores: Tensor, example_ids: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy: of a right candidate "original", of those beside it "replaced".

    Args:
        scores: of the candidates, fp32 `[rows]`; positive means replaced.
        example_ids: integers `[rows]`, ascending.
        labels: integers `[examples]`; those of 0 give no loss, as nothing is known of the others.

    Returns:
        Mean over the rows of an example, then over the examples of label 1; 0 if there is none.
    """
    losses = F.binary_cross_entropy_with_logits(scores, (~is_first(example_ids)).float(), reduction="none")
    sums = losses.new_zeros(len(labels)).index_add(0, example_ids, losses)
    counts = losses.new_zeros(len(labels)).index_add(0, example_ids, torch.ones_like(losses))
    right = (labels == 1).float()
    return (right * sums / counts).sum() / right.sum().clamp(min=1)


def ranking_logits(scores: Tensor, example_ids: Tensor, examples: int) -> Tensor:
    """What stands for a classifier's logits: 0, and how much lower the candidate's score is than the others' lowest.

    A candidate without others must be more likely original than not. `[rows]` → fp32 `[examples, 2]`.
    """
    first = is_first(example_ids)
    others = scores.new_full((examples,), torch.inf).scatter_reduce(0, example_ids[~first], scores[~first], "amin")
    margins = torch.where(torch.isinf(others), 0.0, others) - scores[first]
    return torch.stack([torch.zeros_like(margins), margins], dim=1)


class ElectraRanker(ElectraClassifier):
    """Ranks candidates by the mean of the discriminator's logits over their tokens; its head is the pretrained one."""

    def scores(self, batch: dict[str, Any]) -> Tensor:
        """A batch of :func:`collate_ranked` → fp32 `[rows]`; positive means replaced."""
        logits, candidates = super().forward(batch), batch["candidates"]
        return (logits * candidates).sum(dim=1) / candidates.sum(dim=1).clamp(min=1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """In training the `scores`, which the loss is made of; else their `ranking_logits`, as a classifier's."""
        scores = self.scores(batch)
        return scores if self.training else ranking_logits(scores, batch["example_ids"], len(batch["indices"]))

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """`ranking_loss` of the scores."""
        return ranking_loss(outputs, batch["example_ids"], batch["labels"])


def build_ranker(source: Pretrained, task: Task, config: GlueModelConfig, cpu_autocast: bool = False) -> ElectraRanker:
    """A ranker with a copy of the weights of `source`, head included, or, with `config.random_init`, random ones.

    Raises:
        UserError: a source without the discriminator's head, or weights that do not fit.
    """
    sizes = sizes_of(source, config)
    if config.random_init:
        return ElectraRanker(ElectraForReplacedTokens(sizes), task, cpu_autocast)
    if source.rtd_head is None:
        raise UserError(
            f"model.source {source.name}: has no discriminator's head, which ranks the candidates of {task.folder}; "
            "expected an ElectraForPreTraining or a checkpoint of ours, or set wnli=classification"
        )
    with torch.device("meta"):
        model = ElectraForReplacedTokens(sizes)
    load_body(model, source, {f"rtd_head.{name}": tensor.clone() for name, tensor in source.rtd_head.items()})
    return ElectraRanker(model, task, cpu_autocast)
