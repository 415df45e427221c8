"""GLUE from its TSV files or the hub to batches: read, tokenize, truncate, pad.

The reader is strict where the files are: no quoting, a byte-order mark where there is one, a header where the task's
row says so. What does not fit is reported with its file and line instead of being skipped.
"""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.glue_tasks import Split, Task

HUB = "hub"  # data.path that means the hub instead of a folder
HUB_DATASET = "nyu-mll/glue"
PAD_MULTIPLE = 8  # tensor cores want lengths that are multiples of it
TOKENIZER_CHUNK = 4096  # sentences per call of the tokenizer, so that a progress bar can move


class Example(NamedTuple):
    """One or two sentences and their label: a class's number, a regression's score as written, None in a test file."""

    texts: tuple[str, ...]
    label: int | float | None


def read_examples(task: Task, split: str, path: str) -> list[Example]:
    """All examples of `train`, `dev` or `test`, in the order of the file.

    Args:
        path: the folder that holds a folder per task, or `hub`.

    Raises:
        UserError: folder or file missing, hub out of reach, a missing column, a row of another width, an unknown label.
    """
    row = task.splits[split]
    examples = read_hub(task, row) if path == HUB else read_tsv(task, row, path)
    if not examples:
        raise UserError(f"{task.folder} {split}: no examples in {path}; expected at least one")
    return examples


def read_tsv(task: Task, split: Split, path: str) -> list[Example]:
    """Read one file of the official download; see :func:`read_examples`."""
    file = os.path.join(path, task.folder, split.file)
    if not os.path.isdir(path):
        raise UserError(f"data.path {path}: no such folder; expected one with {task.folder}/{split.file}, or 'hub'")
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file; data.path must hold {task.folder}/{split.file} for task {task.name}")
    rows: list[tuple[int, list[str]]] = []
    try:
        # utf-8-sig: MRPC's files begin with a byte-order mark. No quoting: sentences hold bare quotation marks.
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows.extend((reader.line_num, row) for row in reader if row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: after line {len(rows)}: {error}; expected UTF-8 text, tab between columns") from error
    if not rows:
        raise UserError(f"{file}: the file is empty")
    names: list[str] | None = rows.pop(0)[1] if split.has_header else None
    width = len(names) if names is not None else split.width
    positions = [_position(column, names, file) for column in split.texts]
    label_position = None if split.label is None else _position(split.label, names, file)
    examples = []
    for line, row in rows:
        if len(row) != width:
            raise UserError(
                f"{file}:{line}: {len(row)} columns; expected {width}"
                + (f" ({', '.join(names)})" if names else f", without a header, for {task.folder}")
            )
        label = None if label_position is None else _parse_label(task, row[label_position], f"{file}:{line}")
        examples.append(Example(tuple(row[position] for position in positions), label))
    return examples


def read_hub(task: Task, split: Split) -> list[Example]:
    """Read one split of `nyu-mll/glue` from the Hugging Face hub, or its cache; see :func:`read_examples`."""
    if not task.on_hub:
        raise UserError(f"data.path is hub, but {task.name} is not on it; give the folder that synthetic.py wrote")
    # Here, because it takes a second that a folder of files need not wait for.
    import datasets

    try:
        rows = datasets.load_dataset(HUB_DATASET, task.name, split=split.hub)
    except Exception as error:  # the hub's client raises a dozen kinds, none of which the person can mend in code
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path is hub, but {HUB_DATASET} ({task.name}, {split.hub}) cannot be read: {reason}; "
            "check the connection, or give the folder of the TSV files"
        ) from error
    where = f"{HUB_DATASET} {task.name} {split.hub}"
    wanted = [*task.hub_texts, "label"]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise UserError(f"{where}: no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
    columns = [rows[column] for column in task.hub_texts]
    labels: list[int | float | None] = [None] * len(rows)
    if split.label is not None:
        labels = [
            _check_score(task, float(label), f"{where} row {i}") if task.is_regression else int(label)
            for i, label in enumerate(rows["label"])
        ]
    return [Example(tuple(texts), label) for *texts, label in zip(*columns, labels, strict=True)]


def _position(column: str | int, names: list[str] | None, file: str) -> int:
    if isinstance(column, int):
        return column
    assert names is not None
    if column not in names:
        raise UserError(f"{file}:1: no column {column!r} in the header; found {', '.join(map(repr, names))}")
    return names.index(column)


def _parse_label(task: Task, text: str, where: str) -> int | float:
    if not task.is_regression:
        if text not in task.labels:
            raise UserError(f"{where}: label {text!r}; expected one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError as error:
        raise UserError(f"{where}: label {text!r} is not a number; expected one from {task.score_range}") from error
    return _check_score(task, score, where)


def _check_score(task: Task, score: float, where: str) -> float:
    assert task.score_range is not None
    low, high = task.score_range
    if not low <= score <= high:
        raise UserError(f"{where}: score {score} is outside of {low:g} to {high:g}")
    return score


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


@dataclass
class EncodedExamples(Dataset):
    """Tokenized examples: `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, unpadded.

    Attributes:
        input_ids: token ids of each example.
        first_lengths: tokens of each example that are of type 0: `[CLS]`, A and its `[SEP]`.
        labels: class numbers, or targets of a regression (scaled); None for a test set.
    """

    input_ids: list[list[int]]
    first_lengths: list[int]
    labels: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[list[int], int, torch.Tensor | None]:
        return self.input_ids[index], self.first_lengths[index], None if self.labels is None else self.labels[index]


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
    cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    input_ids, first_lengths = [], []
    for pieces in zip(*tokens, strict=True):
        first, second = pieces if columns == 2 else (pieces[0], [])
        # An empty B leaves a single sentence, as there: two special tokens then, not three.
        keep = truncated_lengths(len(first), len(second), max_seq_length - (3 if second else 2))
        head = cls + first[: keep[0]] + sep
        input_ids.append(head + second[: keep[1]] + sep if second else head)
        first_lengths.append(len(head))
    labels = None
    if examples[0].label is not None:
        values = [example.label for example in examples]
        labels = torch.tensor(values, dtype=torch.float32 if task.is_regression else torch.int64)
        if task.is_regression:
            labels = labels * task.target_scale
    return EncodedExamples(input_ids, first_lengths, labels)


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast, name: str, progress: bool) -> list[list[int]]:
    tokens: list[list[int]] = []
    # None: a bar on a terminal, nothing in a file
    disable = None if progress else True
    with tqdm(total=len(texts), desc=f"tokenizing {name}", unit="ex", leave=False, disable=disable) as bar:
        for start in range(0, len(texts), TOKENIZER_CHUNK):
            chunk = texts[start : start + TOKENIZER_CHUNK]
            # verbose=False: sentences longer than the model's positions are cut below, which needs no warning
            tokens += tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            bar.update(len(chunk))
    return tokens


def collate(items: list[tuple[list[int], int, torch.Tensor | None]], pad_id: int) -> dict[str, Any]:
    """Pad to the longest of the batch, rounded up to a multiple of 8.

    Returns:
        `input_ids`, `token_type_ids` (1: B and its `[SEP]`), `position_ids`, `sequence_ids` (1: token, 0: padding),
        int64 `[rows, length]`; `labels [rows]`, int64 or fp32, unless it is a test set; `num_tokens`, without padding,
        an int.
    """
    lengths = torch.tensor([len(ids) for ids, _, _ in items])
    longest = int(lengths.max())
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    positions = torch.arange(width)[None, :]
    is_token = positions < lengths[:, None]
    firsts = torch.tensor([first for _, first, _ in items])
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _, _ in items]),
        "token_type_ids": (is_token & (positions >= firsts[:, None])).long(),
        # Padding stands at position 0, so that rounding up never leaves the position table.
        "position_ids": positions * is_token,
        "sequence_ids": is_token.long(),
        "num_tokens": int(lengths.sum()),
    }
    if items[0][2] is not None:
        batch["labels"] = torch.stack([label for _, _, label in items if label is not None])
    return batch


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
        shuffle_seed: of the order, which changes every epoch; None keeps the order of the file.
    """
    shuffle = shuffle_seed is not None
    loader: DataLoader = DataLoader(
        examples,
        batch_size=device_batch_size,
        sampler=dist.get_sampler(examples, shuffle=shuffle, seed=shuffle_seed or 0),
        collate_fn=functools.partial(collate, pad_id=pad_id),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
    return DataSpec(
        loader,
        split_batch=split_batch,
        get_num_samples_in_batch=lambda batch: batch["input_ids"].shape[0],
        get_num_tokens_in_batch=lambda batch: batch["num_tokens"],
    )
