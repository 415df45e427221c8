"""Options of a conversion, and their validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from electra_composer.corpus.sources import Sources, check_sources, fingerprint_files
from electra_composer.errors import UserError
from electra_composer.ranges import Range, check_ranges
from electra_composer.storage.row_lengths import MAX_SEQ_LENGTH, MIN_SEQ_LENGTH

Overflow = Literal["cut", "carry"]
TRAIN = "train"  # value of `tokenizer`: train a new vocabulary on the sources


@dataclass
class Conversion:
    """Options of a conversion; see `data_prep/convert_owt.py --help`."""

    sources: Sources = field(default_factory=Sources)
    out: str = "data/owt"
    tokenizer: str = "google/electra-small-discriminator"
    vocab_size: Annotated[int, Range(ge=7, le=1_000_000)] = 30522  # special tokens, and a character twice, at least
    add_vocabulary: Annotated[int, Range(ge=1, le=1_000_000, null="none")] | None = None
    cased: bool = False
    keep_accents: bool = False
    max_seq_length: Annotated[int, Range(ge=MIN_SEQ_LENGTH, le=MAX_SEQ_LENGTH)] = 128
    packing: Literal["packed", "one"] = "packed"
    lines: Literal["newline", "sentence"] = "newline"
    overflow: Overflow = "cut"
    val_fraction: Annotated[float, Range(ge=0, lt=1)] = 0.005
    seed: Annotated[int, Range(ge=0, le=2**31 - 1)] = 0
    workers: Annotated[int, Range(ge=1, le=1024)] = 1
    engine: Literal["local", "spark"] = "local"
    master: str | None = None  # Spark master URL
    compression: str | None = None
    overwrite: bool = False
    ignore_disk: bool = False  # start even if free disk space seems too small
    restart: bool = False  # discard an interrupted conversion instead of resuming it
    progress: bool = True

    def plan(self) -> dict[str, Any]:
        """Return everything that determines the shards, sizes of local files included; only an equal plan resumes."""
        values = asdict(self)
        for name in ("out", "workers", "engine", "master", "overwrite", "ignore_disk", "restart", "progress"):
            del values[name]
        if self.add_vocabulary is None:  # as in plans from before it existed
            del values["add_vocabulary"]
        return {**values, "sources": self.sources.to_dict(), "files": fingerprint_files(self.sources)}


def check_options(options: Conversion) -> None:
    """Check options and sources before any work begins.

    Raises:
        UserError: an option is out of range or without effect, or a source cannot be found.
    """
    check_sources(options.sources)
    check_ranges(options)
    if options.compression is not None:
        from streaming.base.compression import is_compression  # imported here, because Streaming takes seconds

        if not is_compression(options.compression):
            expected = "expected zstd, gz, br, bz2 or snappy"
            raise UserError(f"--compression {options.compression} is not supported by Streaming; {expected}")
    if options.master is not None and options.engine != "spark":
        raise UserError(f"--master {options.master} requires --engine spark")
    if options.tokenizer != TRAIN and options.vocab_size != Conversion.vocab_size:
        raise UserError(
            f"--vocab-size {options.vocab_size} has no effect with --tokenizer {options.tokenizer}; it is for "
            f"--tokenizer {TRAIN}"
        )
    if options.tokenizer == TRAIN and options.add_vocabulary is not None:
        raise UserError(
            f"--add-vocabulary {options.add_vocabulary} has no effect with --tokenizer {TRAIN}; set --vocab-size"
        )
    if options.cased and options.keep_accents:
        raise UserError("--cased keeps accents already; give --keep-accents alone for lower case with accents")
