"""Convert documents to a folder of shards: divide the sources into parts, convert them in parallel, merge the results.

The shards depend on the sources and the options only, not on the number of workers or the order in which they finish.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial

from tqdm import tqdm

from electra_composer.atomic_files import replaced_file
from electra_composer.corpus import selection
from electra_composer.corpus.docstrings import read_docstrings
from electra_composer.corpus.documents import limit_reached, no_text_error
from electra_composer.corpus.engines import Processes, Spark
from electra_composer.corpus.estimate import check_free_space, estimate_text
from electra_composer.corpus.finished import Finished
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.corpus.options import Conversion, check_options
from electra_composer.corpus.part_conversion import Job, PartContext
from electra_composer.corpus.progress import progress_bar
from electra_composer.corpus.source_parts import interleave, list_parts
from electra_composer.corpus.sources import DOCSTRINGS
from electra_composer.corpus.splits import changes, split_limit
from electra_composer.corpus.summary import Summary, total_counts
from electra_composer.corpus.tokenizer import encoding_settings, load_given, train_or_load
from electra_composer.errors import UserError
from electra_composer.storage.shard_folder import Meta, describe_tokenizer

_ESTIMATE_BYTES = 1 << 20  # of text to read to estimate the size of the sources


def convert(options: Conversion) -> Summary:
    """Convert documents to a folder of shards, which appears only when it is complete.

    Raises:
        UserError: invalid options, sources or tokenizer that cannot be read, an output folder that cannot be written.
    """
    start = time.monotonic()
    check_options(options)
    sources = options.sources
    given = load_given(options)
    with ShardFolder(options.out, options.overwrite, options.compression, options.plan(), options.restart) as folder:
        if folder.finished is not None:
            return _summary_of(folder.finished, options, time.monotonic() - start)
        text_bytes = _estimate_bytes(options)
        engine = Spark(options.master) if options.engine == "spark" else Processes(options.workers)
        jobs = _list_jobs(options, folder.workspace, engine)
        tokenizer = given
        if tokenizer is None or options.add_vocabulary is not None:
            tokenizer = train_or_load(options, jobs, folder.workspace, given)
        settings = encoding_settings(options, tokenizer)
        resumed = [record["counts"] for record in folder.records.values()]
        context = PartContext(settings, sources, options.packing, folder.place(settings.dtype))
        done = sum(counts["text_bytes"] for counts in resumed)
        total = None if text_bytes is None else max(0, round(text_bytes) - done)
        with progress_bar("converting", options.progress, total) as bar:
            _convert_parts(folder, engine, context, jobs, bar)
        filled = _fill_splits(folder, engine, context, jobs)
        splits, counts, unreadable = total_counts(folder.records, settings.splits, sources)
        name = options.tokenizer if tokenizer is given else tokenizer.name_or_path
        meta = Meta(
            tokenizer=describe_tokenizer(tokenizer, name),
            max_seq_length=options.max_seq_length,
            packing=options.packing,
            seed=options.seed,
            conversion={
                **sources.to_dict(),
                "lines": options.lines,
                "overflow": options.overflow,
                "val_fraction": options.val_fraction,
                "compression": options.compression,
                **({"unreadable": unreadable} if unreadable else {}),
            },
            splits=splits,
            sources=counts,
        )
        size = folder.finish(meta, tokenizer)
    return Summary(
        out=options.out,
        splits=splits,
        sources=counts,
        unreadable=unreadable,
        max_seq_length=options.max_seq_length,
        shard_bytes=size,
        seconds=time.monotonic() - start,
        continued_tokens=sum(counts["tokens"] for counts in resumed),
        filled_split=filled,
    )


def _summary_of(finished: Finished, options: Conversion, seconds: float) -> Summary:
    """Return the summary of a conversion that an earlier run has finished."""
    meta = finished.meta
    return Summary(
        out=options.out,
        splits=meta.splits,
        sources=meta.sources,
        unreadable=meta.conversion.get("unreadable", []),
        max_seq_length=meta.max_seq_length,
        shard_bytes=finished.bytes,
        seconds=seconds,
        continued_tokens=sum(counts.tokens for counts in meta.splits.values()),
        was_complete=True,
    )


def _convert_parts(
    folder: ShardFolder, engine: Processes | Spark, context: PartContext, jobs: list[Job], bar: tqdm
) -> None:
    """Convert the parts that have no record yet."""
    todo = [job for job in jobs if job.number not in folder.records]
    for record in engine.convert(context, todo, bar):
        folder.records[record["number"]] = record


def _fill_splits(folder: ShardFolder, engine: Processes | Spark, context: PartContext, jobs: list[Job]) -> str | None:
    """Convert the parts again from which a split gets a document that would be empty otherwise; return its name.

    Raises:
        UserError: no text, or only one document for two splits.
    """
    records = folder.records
    try:
        if not any(split["rows"] for record in records.values() for split in record["splits"].values()):
            raise no_text_error(context.sources)
        limit = split_limit(records.values(), context.settings.val_fraction)
    except UserError:
        folder.forget()
        raise
    folder.discard([number for number, record in records.items() if changes(record, limit)])
    wanted = context.settings.val_fraction
    context = context._replace(settings=context.settings._replace(val_fraction=limit))
    with progress_bar("", enabled=False) as bar:
        _convert_parts(folder, engine, context, jobs, bar)
    return None if limit == wanted else "val" if limit > wanted else "train"


def _estimate_bytes(options: Conversion) -> float | None:
    """Estimate the bytes of text in the sources; None if they would have to be read completely.

    Raises:
        UserError: the disk is too small for the shards.
    """
    text = estimate_text(options.sources, _ESTIMATE_BYTES)
    if text is None:
        return None
    if not options.ignore_disk:
        check_free_space(options.out, text.text_bytes)
    return text.text_bytes


def _list_jobs(options: Conversion, workspace: str, engine: Processes | Spark) -> list[Job]:
    """Return the parts to convert in the order of their numbers, without those of which nothing is selected."""
    sources = options.sources
    parts = list_parts(sources, _write_docstrings(options, workspace))
    selections = selection.load(workspace)
    if selections is None:
        selections = selection.select(parts, sources, partial(engine.scan, sources))
        selection.save(workspace, selections)
    selection_of = dict(zip(parts, selections, strict=True))
    wanted = [part for part in parts if not selection_of[part].is_empty]
    numbered = enumerate(interleave(wanted, sources))
    return [Job(number, part, selection_of[part._replace(copy=0)]) for number, part in numbered]


def _write_docstrings(options: Conversion, workspace: str) -> list[str]:
    """Write the docstrings of the installed packages to JSON Lines, if they are a source; return the files."""
    sources = options.sources
    column = next((source.text_column for source in sources.sources if source.path == DOCSTRINGS), None)
    if column is None:
        return []
    path = os.path.join(workspace, DOCSTRINGS, "docstrings.jsonl")
    # Filters leave out documents later, so that limits cannot be applied here.
    filtered = sources.deduplicate or sources.min_characters or sources.drop_lines or sources.clean or sources.normalize
    if not os.path.isfile(path):
        with replaced_file(path) as file:
            documents = size = 0
            for text in read_docstrings(options.workers):
                if not filtered and limit_reached(sources, documents, size):
                    break
                file.write(json.dumps({column: text}).encode() + b"\n")
                documents, size = documents + 1, size + len(text.encode())
    return [path]
