"""Configure and find sources of text (the Hugging Face Hub, files, docstrings), mixtures of them, and filters."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from electra_composer.corpus.columns import TEXT, missing_column
from electra_composer.corpus.files import (
    COLUMNAR,
    TABLES,
    TRAIN_SPLIT,
    find_files,
    format_of,
    has_splits,
    reason_of,
)
from electra_composer.errors import UserError
from electra_composer.ranges import BYTES, Range, check_ranges, faults

if TYPE_CHECKING:
    pass

HUB = "hub"
DOCSTRINGS = "docstrings"
SPLITS = "splits"  # kind of a source: a data set saved to disk that has splits

# Keys of a source that only some kinds of it use.
USED_BY: dict[str, tuple[set[str], str]] = {
    "text_column": ({HUB, *COLUMNAR, ".jsonl", ".json", *TABLES}, "parquet, Arrow, JSON Lines, csv, tsv and data sets"),
    "txt_documents": ({".txt"}, ".txt files"),
    "split": ({HUB, SPLITS}, f"the source {HUB} and a DatasetDict written by save_to_disk"),
    "dataset": ({HUB}, f"the source {HUB}"),
    "config": ({HUB}, f"the source {HUB}"),
    "revision": ({HUB}, f"the source {HUB}"),
}


@dataclass
class Source:
    """A source of documents, and how to read it.

    `dataset`, `config` and `revision` are for the source `hub`. OpenWebText's repository contains a loading script,
    which `datasets` no longer runs; the hub converts such data sets to parquet on the branch `refs/convert/parquet`.
    """

    path: str = HUB  # hub, docstrings, or the path of a file, folder or glob
    name: str | None = None  # in meta.json and messages; null: the path or the name of the data set
    # how often each document is taken: 2 twice, 0.5 half of them (chosen by their text)
    weight: Annotated[float, Range(gt=0, le=100)] = 1.0
    # of parquet, Arrow, JSON, csv, tsv and the hub; a.b: the key b of the object a
    text_column: str = TEXT
    # what ends a document in .txt: a blank line, the file, or a number of lines
    txt_documents: Annotated[int, Range(ge=1, le=10**9)] | Literal["blank", "file"] = "blank"
    split: str = TRAIN_SPLIT  # of a data set of the hub, or of one that is saved to disk
    dataset: str = "Skylion007/openwebtext"
    config: str | None = None
    revision: str | None = "refs/convert/parquet"

    @property
    def label(self) -> str:
        return self.name or (self.dataset if self.path == HUB else self.path)

    @property
    def kinds(self) -> set[str | None]:
        """What it consists of: `hub`, `docstrings`, or the formats of its files as :func:`format_of` names them.

        Raises:
            UserError: see :func:`find_files`.
        """
        if not self.is_path:
            return {self.path}
        return {*map(format_of, self.files), *({SPLITS} if has_splits(self.path) else ())}

    @property
    def is_path(self) -> bool:
        """Whether it is a file, folder or glob."""
        return self.path not in (HUB, DOCSTRINGS)

    @property
    def files(self) -> list[str]:
        """The files of a source that is a path.

        Raises:
            UserError: see :func:`find_files`.
        """
        return find_files(self.path, self.split)


@dataclass
class Sources:
    """Sources to read, and filters and limits on their documents."""

    sources: list[Source] = field(default_factory=lambda: [Source()])
    min_characters: Annotated[int, Range(ge=0, le=10**9)] = 0  # shorter documents are left out
    drop_lines: list[str] = field(default_factory=list)  # regular expressions; lines that match one are left out
    clean: Literal["seed"] | None = None  # seed: delete "()" from all lines, as richarddwang/electra_pytorch does
    deduplicate: bool = False  # leave out exact copies of earlier documents
    normalize: Literal["NFC", "NFKC"] | None = None  # Unicode normalization form
    skip_unreadable: bool = False  # leave out the rest of a file that cannot be read, instead of stopping
    max_documents: Annotated[int, Range(ge=1, le=10**12)] | None = None
    # of UTF-8 text
    max_bytes: Annotated[int, Range(ge=1, le=10**15, suffixes=BYTES, example="50mb")] | None = None

    @classmethod
    def of(cls, *paths: str, **options: Any) -> Sources:
        """Create sources from paths; `options` are fields of :class:`Sources`, or of :class:`Source` for all paths."""
        names = {f.name for f in fields(Source)}
        each = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        return cls([Source(path, **each) for path in paths], **rest)

    def __str__(self) -> str:
        return ", ".join(source.label for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for plans and `meta.json`; without those that are new and not set, as they were before."""
        values = asdict(self)
        for source in values["sources"]:
            if source["split"] == TRAIN_SPLIT:
                del source["split"]
        if self.clean is None:
            del values["clean"]
        return values


@dataclass
class _Mixture:
    sources: list[Source]


def read_mixture(path: str) -> list[Source]:
    """Read sources from a YAML file: a list under `sources:`, each with the keys of :class:`Source`.

    Raises:
        UserError: no such file, another structure, or an unknown key.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        mixture = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Mixture), content))
    except OSError as error:
        raise UserError(f"--mixture {path}: {error.strerror}") from error
    # TypeError: a bare list; ValueError: bytes that are not UTF-8, a number of thousands of digits
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        known = ", ".join(f.name for f in fields(Source))
        raise UserError(
            f"--mixture {path}: {' '.join(str(error).split())[:300]}; expected a list under sources:, each with "
            f"some of {known}"
        ) from error
    assert isinstance(mixture, _Mixture)
    if not mixture.sources:
        raise UserError(f"--mixture {path}: no sources; expected a list under sources:")
    return mixture.sources


def check_sources(sources: Sources) -> None:
    """Check sources and filters, and that there are files at every path, before any work begins.

    Raises:
        UserError: no files at a path, number out of range, key without effect, two sources of the same name, invalid
            regular expression.
    """
    for pattern in sources.drop_lines:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"--drop-lines {pattern!r}: not a regular expression ({error})") from error
    labels = [source.label for source in sources.sources]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"source {label} is given more than once; give it a weight of 2 to take it twice")
    for source in sources.sources:
        for _, message in faults(source):
            raise UserError(f"source {source.label}: {message}")
        unused = unused_keys(source)
        if unused:
            value = getattr(source, unused[0])
            raise UserError(
                f"source {source.label}: {unused[0]} {value} has no effect; it is for {USED_BY[unused[0]][1]}"
            )
    check_ranges(sources)


def unused_keys(source: Source) -> list[str]:
    """Return the keys that differ from their defaults, but have no effect on this kind of source.

    Raises:
        UserError: see :func:`find_files`.
    """
    kinds, default = source.kinds, Source()
    return [
        name
        for name, (used_by, _) in USED_BY.items()
        if getattr(source, name) != getattr(default, name) and not kinds & used_by
    ]


def fingerprint_files(sources: Sources) -> dict[str, Any]:
    """Return the number of local files, their bytes, and a hash of names and sizes, to detect changed sources."""
    digest, count, size = hashlib.sha256(), 0, 0
    for source in sources.sources:
        if source.path not in (HUB, DOCSTRINGS):
            for path in source.files:
                length = os.path.getsize(path)
                digest.update(f"{path}\0{length}\n".encode("utf-8", "surrogateescape"))
                count, size = count + 1, size + length
    return {"count": count, "bytes": size, "sha256": digest.hexdigest()}


def hub_name(source: Source) -> str:
    name = f"{source.dataset}{f' ({source.config})' if source.config else ''}"
    return f"data set {name}{f' at revision {source.revision}' if source.revision else ''}"


def open_hub(source: Source) -> Any:
    """Open a data set of the hub as a stream (`datasets.IterableDataset`).

    Raises:
        UserError: it cannot be read from the hub, or has no text column.
    """
    import datasets  # imported here, because it takes seconds and only this source needs it

    where = hub_name(source)
    try:
        stream = datasets.load_dataset(
            source.dataset, source.config, revision=source.revision, split=source.split, streaming=True
        )
        columns = stream.column_names or list(next(iter(stream)))
    except Exception as error:  # of many types: offline, unknown name, gated, needs a script, unreadable
        raise UserError(
            f"{where} cannot be read from the hub: {reason_of(error)}; check the name, the revision (--revision) and "
            "the network, or give local files as --source"
        ) from error
    if source.text_column not in columns:
        raise missing_column(where, source.text_column, columns)
    return stream
