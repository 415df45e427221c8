"""What a folder of shards holds and what describes it. `folder_writer.py` writes it, `shards.py` reads it.

    <out>/meta.json      what the shards are: tokenizer, length, packing, seed, counts; written last
    <out>/tokenizer/     a folder that `transformers.AutoTokenizer` loads
    <out>/train/, val/   MDS data sets of rows (columns `input_ids`, `segment_lengths`): an index.json, and a folder of
                         shards for each part of the text that was converted on its own

A row is at most `max_seq_length` token ids, whole examples one after another; `segment_lengths` has two entries for
each example, the tokens of A with its `[CLS]` and `[SEP]`, and those of B with its `[SEP]`, or 0.
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
META = "meta.json"
TOKENIZER = "tokenizer"
HASH = "xxh64"  # of every shard, in its index: Streaming checks it when it downloads or decompresses one


@dataclass
class TokenizerMeta:
    """What the ids in the shards mean."""

    name: str
    vocabulary_sha256: str
    vocab_size: int
    special_ids: dict[str, int]  # by role: pad, cls, sep, mask, and unk where there is one
    files: list[str] = field(default_factory=list)  # in <out>/tokenizer, so that a remote one can be fetched


@dataclass
class SplitCounts:
    """What one split holds."""

    documents: int = 0
    examples: int = 0
    rows: int = 0
    tokens: int = 0  # in the rows, special tokens included
    dropped_tokens: int = 0  # cut off at the ends of segments

    def fill(self, max_seq_length: int) -> float:
        """Share of the rows' positions that hold a token."""
        return self.tokens / (self.rows * max_seq_length) if self.rows else 0.0


@dataclass
class SourceCounts:
    """What one source gave to all splits; what was left out counts each time that it was met."""

    documents: int = 0  # as often as they were taken
    text_bytes: int = 0
    tokens: int = 0  # in the rows
    invalid_documents: int = 0  # with bytes that are not UTF-8, read as U+FFFD
    short_documents: int = 0  # left out
    duplicate_documents: int = 0  # left out
    dropped_lines: int = 0  # left out
    unreadable_files: int = 0  # left out from where they could not be read


@dataclass
class Meta:
    """`meta.json`. It has no time or machine in it: the same conversion writes the same bytes."""

    tokenizer: TokenizerMeta
    max_seq_length: int
    packing: str  # packed: several examples a row; one: a single one
    seed: int
    conversion: dict[str, Any]  # the other options that decide what the shards hold
    splits: dict[str, SplitCounts]
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # by name; what each gave
    format_version: int = FORMAT_VERSION
    folder: str = ""  # where this was read from; not in the file

    @property
    def tokenizer_folder(self) -> str:
        """The tokenizer beside the shards, for `vocabulary.load_tokenizer`."""
        return os.path.join(self.folder, TOKENIZER)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        del values["folder"]
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, folder: str) -> Meta:
        """Raises TypeError, KeyError or ValueError on anything that `to_json` would not write."""
        values = json.loads(text)
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version is {values.get('format_version')}; this program reads {FORMAT_VERSION}")
        values["tokenizer"] = TokenizerMeta(**values["tokenizer"])
        values["splits"] = {name: SplitCounts(**counts) for name, counts in values["splits"].items()}
        values["sources"] = {name: SourceCounts(**counts) for name, counts in values.get("sources", {}).items()}
        return cls(**values, folder=folder)


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> TokenizerMeta:
    return TokenizerMeta(name, vocabulary_sha256(tokenizer), len(tokenizer), special_ids(tokenizer, name))


def id_dtype(vocab_size: int) -> str:
    """The smallest type of the shards' ids that holds a vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"


def is_inside(name: Any) -> bool:
    """Whether a name, of a file that a stranger may have written, stays below the folder that it is joined to."""
    if not isinstance(name, str) or not name or name != name.strip() or "\0" in name or "\\" in name:
        return False
    return not os.path.isabs(name) and all(part not in ("", ".", "..") for part in name.split("/"))
