"""Layout and metadata of a folder of shards. `folder_writer.py` writes it, `batches/` reads it.

    <out>/meta.json      metadata: tokenizer, length, packing, seed, counts; written last
    <out>/tokenizer/     loadable by `transformers.AutoTokenizer`
    <out>/train/, val/   MDS datasets of rows (columns `input_ids`, `segment_lengths`): an index.json, and a folder of
                         shards for each separately converted part of the text

A row holds at most `max_seq_length` token ids of complete, concatenated examples. `segment_lengths` has two entries per
example: the tokens of A with its `[CLS]` and `[SEP]`, and those of B with its `[SEP]`, or 0.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_composer.vocabulary import special_ids, vocabulary_sha256

FORMAT_VERSION = 1
CONVERTER = "data_prep/convert_owt.py"  # writes such folders
META = "meta.json"
TOKENIZER = "tokenizer"
HASH = "xxh64"  # of every shard, stored in the index; Streaming checks it after a download or decompression


@dataclass
class TokenizerMeta:
    """Identity of the tokenizer that made the ids in the shards."""

    name: str
    vocabulary_sha256: str
    vocab_size: int
    special_ids: dict[str, int]  # by role: pad, cls, sep, mask, and unk if there is one
    files: list[str] = field(default_factory=list)  # in <out>/tokenizer; needed to fetch them from a remote

    @property
    def identity(self) -> tuple[str, dict[str, int]]:
        """Equal for tokenizers that give a text the same ids."""
        return self.vocabulary_sha256, self.special_ids

    @property
    def label(self) -> str:
        """Name, size and short hash, for messages."""
        return f"{self.name} ({self.vocab_size:,} entries, SHA-256 {self.vocabulary_sha256[:8]}…)"


@dataclass
class SplitCounts:
    """Counts of one split."""

    documents: int = 0
    examples: int = 0
    rows: int = 0
    tokens: int = 0  # in the rows, including special tokens
    dropped_tokens: int = 0  # truncated at the ends of segments

    def fill(self, max_seq_length: int) -> float:
        """Fraction of the rows' positions that hold a token."""
        return self.tokens / (self.rows * max_seq_length) if self.rows else 0.0


@dataclass
class SourceCounts:
    """Counts of one source over all splits; skipped items count each time they are read."""

    documents: int = 0  # repetitions included
    text_bytes: int = 0
    tokens: int = 0  # in the rows
    invalid_documents: int = 0  # with invalid UTF-8, decoded as U+FFFD
    short_documents: int = 0  # skipped
    duplicate_documents: int = 0  # skipped
    dropped_lines: int = 0  # skipped
    unreadable_files: int = 0  # skipped from the point where reading failed


@dataclass
class Meta:
    """`meta.json`. It records no time or machine: the same conversion writes the same bytes."""

    tokenizer: TokenizerMeta
    max_seq_length: int
    packing: str  # packed: several examples per row; one: a single example
    seed: int
    conversion: dict[str, Any]  # the other options that determine the content of the shards
    splits: dict[str, SplitCounts]
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # by name
    format_version: int = FORMAT_VERSION
    folder: str = ""  # where it was read from; not in the file

    @property
    def tokenizer_folder(self) -> str:
        """Folder of the tokenizer stored with the shards, for `vocabulary.load_tokenizer`."""
        return os.path.join(self.folder, TOKENIZER)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        del values["folder"]
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, folder: str) -> Meta:
        """Parse `meta.json`. Raises TypeError, KeyError or ValueError for anything that `to_json` would not write."""
        values = json.loads(text)
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version is {values.get('format_version')}; this version reads {FORMAT_VERSION}")
        values["tokenizer"] = TokenizerMeta(**values["tokenizer"])
        values["splits"] = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        values["sources"] = {name: SourceCounts(**counts) for name, counts in values.get("sources", {}).items()}
        return cls(**values, folder=folder)


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> TokenizerMeta:
    return TokenizerMeta(name, vocabulary_sha256(tokenizer), len(tokenizer), special_ids(tokenizer, name))


def id_dtype(vocab_size: int) -> str:
    """Return the smallest dtype of ids that fits a vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"


def is_inside(name: Any) -> bool:
    """Return whether a file name from an untrusted source stays below the folder that it is joined to."""
    if not isinstance(name, str) or not name or name != name.strip() or "\0" in name or "\\" in name:
        return False
    return not os.path.isabs(name) and all(part not in ("", ".", "..") for part in name.split("/"))
