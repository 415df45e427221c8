"""What a folder of shards holds, and how it is written: whole or not at all. `shards.py` reads it.

    <out>/meta.json      what the shards are: tokenizer, length, packing, seed, counts; written last
    <out>/tokenizer/     a folder that `transformers.AutoTokenizer` loads
    <out>/train/, val/   MDS data sets of rows (columns `input_ids`, `segment_lengths`), each with an index.json

A row is at most `max_seq_length` token ids, whole examples one after another; `segment_lengths` has two entries for
each example, the tokens of A with its `[CLS]` and `[SEP]`, and those of B with its `[SEP]`, or 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from streaming import MDSWriter
from transformers import PreTrainedTokenizerFast

from electra_composer.errors import UserError
from electra_composer.examples import Row
from electra_composer.vocabulary import special_ids, vocabulary_sha256

FORMAT_VERSION = 1
META = "meta.json"
TOKENIZER = "tokenizer"
PLAN, PARTS, PART, UNFINISHED = "plan.json", "parts", "part.json", ".unfinished"
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
    """Writes a folder of shards that either is whole or is not there, part by part.

    Everything goes into a folder beside `out`, which gets its name by one rename at the end. Each part becomes shards
    of its own when it ends. With a `plan`, an interrupted conversion goes on after its last whole part: the parts stay
    in `<out>.partial`, and the next conversion of the same plan finds them in :attr:`parts`. Without a plan, or before
    the first part is whole, leaving the `with` block by an error or without :meth:`finish` removes what was written.

        <out>.partial/plan.json     what is converted and how
        <out>.partial/parts/00000/  a whole part: <split>/shard.*.mds, <split>/index.json, and part.json, its record
        <out>.partial/whole/        the folder to be, while the parts are put together

    Args:
        out: the folder to be.
        overwrite: replace a folder of shards that is there, once the new one is whole.
        compression: of the shards, as `MDSWriter` takes it (`zstd`, `zstd:7`), or None.
        plan: everything that the contents follow from; None: nothing is kept or continued.
        restart: remove the parts of an earlier conversion instead of going on from them.

    Attributes:
        parts: records of the whole parts, in their order; what :meth:`end_part` was given.

    Raises:
        UserError: `out` exists and `overwrite` is off, or is not a folder of shards; no place to write to; disk full;
            parts of another plan are in the way; another conversion is at work on the same folder.
    """

    def __init__(
        self,
        out: str,
        overwrite: bool = False,
        compression: str | None = None,
        plan: dict[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.out = os.path.abspath(os.path.expanduser(out))
        self.path = f"{self.out}.partial" if plan is not None else f"{self.out}.partial-{os.getpid()}"
        self.parts: list[dict[str, Any]] = []
        self._compression, self._plan, self._restart = compression, plan, restart
        self._writers: dict[str, MDSWriter] = {}
        self._lock = FileLock(f"{self.path}.lock", timeout=0)
        if os.path.lexists(self.out):
            if not overwrite:
                raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
            if not os.path.isfile(os.path.join(self.out, META)):
                raise UserError(f"{out} is no folder of shards (it has no {META}), so --overwrite leaves it alone")

    def __enter__(self) -> ShardFolder:
        try:
            os.makedirs(os.path.dirname(self.out), exist_ok=True)
            self._lock.acquire()
            self._open()
        except Timeout as error:
            raise UserError(
                f"another conversion is writing {self.out}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write to {os.path.dirname(self.out)}: {error.strerror}") from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        plan_file = os.path.join(self.path, PLAN)
        if self._plan is None or self._restart or not os.path.isfile(plan_file):
            shutil.rmtree(self.path, ignore_errors=True)
            os.makedirs(os.path.join(self.path, PARTS))
            _write_json(plan_file, self._plan)
            return
        with open(plan_file, encoding="utf-8") as file:
            theirs = json.load(file)
        ours = json.loads(json.dumps(self._plan))
        if theirs != ours:
            changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            told = ", ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in changed)
            raise UserError(
                f"{self.path} holds an unfinished conversion of something else ({_shortened(told)}); give the same "
                "options to go on with it, pass --restart to begin anew, or choose another --out"
            )
        for name in sorted(os.listdir(os.path.join(self.path, PARTS))):
            folder = os.path.join(self.path, PARTS, name)
            if name.endswith(UNFINISHED):
                shutil.rmtree(folder)
                continue
            with open(os.path.join(folder, PART), encoding="utf-8") as file:
                self.parts.append(json.load(file))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        kept = ""
        if self._plan is not None and self.parts:
            kept = f"what was finished ({len(self.parts)} of its parts) stays in {self.path}"
        if kept and error is not None:
            shutil.rmtree(self._part_folder() + UNFINISHED, ignore_errors=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            os.remove(self._lock.lock_file)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise UserError(
                f"cannot write the shards to {self.out}: {error.strerror}; "
                + (f"{kept}: make room, and the same command goes on" if kept else "nothing was kept")
            ) from error
        if error is not None and (kept or not isinstance(error, UserError)):
            print(f"{kept}; the same command goes on" if kept else "nothing was kept", file=sys.stderr)

    def _part_folder(self) -> str:
        """Of the next part to be whole."""
        return os.path.join(self.path, PARTS, f"{len(self.parts):05}")

    def write(self, split: str, row: Row, dtype: str) -> None:
        """Append one row to a split of the present part. `dtype`: of the ids, from :func:`id_dtype`."""
        if split not in self._writers:
            self.add_split(split, dtype)
        self._writers[split].write({"input_ids": row.input_ids.astype(dtype), "segment_lengths": row.segment_lengths})

    def add_split(self, split: str, dtype: str) -> None:
        """A split that is there even if no row comes."""
        self._writers[split] = MDSWriter(
            columns={"input_ids": f"ndarray:{dtype}", "segment_lengths": "ndarray:uint16"},
            out=os.path.join(self._part_folder() + UNFINISHED, split),
            compression=self._compression,
            hashes=[HASH],
            max_workers=1,
        )

    def end_part(self, record: dict[str, Any]) -> None:
        """Make what was written since the last part whole.

        Args:
            record: what a later conversion needs to go on from here; goes to :attr:`parts`.
        """
        for writer in self._writers.values():
            writer.finish()
        self._writers = {}
        unfinished = self._part_folder() + UNFINISHED
        os.makedirs(unfinished, exist_ok=True)
        _write_json(os.path.join(unfinished, PART), record)
        if self._plan is not None:  # a part that is said to be whole is so after a power cut too
            for base, _, names in os.walk(unfinished):
                for name in names:
                    with open(os.path.join(base, name), "rb") as file:
                        os.fsync(file.fileno())
        os.rename(unfinished, self._part_folder())
        self.parts.append(record)

    def finish(self, meta: Meta, tokenizer: PreTrainedTokenizerFast) -> int:
        """Write what is left, give the folder its name, and return its size in bytes."""
        if self._writers:
            self.end_part({})
        whole = os.path.join(self.path, "whole")
        splits = sorted({split for part in range(len(self.parts)) for split in self._splits_of(part)})
        for split in splits:
            self._put_together(split, os.path.join(whole, split))
        tokenizer.save_pretrained(os.path.join(whole, TOKENIZER))
        meta.tokenizer.files = sorted(os.listdir(os.path.join(whole, TOKENIZER)))
        with open(os.path.join(whole, META), "w", encoding="utf-8", newline="\n") as file:
            file.write(meta.to_json())
        size = sum(os.path.getsize(os.path.join(base, name)) for base, _, names in os.walk(whole) for name in names)
        if os.path.lexists(self.out):
            old = f"{self.out}.old-{os.getpid()}"
            os.rename(self.out, old)
            os.rename(whole, self.out)
            shutil.rmtree(old)
        else:
            os.rename(whole, self.out)
        return size

    def _splits_of(self, part: int) -> list[str]:
        folder = os.path.join(self.path, PARTS, f"{part:05}")
        return [entry.name for entry in os.scandir(folder) if entry.is_dir()]

    def _put_together(self, split: str, folder: str) -> None:
        """Number the shards of all parts through, and write their common index.

        Moving a file is all that happens to a shard, and one that was moved before a kill is where it should be.
        """
        os.makedirs(folder, exist_ok=True)
        shards: list[dict[str, Any]] = []
        for part in range(len(self.parts)):
            source = os.path.join(self.path, PARTS, f"{part:05}", split)
            with open(os.path.join(source, "index.json"), encoding="utf-8") as file:
                index = json.load(file)
            for shard in index["shards"]:
                present = False
                for form in ("raw_data", "zip_data"):
                    if shard[form] is None:
                        continue
                    old = shard[form]["basename"]
                    new = f"shard.{len(shards):05}{old[len('shard.00000') :]}"
                    shard[form]["basename"] = new
                    if os.path.lexists(os.path.join(source, old)):
                        os.rename(os.path.join(source, old), os.path.join(folder, new))
                    present = present or os.path.lexists(os.path.join(folder, new))  # compressed or not, not both
                if not present:
                    raise UserError(f"{source}/{old} is missing; pass --restart to convert anew")
                shards.append(shard)
        with open(os.path.join(folder, "index.json"), "w", encoding="utf-8") as file:
            json.dump({"shards": shards, "version": 2}, file, sort_keys=True)


def _write_json(path: str, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, sort_keys=True)


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + " …"


def id_dtype(vocab_size: int) -> str:
    """The smallest type of the shards' ids that holds a vocabulary."""
    return "uint16" if vocab_size <= np.iinfo(np.uint16).max + 1 else "uint32"
