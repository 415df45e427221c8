"""GLUE examples to token ids: sample, swap, tokenize, truncate, cache."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetuning.cache import Arrays, cache_file, file_sha256, read_cache, tokenizer_sha256, write_cache
from electra_composer.finetuning.files import HUB, Example, find_file, read_examples
from electra_composer.finetuning.tasks import Task
from electra_composer.tasks.encoded import EncodedRows
from electra_composer.tasks.tokenization import join, tokenize

ROW_ARRAYS = ("tokens", "offsets", "first_lengths")  # of EncodedRows
CACHE_FORMAT = 1  # increase when the same settings give other arrays


def training_examples(task: Task, examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """Draw a seeded sample of at most `limit` examples, then append the swapped pairs if the task uses them."""
    if limit is not None and limit < len(examples):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        examples = [examples[i] for i in sorted(order[:limit].tolist())]
    if task.swap_augmentation:
        examples = examples + [Example(example.texts[::-1], example.label) for example in examples]
    return examples


def _rows(arrays: Arrays) -> EncodedRows:
    """Return the rows of the arrays of a cache file."""
    per_row = {"labels": arrays["labels"]} if "labels" in arrays else {}
    tokens, offsets, first_lengths = (arrays[name] for name in ROW_ARRAYS)
    return EncodedRows(tokens, offsets, first_lengths, per_row, source=arrays.get("indices"))


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
) -> EncodedRows:
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
        if (arrays := read_cache(cached, set(ROW_ARRAYS))) is not None:
            return _rows(arrays)
    if examples is None:
        examples = read_examples(task, split, path)
    if split == "train":
        examples = training_examples(task, examples, limit, seed)
    encoded = encode(task, examples, tokenizer, max_seq_length, progress)
    if cached is not None:
        test = {} if encoded.source is None else {"indices": encoded.source}
        write_cache(cached, {**{name: getattr(encoded, name) for name in ROW_ARRAYS}, **encoded.per_row, **test})
    return encoded


def encode(
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    progress: bool = False,
) -> EncodedRows:
    """Tokenize and truncate examples.

    The rows have `labels`, class numbers, int64, or scaled regression targets, fp32; those of a test set have none, and
    the examples' numbers on the server, int64 `[examples]`, as `source`.

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
    pieces = tokenize((example.texts for example in examples), columns, tokenizer, task.folder, progress)
    second = pieces[1] if columns == 2 else None
    rows = join(pieces[0], second, max_seq_length, tokenizer.cls_token_id, tokenizer.sep_token_id)
    if examples[0].label is None:
        rows.source = np.array([example.server_index for example in examples], dtype=np.int64)
    else:
        rows.per_row["labels"] = _labels(task, examples)
    return rows


def _labels(task: Task, examples: Sequence[Example]) -> NDArray[Any]:
    """Return class numbers, int64 `[examples]`, or scaled regression targets, fp32."""
    values = [example.label for example in examples]
    if task.is_regression:
        return np.array(values, dtype=np.float32) * np.float32(task.target_scale)
    return np.array(values, dtype=np.int64)
