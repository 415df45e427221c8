"""Options of a conversion, and their validation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from streaming.base.compression import is_compression

from electra_composer.corpus.examples import MIN_SEQ_LENGTH, Overflow
from electra_composer.corpus.sources import Sources, check_sources, fingerprint_files
from electra_composer.errors import UserError

TRAIN = "train"  # value of `tokenizer`: train a new vocabulary on the sources


@dataclass
class Conversion:
    """Options of a conversion; see `data_prep/convert_owt.py --help`."""

    sources: Sources = field(default_factory=Sources)
    out: str = "data/owt"
    tokenizer: str = "google/electra-small-discriminator"
    vocab_size: int = 30522
    cased: bool = False
    keep_accents: bool = False
    max_seq_length: int = 128
    packing: Literal["packed", "one"] = "packed"
    lines: Literal["newline", "sentence"] = "newline"
    overflow: Overflow = "cut"
    val_fraction: float = 0.005
    seed: int = 0
    workers: int = 1
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
        return {**values, "files": fingerprint_files(self.sources)}


def check_options(options: Conversion) -> None:
    """Check options and sources before any work begins.

    Raises:
        UserError: an option is out of range, or a source cannot be found.
    """
    if not MIN_SEQ_LENGTH <= options.max_seq_length <= np.iinfo(np.uint16).max:
        raise UserError(f"--max-seq-length is {options.max_seq_length}; expected {MIN_SEQ_LENGTH} to 65535")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction is {options.val_fraction}; expected a fraction in [0, 1)")
    if options.compression is not None and not is_compression(options.compression):
        raise UserError(
            f"--compression {options.compression} is not supported by Streaming; expected zstd, gz, br, bz2 or snappy"
        )
    if options.master is not None and options.engine != "spark":
        raise UserError(f"--master {options.master} requires --engine spark")
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; expected at least 1")
    check_sources(options.sources)
