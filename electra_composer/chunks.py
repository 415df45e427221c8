"""What a worker process of the conversion does: documents to tokens to examples, apart for each split."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from electra_composer.examples import Example, ExampleBuilder, Overflow, split_sentences

SPLITS = ("train", "val")
_MAX_LINE = 100_000  # characters that the tokenizer gets at a time of a longer line


class Task(NamedTuple):
    """What a worker needs to know; sent once to each."""

    tokenizer_json: str
    max_seq_length: int
    cls_id: int
    sep_id: int
    lines: str
    overflow: Overflow
    val_fraction: float
    seed: int
    dtype: str


class Part(NamedTuple):
    """The examples that one chunk gives one split; flat arrays, because they travel between processes."""

    documents: int
    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]  # [examples, 2]: length_a and length_b
    dropped_tokens: int

    def examples(self) -> Iterator[Example]:
        ends = np.cumsum(self.lengths.sum(1))
        start = 0
        for end, (length_a, length_b) in zip(ends.tolist(), self.lengths.tolist(), strict=True):
            yield Example(self.ids[start:end], length_a, length_b)
            start = end


_worker: tuple[Task, Tokenizer] | None = None  # of this worker process


def start_worker(task: Task) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    tokenizer = Tokenizer.from_str(task.tokenizer_json)
    tokenizer.encode_special_tokens = True
    _worker = task, tokenizer


def _end_with_parent(parent: int) -> None:
    """A parent that is killed outright cannot end its workers, which would wait for it for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def convert_chunk(first: int, documents: list[str]) -> list[Part]:
    assert _worker is not None
    return convert_documents(*_worker, first, documents)


def convert_documents(task: Task, tokenizer: Tokenizer, first: int, documents: list[str]) -> list[Part]:
    """The examples of some documents, apart for each split.

    Args:
        first: number of the first of them in the whole source; the random draws depend on it.
    """
    parts: list[Part] = []
    in_val = [is_validation(task.seed, number, task.val_fraction) for number in range(first, first + len(documents))]
    for split in SPLITS if task.val_fraction > 0 else SPLITS[:1]:
        chosen = [text for text, val in zip(documents, in_val, strict=True) if val == (split == "val")]
        rng = Random(f"{task.seed} {split} {first}")
        builder = ExampleBuilder(task.max_seq_length, task.cls_id, task.sep_id, rng, task.overflow)
        examples = list(_examples(builder, tokenizer, chosen, task.lines))
        ids = [example.ids for example in examples]
        lengths = [(example.length_a, example.length_b) for example in examples]
        parts.append(
            Part(
                len(chosen),
                np.concatenate(ids).astype(task.dtype) if ids else np.zeros(0, task.dtype),
                np.array(lengths, np.int64).reshape(-1, 2),
                builder.dropped_tokens,
            )
        )
    return parts


def is_validation(seed: int, number: int, fraction: float) -> bool:
    """Whether a document is in the validation split: decided by its number alone, evenly over [0, 1)."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _examples(builder: ExampleBuilder, tokenizer: Tokenizer, documents: list[str], lines: str) -> Iterator[Example]:
    split = [document_lines(document, lines) for document in documents]
    encoded = encode_lines(tokenizer, (line for document in split for line in document))
    for document in split:
        for ids in itertools.islice(encoded, len(document)):
            yield from builder.add_line(ids)
        yield from builder.end_document()


def document_lines(document: str, ends: str) -> list[str]:
    lines = [stripped for line in document.split("\n") if (stripped := line.strip())]
    if ends == "sentence":
        lines = [sentence for line in lines for sentence in split_sentences(line)]
    return lines


def encode_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[list[int] | NDArray[np.int32]]:
    """Token ids of each line, in batches; a line too long for one go is cut at white space and joined again."""
    batch: list[str] = []
    characters = 0
    for line in lines:
        if len(line) > _MAX_LINE:
            yield from _encode(tokenizer, batch)
            batch, characters = [], 0
            pieces = [np.array(_encode(tokenizer, [piece])[0], np.int32) for piece in cut_line(line, _MAX_LINE)]
            yield np.concatenate(pieces)
            continue
        batch.append(line)
        characters += len(line)
        if characters > _MAX_LINE:
            yield from _encode(tokenizer, batch)
            batch, characters = [], 0
    yield from _encode(tokenizer, batch)


def _encode(tokenizer: Tokenizer, lines: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(lines, add_special_tokens=False)]


def cut_line(line: str, length: int) -> Iterator[str]:
    """Pieces of at most `length` characters, cut before white space where there is any."""
    start = 0
    while len(line) - start > length:
        end = start + length
        cut = max(line.rfind(space, start + 1, end) for space in (" ", "\t", "\u3000"))
        end = cut if cut > start else end
        yield line[start:end]
        start = end
    yield line[start:]
