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
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.ranges import Range
from electra_composer.storage.row_lengths import MAX_SEQ_LENGTH, MIN_SEQ_LENGTH
from electra_composer.vocabulary import special_ids, vocabulary_sha256

T = TypeVar("T")

FORMAT_VERSION = 1
CONVERTER = "data_prep/convert_owt.py"  # writes such folders
META = "meta.json"
TOKENIZER = "tokenizer"
HASH = "xxh64"  # of every shard, stored in the index; Streaming checks it after a download or decompression

Count = Annotated[int, Range(ge=0, le=10**18)]


@dataclass
class TokenizerMeta:
    """Identity of the tokenizer that made the ids in the shards."""

    name: str
    vocabulary_sha256: str
    vocab_size: Annotated[int, Range(ge=1, le=2**32)]
    special_ids: dict[str, Count]  # by role: pad, cls, sep, mask, and unk if there is one
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

    documents: Count = 0
    examples: Count = 0
    rows: Count = 0
    tokens: Count = 0  # in the rows, including special tokens
    dropped_tokens: Count = 0  # truncated at the ends of segments

    def fill(self, max_seq_length: int) -> float:
        """Fraction of the rows' positions that hold a token."""
        return self.tokens / (self.rows * max_seq_length) if self.rows else 0.0


@dataclass
class SourceCounts:
    """Counts of one source over all splits; skipped items count each time they are read."""

    documents: Count = 0  # repetitions included
    text_bytes: Count = 0
    tokens: Count = 0  # in the rows
    invalid_documents: Count = 0  # with invalid UTF-8, decoded as U+FFFD
    short_documents: Count = 0  # skipped
    duplicate_documents: Count = 0  # skipped
    dropped_lines: Count = 0  # skipped
    unreadable_files: Count = 0  # skipped from the point where reading failed


@dataclass
class Meta:
    """`meta.json`. It records no time or machine: the same conversion writes the same bytes."""

    tokenizer: TokenizerMeta
    max_seq_length: Annotated[int, Range(ge=MIN_SEQ_LENGTH, le=MAX_SEQ_LENGTH)]
    packing: Literal["packed", "one"]  # packed: several examples per row; one: a single example
    seed: Annotated[int, Range(ge=-(2**63), le=2**63 - 1)]
    conversion: dict[str, Any]  # the other options that determine the content of the shards
    splits: dict[str, SplitCounts]
    sources: dict[str, SourceCounts] = field(default_factory=dict)  # by name
    format_version: Annotated[int, Range(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
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
        """Parse `meta.json`.

        Raises:
            ValueError: the text is not what `to_json` writes; names the field.
        """
        try:
            values = json.loads(text)
        except RecursionError as error:
            raise ValueError("values are nested too deeply") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}; this version reads {FORMAT_VERSION}")
        meta = parse(cls, {**values, "folder": folder})
        for role, index in meta.tokenizer.special_ids.items():
            if index >= meta.tokenizer.vocab_size:
                raise ValueError(f"tokenizer.special_ids.{role} is {index}; expected less than tokenizer.vocab_size")
        missing = {"pad", "cls", "sep", "mask"} - meta.tokenizer.special_ids.keys()
        if missing:
            raise ValueError(f"tokenizer.special_ids has no {sorted(missing)[0]!r}")
        for name, counts in meta.splits.items():
            if counts.tokens > counts.rows * meta.max_seq_length:
                raise ValueError(f"splits.{name}.tokens is {counts.tokens}, more than its rows can hold")
        return meta


def parse(schema: Any, value: Any, path: str = "") -> Any:
    """Convert a value of a JSON file to a type, such as a dataclass, strictly: no key unknown, nothing converted.

    Args:
        schema: A dataclass, `dict[str, …]`, `list[…]`, `… | None`, a `Literal`, an `Annotated` with a :class:`Range`,
            `str` or `Any`.
        path: Of the value in the file, for messages.

    Raises:
        ValueError: A value of another type or out of range, a key missing or unknown.
    """
    origin, arguments = get_origin(schema), get_args(schema)
    if type(None) in arguments:
        return None if value is None else parse(arguments[0], value, path)
    if is_dataclass(schema) and isinstance(schema, type) and isinstance(value, dict):
        hints = get_type_hints(schema, include_extras=True)
        required = [part.name for part in fields(schema) if part.default is part.default_factory is MISSING]
        for names, what in ((value.keys() - hints.keys(), "unknown"), (set(required) - value.keys(), "missing")):
            if names:
                raise ValueError(f"{path}{sorted(names)[0]} is {what}")
        return schema(**{name: parse(hints[name], part, f"{path}{name}.") for name, part in value.items()})
    if origin is dict and isinstance(value, dict):
        return {name: parse(arguments[1], part, f"{path}{name}.") for name, part in value.items()}
    if origin is list and isinstance(value, list):
        return [parse(arguments[0], part, f"{path}{number}.") for number, part in enumerate(value)]
    if origin is Annotated:
        allowed = arguments[1]
        if isinstance(value, arguments[0]) and allowed.contains(value):
            return value
        expected = allowed.describe(integer=True)
    elif origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        expected = " or ".join(arguments)
    elif schema is Any or (isinstance(schema, type) and isinstance(value, schema)):
        return value
    else:
        kind = "object" if is_dataclass(schema) or origin is dict else "list" if origin is list else "text"
        expected = f"a JSON {kind}"
    raise ValueError(f"{path.rstrip('.') or 'the content'} is {repr(value)[:60]}; expected {expected}")


@dataclass
class ShardFile:
    """Entry of a file in `index.json`."""

    basename: str
    bytes: Count
    hashes: dict[str, str]


@dataclass
class Shard:
    """Entry of a shard in `index.json`, as Streaming's MDSWriter writes it."""

    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[Any]
    format: Literal["mds"]
    samples: Count
    raw_data: ShardFile | None
    zip_data: ShardFile | None

    @property
    def files(self) -> list[ShardFile]:
        """Its files, uncompressed and compressed; either is enough."""
        return [file for file in (self.raw_data, self.zip_data) if file is not None]


def parse_index(text: str) -> list[Shard]:
    """Parse `index.json`; keys that only Streaming reads are ignored.

    Raises:
        ValueError: see :func:`parse`; or a shard has no file.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("values are nested too deeply") from error
    entries = parse(list[dict[str, Any]], content.get("shards") if isinstance(content, dict) else content, "shards.")
    known = {part.name for part in fields(Shard)}
    shards = []
    for number, entry in enumerate(entries):
        shard = parse(Shard, {name: value for name, value in entry.items() if name in known}, f"shards.{number}.")
        if not shard.files:
            raise ValueError(f"shards.{number} has neither raw_data nor zip_data")
        shards.append(shard)
    return shards


def read_description(path: str, parse: Callable[[str], T], what: str) -> T:
    """Read `meta.json` or an index of a folder of shards.

    Args:
        parse: raises a ValueError that says what is wrong.
        what: the file is, for the message.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read())
    except (OSError, ValueError) as error:
        reason = "cannot be read" if isinstance(error, OSError) else f"is damaged or not {what}"
        raise UserError(
            f"{path} {reason}: {getattr(error, 'strerror', error)}; copy it again from where the shards were written, "
            f"or recreate the shards with {CONVERTER}"
        ) from error


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
