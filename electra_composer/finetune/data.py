"""GLUE's examples to batches: tokenize, truncate, keep, group by length, pad."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.core import DataSpec
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.workers import loader_workers
from electra_composer.errors import UserError
from electra_composer.finetune.cache import cache_file, file_sha256, read_cache, tokenizer_sha256, write_cache
from electra_composer.finetune.files import HUB, Example, find_file, read_examples
from electra_composer.finetune.sampler import LengthGroupedSampler
from electra_composer.finetune.tasks import Task

PAD_MULTIPLE = 8  # tensor cores want lengths that are multiples of it
TOKENIZER_CHUNK = 4096  # sentences per call of the tokenizer, so that a progress bar can move
CACHE_FORMAT = 1  # to be raised when what is computed from the same settings changes


def training_examples(task: Task, examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """What is trained on: a seeded sample if `limit` asks for one, then the swapped pairs if the task wants them."""
    if limit is not None and limit < len(examples):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
        examples = [examples[i] for i in sorted(order[:limit].tolist())]
    if task.swap_augmentation:
        examples = examples + [Example(example.texts[::-1], example.label) for example in examples]
    return examples


def truncated_lengths(first: int, second: int, budget: int) -> tuple[int, int]:
    """Tokens of A and B that stay when `budget` are allowed: pop from the longer, from B if they are equal.

    Source: `_truncate_seq_pair` of google-research/electra `finetune/classification/classification_tasks.py`.
    """
    while first + second > budget:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


class EncodedExample(NamedTuple):
    """One tokenized example: `position` is its place in the :class:`EncodedExamples`."""

    input_ids: NDArray[np.int32]
    first_length: int
    label: np.generic | None
    position: int


@dataclass
class EncodedExamples(Dataset):
    """Tokenized examples: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, unpadded, one after another.

    Attributes:
        tokens: int32 `[all tokens]`.
        offsets: int64 `[examples + 1]`: example i is `tokens[offsets[i]:offsets[i + 1]]`.
        first_lengths: int64 `[examples]`: tokens of type 0: `[CLS]`, A and its `[SEP]`.
        labels: `[examples]`: class numbers, int64, or targets of a regression (scaled), fp32; None for a test set.
        indices: int64 `[examples]`: by which the server knows the examples of a test set; None elsewhere.
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
        """Tokens of each example, int64 `[examples]`."""
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
    """Read, sample, swap and tokenize one split, or take the outcome of an earlier time from the cache.

    Args:
        split: a key of `task.splits`.
        path: the folder that holds a folder per task, or `hub`.
        max_seq_length: most tokens of an example, special ones included.
        cache_folder: where tokenized files are kept; None: nowhere.
        limit, seed: of :func:`training_examples`; they and the swapped pairs are for `train` alone.
        progress: whether a bar shows how far the tokenizer is.

    Raises:
        UserError: as :func:`read_examples`, :func:`encode` and :func:`write_cache`.
    """
    # What the hub holds is only known by reading it; of a file, its bytes are enough.
    examples = read_examples(task, split, path) if path == HUB else None
    file = None
    if cache_folder is not None:
        settings = _content(task, split, path, examples) | {
            "format": CACHE_FORMAT,
            "labels": task.labels,
            "target_scale": task.target_scale,
            "tokenizer": tokenizer_sha256(tokenizer),
            "max_seq_length": max_seq_length,
            # the seed only draws the sample
            "training": [limit, limit and seed, task.swap_augmentation] if split == "train" else None,
        }
        file = cache_file(cache_folder, f"{task.name}-{split}", settings)
        if (arrays := read_cache(file, {"tokens", "offsets", "first_lengths"})) is not None:
            return _from_arrays(arrays)
    if examples is None:
        examples = read_examples(task, split, path)
    if split == "train":
        examples = training_examples(task, examples, limit, seed)
    encoded = encode(task, examples, tokenizer, max_seq_length, progress)
    if file is not None:
        write_cache(file, _to_arrays(encoded))
    return encoded


def _content(task: Task, split: str, path: str, examples: list[Example] | None) -> dict[str, Any]:
    """The hash of what is read, and how it is read."""
    if examples is not None:
        return {"content": hashlib.sha256(repr(examples).encode()).hexdigest(), "layout": HUB}
    file, layout = find_file(task, split, path)
    return {"content": file_sha256(file), "layout": dataclasses.asdict(layout)}


def _to_arrays(encoded: EncodedExamples) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {name: getattr(encoded, name) for name in ("tokens", "offsets", "first_lengths")}
    if encoded.labels is not None:
        arrays["labels"] = encoded.labels.numpy()
    if encoded.indices is not None:
        arrays["indices"] = encoded.indices
    return arrays


def _from_arrays(arrays: dict[str, NDArray[Any]]) -> EncodedExamples:
    labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    return EncodedExamples(arrays["tokens"], arrays["offsets"], arrays["first_lengths"], labels, arrays.get("indices"))


def encode(
    task: Task,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length: int,
    progress: bool = False,
) -> EncodedExamples:
    """Tokenize and truncate.

    Args:
        max_seq_length: most tokens of an example, special ones included.
        progress: whether a bar shows how far it is.

    Raises:
        UserError: `max_seq_length` that leaves no room for text.
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
        # An empty B leaves a single sentence, as there: two special tokens then, not three.
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
    # None: a bar on a terminal, nothing in a file
    disable = None if progress else True
    with tqdm(total=len(texts), desc=f"tokenizing {name}", unit="ex", leave=False, disable=disable) as bar:
        for start in range(0, len(texts), TOKENIZER_CHUNK):
            chunk = texts[start : start + TOKENIZER_CHUNK]
            # verbose=False: sentences longer than the model's positions are cut below, which needs no warning
            tokens += tokenizer(
                chunk,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            bar.update(len(chunk))
    return tokens


def collate(items: Sequence[EncodedExample], pad_id: int) -> dict[str, Any]:
    """Pad to the longest of the batch, rounded up to a multiple of 8.

    Returns:
        `input_ids`, `token_type_ids` (1: B and its `[SEP]`), `position_ids`, `sequence_ids` (1: token, 0: padding),
        int64 `[rows, length]`; `indices`, int64 `[rows]`: places in the :class:`EncodedExamples`, by which predictions
        are put back into its order; `labels [rows]`, int64 or fp32, unless it is a test set; `num_tokens`, without
        padding, an int.
    """
    arrays, positions = pad_rows([item.input_ids for item in items], pad_id)
    firsts = np.array([item.first_length for item in items])[:, None]
    arrays["token_type_ids"] = arrays["sequence_ids"] * (positions >= firsts)
    arrays["indices"] = np.array([item.position for item in items], dtype=np.int64)
    if items[0].label is not None:
        arrays["labels"] = np.array([item.label for item in items])
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
    batch["num_tokens"] = int(arrays["sequence_ids"].sum())
    return batch


def pad_rows(rows: Sequence[NDArray[np.int32]], pad_id: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """`input_ids`, `position_ids` and `sequence_ids` as :func:`collate` gives them; and 0, 1, 2, …, `[1, length]`."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    positions = np.arange(width)[None, :]
    is_token = positions < lengths[:, None]
    input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    input_ids[is_token] = np.concatenate(rows)
    # Padding stands at position 0, so that rounding up never leaves the position table.
    return {
        "input_ids": input_ids,
        "position_ids": positions * is_token,
        "sequence_ids": is_token.astype(np.int64),
    }, positions


def split_batch(batch: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """Microbatches of at most `rows` rows. Composer's own split warns at every last batch of an epoch."""
    starts = range(0, batch["input_ids"].shape[0], rows)
    return [{k: v[i : i + rows] if isinstance(v, torch.Tensor) else v for k, v in batch.items()} for i in starts]


def build_loader(
    examples: EncodedExamples,
    pad_id: int,
    device_batch_size: int,
    num_workers: int,
    shuffle_seed: int | None,
    pin_memory: bool = False,
) -> DataSpec:
    """Batches for this process.

    Every process has its share; Composer drops what the sampler repeats to make the shares equal before it counts a
    metric, so that evaluation sees every example once on any number of processes.

    Args:
        device_batch_size: examples per batch on this device.
        num_workers: loader processes; padding is cheap, so 0 is right on a CPU and 1 is enough for a GPU.
        shuffle_seed: of the order, which changes every epoch; None: from the longest to the shortest example.
    """
    loader: DataLoader = DataLoader(
        examples,
        batch_size=device_batch_size,
        sampler=LengthGroupedSampler(examples, examples.lengths, device_batch_size, shuffle_seed),
        collate_fn=functools.partial(collate, pad_id=pad_id),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        **loader_workers(num_workers),
    )
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=lambda batch: batch["input_ids"].shape[0],
        get_num_tokens_in_batch=lambda batch: batch["num_tokens"],
    )
