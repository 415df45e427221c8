"""GLUE examples to token ids: sample, swap, tokenize, truncate, cache."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetuning.cache import cache_file, file_sha256, read_cache, tokenizer_sha256, write_cache
from electra_composer.finetuning.files import HUB, Example, find_file, read_examples
from electra_composer.finetuning.tasks import Task

TOKENIZER_CHUNK = 4096  # sentences per call of the tokenizer, and per step of the progress bar
CACHE_FORMAT = 1  # increase when the same settings give other arrays


def training_examples(task: Task, examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """Draw a seeded sample of at most `limit` examples, then append the swapped pairs if the task uses them."""
    if limit is not None and limit < len(examples):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        examples = [examples[i] for i in sorted(order[:limit].tolist())]
    if task.swap_augmentation:
        examples = examples + [Example(example.texts[::-1], example.label) for example in examples]
    return examples


def truncated_lengths(first: int, second: int, budget: int) -> tuple[int, int]:
    """Return the lengths of A and B truncated to `budget` tokens: pop from the longer, from B if equal.

    Source: `_truncate_seq_pair` of google-research/electra `finetune/classification/classification_tasks.py`.
    """
    while first + second > budget:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


class EncodedExample(NamedTuple):
    """A tokenized example; `position` is its index in the :class:`EncodedExamples`."""

    input_ids: NDArray[np.int32]
    first_length: int
    label: np.generic | None
    position: int


@dataclass
class EncodedExamples(Dataset):
    """Tokenized examples, unpadded and concatenated: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`.

    Attributes:
        tokens: int32 `[all tokens]`.
        offsets: int64 `[examples + 1]`: example i is `tokens[offsets[i]:offsets[i + 1]]`.
        first_lengths: int64 `[examples]`: number of tokens of type 0: `[CLS]`, A and its `[SEP]`.
        labels: `[examples]`: class numbers, int64, or scaled regression targets, fp32; None for a test set.
        indices: int64 `[examples]`: the examples' numbers on the server; None except for a test set.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    first_lengths: NDArray[np.int64]
    labels: torch.Tensor | None
    indices: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.first_lengths)

    def __getitem__(self, index: int) -> EncodedExample:
        input_ids = self.tokens[self.offsets[index] : self.offsets[index + 1]]
        label = None if self.labels is None else self.labels.numpy()[index]
        return EncodedExample(input_ids, self.first_lengths[index], label, index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example, int64 `[examples]`."""
        return np.diff(self.offsets)


def encode_split(
    task: Task,
    split: str,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    cache_folder: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EncodedExamples:
    """Read, sample, swap and tokenize one split, or load the result from the cache.

    Args:
        split: key of `task.splits`.
        path: folder with one folder per task, or `hub`.
        max_seq_length: maximum number of tokens per example, including special tokens.
        cache_folder: folder of the cache; None for no cache.
        limit, seed: see :func:`training_examples`. They and the swapped pairs apply to `train` only.
        progress: show the tokenizer's progress bar.

    Raises:
        UserError: see :func:`read_examples`, :func:`encode` and :func:`write_cache`.
    """
    # A file is identified by its bytes, unread; the content of the hub is only known after reading it.
    examples = read_examples(task, split, path) if path == HUB else None
    cached = None
    if cache_folder is not None:
        # The cache key: any change orphans users' cache files, including a field added to Split or Example.
        if examples is None:
            file, layout = find_file(task, split, path)
            content = {"content": file_sha256(file), "layout": dataclasses.asdict(layout)}
        else:
            content = {"content": hashlib.sha256(repr(examples).encode()).hexdigest(), "layout": HUB}
        settings = content | {
            "format": CACHE_FORMAT,
            "labels": task.labels,
            "target_scale": task.target_scale,
            "tokenizer": tokenizer_sha256(tokenizer),
            "max_seq_length": max_seq_length,
            # Without a limit nothing is drawn, and the seed does not matter.
            "training": [limit, limit and seed, task.swap_augmentation] if split == "train" else None,
        }
        cached = cache_file(cache_folder, f"{task.name}-{split}", settings)
        if (arrays := read_cache(cached, {"tokens", "offsets", "first_lengths"})) is not None:
            labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
            return EncodedExamples(
                arrays["tokens"], arrays["offsets"], arrays["first_lengths"], labels, arrays.get("indices")
            )
    if examples is None:
        examples = read_examples(task, split, path)
    if split == "train":
        examples = training_examples(task, examples, limit, seed)
    encoded = encode(task, examples, tokenizer, max_seq_length, progress)
    if cached is not None:
        write_cache(cached, {name: np.asarray(value) for name, value in vars(encoded).items() if value is not None})
    return encoded


def encode(
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    progress: bool = False,
) -> EncodedExamples:
    """Tokenize and truncate examples.

    Args:
        max_seq_length: maximum number of tokens per example, including special tokens.
        progress: show a progress bar.

    Raises:
        UserError: `max_seq_length` leaves no room for text.
    """
    columns = len(examples[0].texts)
    if max_seq_length < 2 * columns + 1:
        raise UserError(
            f"data.max_seq_length is {max_seq_length}; {task.folder} needs at least {2 * columns + 1}: "
            "the special tokens and one token of each sentence"
        )
    tokens = [_tokenize([e.texts[c] for e in examples], tokenizer, task.folder, progress) for c in range(columns)]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    flat, offsets, first_lengths = array("i"), [0], []
    for pieces in zip(*tokens, strict=True):
        first, second = pieces if columns == 2 else (pieces[0], [])
        # An empty B gives a single sentence with two special tokens, as in google-research/electra.
        keep = truncated_lengths(len(first), len(second), max_seq_length - (3 if second else 2))
        flat.extend([cls, *first[: keep[0]], sep])
        first_lengths.append(keep[0] + 2)
        if second:
            flat.extend([*second[: keep[1]], sep])
        offsets.append(len(flat))
    is_test = examples[0].label is None
    return EncodedExamples(
        np.frombuffer(flat, dtype=np.intc).astype(np.int32),
        np.array(offsets, dtype=np.int64),
        np.array(first_lengths, dtype=np.int64),
        None if is_test else _labels(task, examples),
        np.array([example.server_index for example in examples], dtype=np.int64) if is_test else None,
    )


def _labels(task: Task, examples: Sequence[Example]) -> torch.Tensor:
    values = [example.label for example in examples]
    if task.is_regression:
        return torch.tensor(values, dtype=torch.float32) * task.target_scale
    return torch.tensor(values, dtype=torch.int64)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast, name: str, progress: bool) -> list[list[int]]:
    tokens: list[list[int]] = []
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=len(texts), desc=f"tokenizing {name}", unit="ex", leave=False, disable=disable) as bar:
        for start in range(0, len(texts), TOKENIZER_CHUNK):
            chunk = texts[start : start + TOKENIZER_CHUNK]
            # verbose=False: no warning of sentences longer than the position table, which encode() truncates.
            tokens += tokenizer(
                chunk,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            bar.update(len(chunk))
    return tokens
