"""Turn documents into examples, one chunk at a time and separately for each split."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from electra_composer.corpus.documents import Document
from electra_composer.corpus.examples import Example, ExampleBuilder, Overflow, split_sentences

SPLITS = ("train", "val")
_MAX_LINE = 100_000  # characters tokenized at a time; longer lines are cut
CHUNK_CHARACTERS = 1 << 20  # of text tokenized and held at a time
CHUNK_DOCUMENTS = 4096


class EncodingSettings(NamedTuple):
    """Tokenizer and options that determine the examples of a document."""

    tokenizer_json: str
    max_seq_length: int
    cls_id: int
    sep_id: int
    lines: str
    overflow: Overflow
    val_fraction: float
    seed: int
    dtype: str  # of the ids in the shards

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS if self.val_fraction > 0 else SPLITS[:1]

    def tokenizer(self) -> Tokenizer:
        """Return a tokenizer that encodes special tokens in the text, such as "[MASK]", as plain text."""
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.encode_special_tokens = True
        return tokenizer


class Examples(NamedTuple):
    """Examples of one chunk and split, as flat arrays, which take less memory than one object per example."""

    documents: int
    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]  # [examples, 2]: length_a and length_b
    dropped_tokens: int
    split_hashes: tuple[float, ...]  # of the documents that have tokens, see `split_hash`

    def examples(self) -> Iterator[Example]:
        ends = np.cumsum(self.lengths.sum(1))
        start = 0
        for end, (length_a, length_b) in zip(ends.tolist(), self.lengths.tolist(), strict=True):
            yield Example(self.ids[start:end], length_a, length_b)
            start = end


def group_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into chunks that are large enough to tokenize efficiently."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def convert_documents(
    settings: EncodingSettings, tokenizer: Tokenizer, name: str, documents: list[Document]
) -> list[Examples]:
    """Return the examples of a chunk of documents for each split.

    Args:
        name: of the chunk; seeds the random draws.
    """
    found: list[Examples] = []
    hashes = [split_hash(settings.seed, document.digest) for document in documents]
    for split in settings.splits:
        chosen = [
            (document.text, value)
            for document, value in zip(documents, hashes, strict=True)
            if (value < settings.val_fraction) == (split == "val")
        ]
        rng = Random(f"{settings.seed} {split} {name}")
        builder = ExampleBuilder(settings.max_seq_length, settings.cls_id, settings.sep_id, rng, settings.overflow)
        by_document = list(_build_examples(builder, tokenizer, [text for text, _ in chosen], settings.lines))
        examples = list(itertools.chain.from_iterable(by_document))
        ids = [example.ids for example in examples]
        lengths = [(example.length_a, example.length_b) for example in examples]
        found.append(
            Examples(
                len(chosen),
                np.concatenate(ids).astype(settings.dtype) if ids else np.zeros(0, settings.dtype),
                np.array(lengths, np.int64).reshape(-1, 2),
                builder.dropped_tokens,
                tuple(value for (_, value), part in zip(chosen, by_document, strict=True) if part),
            )
        )
    return found


def is_validation(seed: int, digest: int, fraction: float) -> bool:
    """Return whether a document is in the validation split; copies of a text are always in the same split."""
    return split_hash(seed, digest) < fraction


def split_hash(seed: int, digest: int) -> float:
    """Return the number in [0, 1) that decides the split of a document."""
    return hash_fraction(f"{seed} {digest}")


def hash_fraction(key: str) -> float:
    """Hash a key to a number uniformly distributed over [0, 1)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _build_examples(
    builder: ExampleBuilder, tokenizer: Tokenizer, documents: list[str], lines: str
) -> Iterator[list[Example]]:
    """Yield the examples of each document; none if it has no tokens."""
    split = [document_lines(document, lines) for document in documents]
    encoded = encode_lines(tokenizer, (line for document in split for line in document))
    for document in split:
        examples: list[Example] = []
        for ids in itertools.islice(encoded, len(document)):
            examples += builder.add_line(ids)
        yield [*examples, *builder.end_document()]


def document_lines(document: str, ends: str) -> list[str]:
    """Split a document into lines, or into sentences if `ends` is "sentence"; blank ones are left out."""
    lines = [stripped for line in document.split("\n") if (stripped := line.strip())]
    if ends == "sentence":
        lines = [sentence for line in lines for sentence in split_sentences(line)]
    return lines


def encode_lines(tokenizer: Tokenizer, lines: Iterable[str]) -> Iterator[list[int] | NDArray[np.int32]]:
    """Yield the token ids of each line, tokenized in batches; long lines are tokenized in pieces cut at whitespace."""
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
    """Cut a line into pieces of at most `length` characters, before whitespace where there is any."""
    start = 0
    while len(line) - start > length:
        end = start + length
        cut = max(line.rfind(space, start + 1, end) for space in (" ", "\t", "\u3000"))
        end = cut if cut > start else end
        yield line[start:end]
        start = end
    yield line[start:]
