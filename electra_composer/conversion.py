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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from streaming.base.compression import is_compression
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.chunks import SPLITS, Part, Task, convert_chunk, start_worker
from electra_composer.documents import (
    DOCSTRINGS,
    HUB,
    ReadStats,
    Sources,
    check_sources,
    find_files,
    read_documents,
)
from electra_composer.errors import UserError
from electra_composer.estimate import check_free_space, estimate_text
from electra_composer.examples import (
    MIN_SEQ_LENGTH,
    Overflow,
    Packer,
    Row,
    one_per_row,
)
from electra_composer.shard_folder import TOKENIZER, Meta, ShardFolder, SplitCounts, describe_tokenizer, id_dtype
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer

TRAIN = "train"  # --tokenizer train
VOCABULARY_BYTES = 200_000_000  # of text that a vocabulary is trained on: the first of the source
PART_CHARACTERS = 1 << 27  # of a part, from whose end an interrupted conversion goes on: a shard of 64 MB or so
_LOOK_BYTES = 1 << 20  # of text, to see how much there is before the start
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
    ignore_disk: bool = False  # begin even if there seems to be too little room
    restart: bool = False  # instead of going on with what an interrupted conversion left
    progress: bool = True

    def plan(self) -> dict[str, Any]:
        """What the shards follow from, the sizes of local files included: what must be the same to go on."""
        values = asdict(self)
        for name in ("out", "workers", "overwrite", "ignore_disk", "restart", "progress"):
            del values[name]
        files = [
            path for source in self.sources.sources if source not in (HUB, DOCSTRINGS) for path in find_files(source)
        ]
        return {**values, "files": [[path, os.path.getsize(path)] for path in files]}


@dataclass
class Summary:
    """What a conversion did."""

    out: str
    splits: dict[str, SplitCounts]
    max_seq_length: int
    text_bytes: int
    invalid_documents: int
    short_documents: int
    duplicate_documents: int
    shard_bytes: int
    seconds: float  # of this run
    continued_tokens: int = 0  # of the total; from an interrupted run

    @property
    def total(self) -> SplitCounts:
        return _sum(self.splits.values())

    @property
    def dropped_share(self) -> float:
        total = self.total
        return total.dropped_tokens / max(1, total.tokens + total.dropped_tokens)

    @property
    def tokens_per_second(self) -> float:
        return (self.total.tokens - self.continued_tokens) / self.seconds

    def to_dict(self) -> dict[str, object]:
        total = self.total
        return {
            **asdict(self),
            "fill": total.fill(self.max_seq_length),
            "dropped_share": self.dropped_share,
            "tokens_per_second": self.tokens_per_second,
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
            f"{self.tokens_per_second:,.0f} tokens/s"
            + (
                f" ({self.continued_tokens:,} tokens were there from an interrupted run)"
                if self.continued_tokens
                else ""
            )
        )
        return "\n".join(lines)


def convert(options: Conversion) -> Summary:
    """Convert documents to a folder of shards, whole or not at all.

    Raises:
        UserError: options that make no sense, sources or tokenizer that cannot be read, output folder in the way.
    """
    check_options(options)
    start = time.monotonic()
    stats = ReadStats()
    check_sources(options.sources)
    if not options.ignore_disk and (text := estimate_text(options.sources, _LOOK_BYTES)) is not None:
        check_free_space(options.out, text.text_bytes)
    with ShardFolder(options.out, options.overwrite, options.compression, options.plan(), options.restart) as folder:
        documents = read_documents(options.sources, stats, options.workers)
        kept_tokenizer = os.path.join(folder.path, TOKENIZER)
        if options.tokenizer != TRAIN:
            tokenizer = load_tokenizer(options.tokenizer)
        else:
            if not folder.parts:
                sample = list(_first_bytes(documents, VOCABULARY_BYTES, options.progress))
                train_tokenizer(sample, options.vocab_size).save_pretrained(kept_tokenizer)
                documents = itertools.chain(sample, documents)
            tokenizer = load_tokenizer(kept_tokenizer)  # now too, so that a continued conversion has the same
            tokenizer.name_or_path = f"trained-{len(tokenizer)}"
        continued = sum(counts["tokens"] for part in folder.parts for counts in part["splits"].values())
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
        options.out,
        splits,
        options.max_seq_length,
        stats.bytes,
        stats.invalid,
        stats.short,
        stats.duplicates,
        size,
        time.monotonic() - start,
        continued,
    )


def check_options(options: Conversion) -> None:
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
    task, names = task_of(options, tokenizer), split_names(options)
    done = sum(part["documents"] for part in folder.parts)
    documents = iter(documents)
    with tqdm(
        desc="converting", total=options.sources.max_bytes, unit="B", unit_scale=True, disable=not options.progress
    ) as bar:
        for document in itertools.islice(documents, done):  # what an interrupted run had got through
            bar.update(len(document))
        chunks = convert_chunks(task, group_documents(documents, done), options.workers)
        for first in chunks:
            _write_part(options, task, itertools.chain([first], chunks), folder, names, bar)
    if not folder.parts:  # documents without a token
        _write_part(options, task, iter(()), folder, names, bar)
    return {name: _sum(SplitCounts(**part["splits"][name]) for part in folder.parts) for name in names}


def task_of(options: Conversion, tokenizer: PreTrainedTokenizerFast) -> Task:
    ids = special_ids(tokenizer)
    return Task(
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


def split_names(options: Conversion) -> Sequence[str]:
    return SPLITS if options.val_fraction > 0 else SPLITS[:1]


def _write_part(
    options: Conversion, task: Task, chunks: Iterator[Converted], folder: ShardFolder, names: Sequence[str], bar: tqdm
) -> None:
    """Take as many converted chunks as make a part, and write it. Nothing of it goes into the next one."""
    counts = {name: SplitCounts() for name in names}
    packers = {name: Packer(options.max_seq_length) for name in names}
    documents = characters = 0

    def write(name: str, rows: Iterable[Row]) -> None:
        for row in rows:
            counts[name].rows += 1
            counts[name].tokens += len(row.input_ids)
            folder.write(name, row, task.dtype)

    for name in names:
        folder.add_split(name, task.dtype)
    for chunk in chunks:
        for name, part in zip(names, chunk.parts, strict=True):
            counts[name].documents += part.documents
            counts[name].examples += len(part.lengths)
            counts[name].dropped_tokens += part.dropped_tokens
            if options.packing == "one":
                write(name, one_per_row(part.examples()))
            else:
                write(name, itertools.chain.from_iterable(map(packers[name].add, part.examples())))
        bar.update(chunk.characters)
        documents += chunk.documents
        characters += chunk.characters
        if characters >= PART_CHARACTERS:
            break
    for name in names:
        write(name, packers[name].finish())
    folder.end_part(
        {"documents": documents, "splits": {name: asdict(split_counts) for name, split_counts in counts.items()}}
    )


def _sum(counts: Iterable[SplitCounts]) -> SplitCounts:
    columns = [list(asdict(part).values()) for part in counts]
    return SplitCounts(*(sum(values) for values in zip(*columns, strict=True)))


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that reads "[MASK]" in the text as the text that it is, not as the special token, and cuts nothing."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def group_documents(documents: Iterable[str], first: int) -> Iterator[tuple[int, list[str]]]:
    """Documents in groups of a size that is worth sending, each with the number of its first document."""
    chunk: list[str] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield first, chunk
            first += len(chunk)
            chunk, characters = [], 0
    if chunk:
        yield first, chunk


class Converted(NamedTuple):
    """What became of a chunk."""

    documents: int
    characters: int
    parts: list[Part]  # of each split


def convert_chunks(task: Task, chunks: Iterable[tuple[int, list[str]]], workers: int) -> Iterator[Converted]:
    """What becomes of each chunk, in the chunks' order, however fast each worker is."""
    # The processes are the parallelism; threads would not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # fork starts workers in no time, but is not safe with the system libraries of macOS
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, start_worker, (task,))
    waiting: deque[tuple[int, int, Future[list[Part]]]] = deque()
    try:
        for first, chunk in chunks:
            waiting.append((len(chunk), sum(map(len, chunk)), pool.submit(convert_chunk, first, chunk)))
            if len(waiting) > 2 * workers:  # enough to keep all busy, little enough for the memory
                documents, characters, future = waiting.popleft()
                yield Converted(documents, characters, future.result())
        while waiting:
            documents, characters, future = waiting.popleft()
            yield Converted(documents, characters, future.result())
    finally:
        pool.shutdown(cancel_futures=True)
