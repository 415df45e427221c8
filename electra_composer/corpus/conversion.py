"""Documents to a folder of shards: the sources are divided into parts, processes convert them, the parts make a folder.

What is written depends on the sources and the options, not on how many processes worked on it, or in which order.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

import numpy as np
from streaming.base.compression import is_compression
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from electra_composer.corpus import selection
from electra_composer.corpus.chunks import Task
from electra_composer.corpus.docstrings import read_docstrings
from electra_composer.corpus.documents import ReadStats, no_text, not_wanted, part_documents
from electra_composer.corpus.engines import Engine, Processes, Spark
from electra_composer.corpus.estimate import check_free_space, estimate_text
from electra_composer.corpus.examples import MIN_SEQ_LENGTH, Overflow
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.corpus.part_conversion import Job, Plan
from electra_composer.corpus.selection import Selection
from electra_composer.corpus.source_parts import MIN_PART, Part, list_parts, mix
from electra_composer.corpus.sources import DOCSTRINGS, Sources, check_sources, describe_files
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import (
    TOKENIZER,
    Meta,
    SourceCounts,
    SplitCounts,
    describe_tokenizer,
    id_dtype,
)
from electra_composer.vocabulary import load_tokenizer, special_ids, train_tokenizer

TRAIN = "train"  # --tokenizer train
VOCABULARY_BYTES = 200_000_000  # of text that a vocabulary is trained on, from parts all over the sources
VOCABULARY_PARTS = 64  # at most; each costs the start of a reader
_LOOK_BYTES = 1 << 20  # of text, to see how much there is before the start

Counts = TypeVar("Counts", SplitCounts, SourceCounts)


@dataclass
class Conversion:
    """The options of a conversion; see `data_prep/convert_owt.py --help`."""

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
    master: str | None = None  # of Spark
    compression: str | None = None
    overwrite: bool = False
    ignore_disk: bool = False  # begin even if there seems to be too little room
    restart: bool = False  # instead of going on with what an interrupted conversion left
    progress: bool = True

    def plan(self) -> dict[str, Any]:
        """What the shards follow from, the sizes of local files included: what must be the same to go on."""
        values = asdict(self)
        for name in ("out", "workers", "engine", "master", "overwrite", "ignore_disk", "restart", "progress"):
            del values[name]
        return {**values, "files": describe_files(self.sources)}


@dataclass
class Summary:
    """What a conversion did."""

    out: str
    splits: dict[str, SplitCounts]
    sources: dict[str, SourceCounts]  # by name
    unreadable: list[str]  # what was wrong with files that were left out
    max_seq_length: int
    shard_bytes: int
    seconds: float  # of this run
    continued_tokens: int = 0  # of the total; from an interrupted run

    @property
    def total(self) -> SplitCounts:
        return _sum(SplitCounts, map(asdict, self.splits.values()))

    @property
    def text(self) -> SourceCounts:
        """All sources together."""
        return _sum(SourceCounts, map(asdict, self.sources.values()))

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
            "text_bytes": self.text.text_bytes,
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
        if len(self.sources) > 1:
            width = max(map(len, self.sources))
            lines += ["", f"{'source':{width}}{'documents':>12}{'bytes of text':>17}{'tokens':>15}{'share':>8}"]
            for name, part in self.sources.items():
                share = part.tokens / max(1, self.text.tokens)
                lines.append(f"{name:{width}}{part.documents:12,}{part.text_bytes:17,}{part.tokens:15,}{share:8.1%}")
        lines.append(
            f"{self.text.text_bytes:,} bytes of text to {self.shard_bytes:,} bytes in {self.out}: "
            f"{self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s"
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
    sources = options.sources
    check_sources(sources)
    text_bytes = _text_bytes(options)
    with ShardFolder(options.out, options.overwrite, options.compression, options.plan(), options.restart) as folder:
        engine: Engine = Spark(options.master) if options.engine == "spark" else Processes(options.workers)
        parts = list_parts(sources, _docstring_files(options, folder.workspace))
        selections = selection.load(folder.workspace)
        if selections is None:
            selections = selection.select(parts, sources, lambda wanted: engine.scan(sources, wanted))
            selection.save(folder.workspace, selections)
        jobs = _jobs(parts, selections, sources)
        tokenizer = _tokenizer(options, jobs, folder.workspace)
        task = task_of(options, tokenizer)
        continued = sum(split["tokens"] for record in folder.records.values() for split in record["splits"].values())
        plan = Plan(task, sources, options.packing, folder.place(task.dtype))
        todo = [job for job in jobs if job.number not in folder.records]
        done = sum(record["counts"]["text_bytes"] for record in folder.records.values())
        total = None if text_bytes is None else max(0, round(text_bytes) - done)
        with _bar(options, "converting", total) as bar:
            for record in engine.convert(plan, todo, bar):
                folder.records[record["number"]] = record
        if not any(record["counts"]["documents"] for record in folder.records.values()):
            folder.forget()  # there is nothing to go on from
            raise no_text(sources)
        splits, counts, unreadable = _count(folder.records, task, sources)
        meta = Meta(
            tokenizer=describe_tokenizer(
                tokenizer, tokenizer.name_or_path if options.tokenizer == TRAIN else options.tokenizer
            ),
            max_seq_length=options.max_seq_length,
            packing=options.packing,
            seed=options.seed,
            conversion={
                **asdict(sources),
                "lines": options.lines,
                "overflow": options.overflow,
                "val_fraction": options.val_fraction,
                "compression": options.compression,
            },
            splits=splits,
            sources=counts,
        )
        size = folder.finish(meta, tokenizer)
    return Summary(
        options.out, splits, counts, unreadable, options.max_seq_length, size, time.monotonic() - start, continued
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
    if options.master is not None and options.engine != "spark":
        raise UserError(f"--master {options.master} is for --engine spark")
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}; expected at least 1")


def _text_bytes(options: Conversion) -> float | None:
    """About how many bytes of text there will be, if a look can tell; refuses to begin where the disk is too small."""
    text = estimate_text(options.sources, _LOOK_BYTES)
    if text is None:
        return None
    if not options.ignore_disk:
        check_free_space(options.out, text.text_bytes)
    return text.text_bytes


def _bar(options: Conversion, what: str, total: int | None = None) -> tqdm:
    """A bar of bytes of text; where nobody watches, as in the log of a batch job, a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=what,
        total=total,
        unit="B",
        unit_scale=True,
        mininterval=interval,
        maxinterval=30.0,
        disable=not options.progress,
    )


def _docstring_files(options: Conversion, workspace: str) -> list[str]:
    """The docstrings of the installed packages as a file of JSON lines, which is divided as others are."""
    sources = options.sources
    if all(source.path != DOCSTRINGS for source in sources.sources):
        return []
    folder = os.path.join(workspace, DOCSTRINGS)
    whole = os.path.join(folder, "docstrings.jsonl")
    if not os.path.isfile(whole):
        os.makedirs(folder, exist_ok=True)
        documents = size = 0
        # What is left out later does not count to the limits, so that more may be needed than this.
        plain = not (sources.deduplicate or sources.min_characters or sources.drop_lines or sources.normalize)
        with open(f"{whole}.tmp", "w", encoding="utf-8") as file:
            for text in read_docstrings(options.workers):
                if plain and not_wanted(sources, documents, size):
                    break
                file.write(json.dumps({_column(sources): text}) + "\n")
                documents, size = documents + 1, size + len(text.encode())
        os.replace(f"{whole}.tmp", whole)
    return [whole]


def _column(sources: Sources) -> str:
    return next(source.text_column for source in sources.sources if source.path == DOCSTRINGS)


def _jobs(parts: list[Part], selections: list[Selection], sources: Sources) -> list[Job]:
    """The parts in the order of their numbers; those of which nothing is taken are not among them."""
    selection_of = dict(zip(parts, selections, strict=True))
    wanted = [part for part in parts if not selection_of[part].is_empty]
    return [Job(number, part, selection_of[part._replace(copy=0)]) for number, part in enumerate(mix(wanted, sources))]


def _tokenizer(options: Conversion, jobs: list[Job], workspace: str) -> PreTrainedTokenizerFast:
    """The tokenizer that the options name; a trained one is kept, so that a continued conversion has the same."""
    if options.tokenizer != TRAIN:
        return load_tokenizer(options.tokenizer, options.cased, options.keep_accents)
    kept = os.path.join(workspace, TOKENIZER)
    if not os.path.isdir(kept):
        sample = list(_sample(options, jobs))
        if not sample:
            raise no_text(options.sources)
        tokenizer = train_tokenizer(
            sample, options.vocab_size, options.cased, options.keep_accents, progress=options.progress
        )
        tokenizer.save_pretrained(f"{kept}.tmp")
        os.replace(f"{kept}.tmp", kept)
    tokenizer = load_tokenizer(kept)
    tokenizer.name_or_path = f"trained-{len(tokenizer)}"
    return tokenizer


def _sample(options: Conversion, jobs: list[Job]) -> Iterator[str]:
    """Text for a vocabulary: the start of parts all over the sources, in proportion to what each gives."""
    chosen = jobs[:: max(1, -(-len(jobs) // VOCABULARY_PARTS))]
    with _bar(options, "reading text for the vocabulary") as bar:
        for job in chosen:
            documents = part_documents(job.part, options.sources, ReadStats())
            mask = job.selection.chosen
            if mask is not None:
                documents = itertools.compress(documents, mask.tolist())
            size = 0
            for document in documents:
                yield document.text
                bar.update(document.size)
                size += document.size
                if size >= max(MIN_PART, VOCABULARY_BYTES // len(chosen)):
                    break


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


def _plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that cuts and pads nothing."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _count(
    records: dict[int, dict[str, Any]], task: Task, sources: Sources
) -> tuple[dict[str, SplitCounts], dict[str, SourceCounts], list[str]]:
    """Counts of all parts by split and by source, and what was wrong with files that were left out."""
    splits = {name: _sum(SplitCounts, [record["splits"][name] for record in records.values()]) for name in task.splits}
    counts = {
        source.label: _sum(
            SourceCounts, [record["counts"] for record in records.values() if record["source"] == number]
        )
        for number, source in enumerate(sources.sources)
    }
    unreadable: dict[str, str] = {}  # a file may be in several parts, and in several copies of them
    for number in sorted(records):
        for path, reason in records[number]["unreadable"].items():
            if path not in unreadable:
                unreadable[path] = reason
                counts[sources.sources[records[number]["source"]].label].unreadable_files += 1
    return splits, counts, list(unreadable.values())


def _sum(kind: type[Counts], parts: Iterable[dict[str, int]]) -> Counts:
    total = dict.fromkeys((part.name for part in fields(kind)), 0)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return kind(**total)
