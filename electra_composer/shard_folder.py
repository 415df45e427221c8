"""What a folder of shards holds, and how it is written: whole or not at all. `shards.py` reads it.

    <out>/meta.json      what the shards are: tokenizer, length, packing, seed, counts; written last
    <out>/tokenizer/     a folder that `transformers.AutoTokenizer` loads
    <out>/train/, val/   MDS data sets of rows (columns `input_ids`, `segment_lengths`), each with an index.json

A row is at most `max_seq_length` token ids, whole examples one after another; `segment_lengths` has two entries for
each example, the tokens of A with its `[CLS]` and `[SEP]`, and those of B with its `[SEP]`, or 0.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from streaming import MDSWriter
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.examples import Row
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
class Meta:
    """`meta.json`. It has no time or machine in it: the same conversion writes the same bytes."""

    tokenizer: TokenizerMeta
    max_seq_length: int
    packing: str  # packed: several examples a row; one: a single one
    seed: int
    conversion: dict[str, Any]  # the other options that decide what the shards hold
    splits: dict[str, SplitCounts]
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
        return cls(**values, folder=folder)


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast, name: str) -> TokenizerMeta:
    return TokenizerMeta(name, vocabulary_sha256(tokenizer), len(tokenizer), special_ids(tokenizer, name))


class ShardFolder:
    """Writes a folder of shards that either is whole or is not there.

    Everything goes into `<out>.partial-<process id>` beside `out`, which gets its name by one rename at the end.
    Leaving the `with` block by an error, Ctrl-C included, or without :meth:`finish` removes what was written.

    Args:
        out: the folder to be.
        overwrite: replace a folder of shards that is there, once the new one is whole.
        compression: of the shards, as `MDSWriter` takes it (`zstd`, `zstd:7`), or None.

    Raises:
        UserError: `out` exists and `overwrite` is off, or is not a folder of shards; no place to write to; disk full.
    """

    def __init__(self, out: str, overwrite: bool = False, compression: str | None = None) -> None:
        self.out = os.path.abspath(os.path.expanduser(out))
        self.path = f"{self.out}.partial-{os.getpid()}"
        self._compression = compression
        self._writers: dict[str, MDSWriter] = {}
        if os.path.lexists(self.out):
            if not overwrite:
                raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
            if not os.path.isfile(os.path.join(self.out, META)):
                raise UserError(f"{out} is no folder of shards (it has no {META}), so --overwrite leaves it alone")

    def __enter__(self) -> ShardFolder:
        try:
            os.makedirs(self.path)
        except OSError as error:
            raise UserError(f"cannot write to {os.path.dirname(self.out)}: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        shutil.rmtree(self.path, ignore_errors=True)  # after finish() there is nothing of that name any more
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise UserError(f"cannot write the shards to {self.out}: {error.strerror}; nothing was kept") from error

    def write(self, split: str, row: Row, dtype: str) -> None:
        """Append one row to a split. `dtype`: of the ids, from :func:`id_dtype`."""
        if split not in self._writers:
            self.add_split(split, dtype)
        self._writers[split].write({"input_ids": row.input_ids.astype(dtype), "segment_lengths": row.segment_lengths})

    def add_split(self, split: str, dtype: str) -> None:
        self._writers[split] = MDSWriter(
            columns={"input_ids": f"ndarray:{dtype}", "segment_lengths": "ndarray:uint16"},
            out=os.path.join(self.path, split),
            compression=self._compression,
            hashes=[HASH],
            max_workers=1,
        )

    def finish(self, meta: Meta, tokenizer: PreTrainedTokenizerFast) -> int:
        """Write what is left, give the folder its name, and return its size in bytes."""
        for writer in self._writers.values():
            writer.finish()
        tokenizer.save_pretrained(os.path.join(self.path, TOKENIZER))
        meta.tokenizer.files = sorted(os.listdir(os.path.join(self.path, TOKENIZER)))
        with open(os.path.join(self.path, META), "w", encoding="utf-8", newline="\n") as file:
            file.write(meta.to_json())
        size = sum(os.path.getsize(os.path.join(base, name)) for base, _, names in os.walk(self.path) for name in names)
        if os.path.lexists(self.out):
            old = f"{self.out}.old-{os.getpid()}"
            os.rename(self.out, old)
            os.rename(self.path, self.out)
            shutil.rmtree(old)
        else:
            os.rename(self.path, self.out)
        return size


def id_dtype(vocab_size: int) -> str:
    """The smallest type of the shards' ids that holds a vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"
