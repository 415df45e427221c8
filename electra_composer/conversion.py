"""Documents to a folder of shards: tokenize and build examples in worker processes, pack and write in this one.

Documents are dealt out in chunks, and each chunk has its own stream of random numbers, seeded by its number: what is
written depends on the documents and the options, not on how many processes worked on it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from streaming.base.compression import is_compression
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.chunks import SPLITS, Part, Task, convert_chunk, start_worker
from electra_composer.documents import ReadStats, Sources, check_sources, read_documents
from electra_composer.errors import UserError
from electra_composer.examples import (
    MIN_SEQ_LENGTH,
    Overflow,
    Packer,
    Row,
    one_per_row,
)
from electra_composer.shard_folder import Meta, ShardFolder, SplitCounts, describe_tokenizer, id_dtype
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer

TRAIN = "train"  # --tokenizer train
VOCABULARY_BYTES = 200_000_000  # of text that a vocabulary is trained on: the first of the source
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_DOCUMENTS = 4096


@dataclass
class Conversion:
    """The options of a conversion; see `data_prep/convert_owt.py --help`."""

    sources: Sources = field(default_factory=Sources)
    out: str = "data/owt"
    tokenizer: str = "google/electra-small-discriminator"
    vocab_size: int = 30522
    max_seq_length: int = 128
    packing: Literal["packed", "one"] = "packed"
    lines: Literal["newline", "sentence"] = "newline"
    overflow: Overflow = "cut"
    val_fraction: float = 0.005
    seed: int = 0
    workers: int = 1
    compression: str | None = None
    overwrite: bool = False
    progress: bool = True


@dataclass
class Summary:
    """What a conversion did."""

    out: str
    splits: dict[str, SplitCounts]
    max_seq_length: int
    text_bytes: int
    invalid_documents: int
    shard_bytes: int
    seconds: float

    @property
    def total(self) -> SplitCounts:
        columns = [list(asdict(counts).values()) for counts in self.splits.values()]
        return SplitCounts(*(sum(values) for values in zip(*columns, strict=True)))

    @property
    def dropped_share(self) -> float:
        total = self.total
        return total.dropped_tokens / max(1, total.tokens + total.dropped_tokens)

    def to_dict(self) -> dict[str, object]:
        total = self.total
        return {
            **asdict(self),
            "fill": total.fill(self.max_seq_length),
            "dropped_share": self.dropped_share,
            "tokens_per_second": total.tokens / self.seconds,
        }

    def __str__(self) -> str:
        lines = [f"{'':12}{'documents':>12}{'examples':>12}{'rows':>12}{'tokens':>15}{'fill':>8}{'dropped tokens':>16}"]
        for name, counts in [*self.splits.items(), ("total", self.total)]:
            lines.append(
                f"{name:12}{counts.documents:12,}{counts.examples:12,}{counts.rows:12,}{counts.tokens:15,}"
                f"{counts.fill(self.max_seq_length):8.2%}{counts.dropped_tokens:16,}"
            )
        lines.append(
            f"{self.text_bytes:,} bytes of text to {self.shard_bytes:,} bytes in {self.out}: {self.seconds:.1f} s, "
            f"{self.total.tokens / self.seconds:,.0f} tokens/s"
        )
        return "\n".join(lines)


def convert(options: Conversion) -> Summary:
    """Convert documents to a folder of shards, whole or not at all.

    Raises:
        UserError: options that make no sense, sources or tokenizer that cannot be read, output folder in the way.
    """
    _check(options)
    start = time.monotonic()
    stats = ReadStats()
    check_sources(options.sources)
    with ShardFolder(options.out, options.overwrite, options.compression) as folder:
        documents = read_documents(options.sources, stats, options.workers)
        if options.tokenizer == TRAIN:
            sample = list(_first_bytes(documents, VOCABULARY_BYTES, options.progress))
            tokenizer = train_tokenizer(sample, options.vocab_size)
            documents = itertools.chain(sample, documents)
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        splits = _write(options, tokenizer, documents, folder)
        meta = Meta(
            tokenizer=describe_tokenizer(
                tokenizer, tokenizer.name_or_path if options.tokenizer == TRAIN else options.tokenizer
            ),
            max_seq_length=options.max_seq_length,
            packing=options.packing,
            seed=options.seed,
            conversion={
                **asdict(options.sources),
                "lines": options.lines,
                "overflow": options.overflow,
                "val_fraction": options.val_fraction,
                "compression": options.compression,
            },
            splits=splits,
        )
        size = folder.finish(meta, tokenizer)
    return Summary(
        options.out, splits, options.max_seq_length, stats.bytes, stats.invalid, size, time.monotonic() - start
    )


def _check(options: Conversion) -> None:
    if not MIN_SEQ_LENGTH <= options.max_seq_length <= np.iinfo(np.uint16).max:
        raise UserError(f"--max-seq-length is {options.max_seq_length}; expected {MIN_SEQ_LENGTH} to 65535")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction is {options.val_fraction}; expected a share from 0 to below 1")
    if options.compression is not None and not is_compression(options.compression):
        raise UserError(
            f"--compression {options.compression} is unknown to Streaming; it knows zstd, gz, br, bz2, snappy"
        )
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; expected at least 1")


def _first_bytes(documents: Iterator[str], limit: int, progress: bool) -> Iterator[str]:
    size = 0
    with tqdm(desc="reading text for the vocabulary", unit="B", unit_scale=True, disable=not progress) as bar:
        for document in documents:
            yield document
            size += len(document)
            bar.update(len(document))
            if size >= limit:
                return


def _write(
    options: Conversion, tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], folder: ShardFolder
) -> dict[str, SplitCounts]:
    """Convert the documents into the splits of an open folder."""
    ids = special_ids(tokenizer)
    task = Task(
        _plain_tokenizer(tokenizer).to_str(),
        options.max_seq_length,
        ids["cls"],
        ids["sep"],
        options.lines,
        options.overflow,
        options.val_fraction,
        options.seed,
        id_dtype(len(tokenizer)),
    )
    names = SPLITS if options.val_fraction > 0 else SPLITS[:1]
    counts = {name: SplitCounts() for name in names}
    packers = {name: Packer(options.max_seq_length) for name in names}

    def write(name: str, rows: Iterable[Row]) -> None:
        for row in rows:
            counts[name].rows += 1
            counts[name].tokens += len(row.input_ids)
            folder.write(name, row, task.dtype)

    for name in names:
        folder.add_split(name, task.dtype)
    with tqdm(
        desc="converting", total=options.sources.max_bytes, unit="B", unit_scale=True, disable=not options.progress
    ) as bar:
        for size, parts in _parts(task, documents, options.workers):
            for name, part in zip(names, parts, strict=True):
                counts[name].documents += part.documents
                counts[name].examples += len(part.lengths)
                counts[name].dropped_tokens += part.dropped_tokens
                if options.packing == "one":
                    write(name, one_per_row(part.examples()))
                else:
                    write(name, itertools.chain.from_iterable(map(packers[name].add, part.examples())))
            bar.update(size)
    for name in names:
        write(name, packers[name].finish())
    return counts


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that reads "[MASK]" in the text as the text that it is, not as the special token, and cuts nothing."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _chunks(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Documents in groups of a size that is worth sending, each with the number of its first document."""
    chunk: list[str] = []
    first = characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield first, chunk
            first += len(chunk)
            chunk, characters = [], 0
    if chunk:
        yield first, chunk


def _parts(task: Task, documents: Iterable[str], workers: int) -> Iterator[tuple[int, list[Part]]]:
    """The characters and the parts of each chunk, in the chunks' order, however fast each worker is."""
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # the processes are the parallelism; threads would not survive a fork
    )
    # fork starts workers in no time, but is not safe with the system libraries of macOS
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (task,))
    waiting: deque[tuple[int, Future[list[Part]]]] = deque()
    try:
        for first, chunk in _chunks(documents):
            waiting.append((sum(map(len, chunk)), pool.submit(convert_chunk, first, chunk)))
            if len(waiting) > 2 * workers:  # enough to keep all busy, little enough for the memory
                size, future = waiting.popleft()
                yield size, future.result()
        while waiting:
            size, future = waiting.popleft()
            yield size, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
