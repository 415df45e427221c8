"""Convert text to MDS shards for pretraining.

Without options: OpenWebText from the Hugging Face Hub, sequence length 128, written to data/owt.

  python data_prep/convert_owt.py
  python data_prep/convert_owt.py --source docstrings --tokenizer train --vocab-size 8192 --out data/docstrings
  python data_prep/convert_owt.py --source 'corpus/*.jsonl.gz' --lines sentence --out data/corpus
  python data_prep/convert_owt.py --source owt/ --weight 1 --source wiki/ --weight 2.5 --out s3://bucket/mixed

If a conversion is interrupted, rerun the same command to resume it.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from electra_composer.arguments import ArgumentParser, number_of, parse_early
from electra_composer.corpus.options import TRAIN, Conversion
from electra_composer.corpus.sources import DOCSTRINGS, HUB, USED_BY, Source, Sources, read_mixture
from electra_composer.errors import UserError, report_user_errors


def parse_arguments(argv: list[str] | None) -> tuple[Conversion, str | None, bool]:
    """Return the conversion, the file of --json, and whether this is a --dry-run."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {**vars(Source()), **vars(Sources()), **vars(Conversion()), "weight": None, "workers": None}
    parser.set_defaults(**defaults)
    _add_source_options(parser.add_argument_group("sources").add_argument)
    _add_filter_options(parser.add_argument_group("filters and limits").add_argument)
    _add_output_options(parser.add_argument_group("output").add_argument)
    _add_example_options(parser.add_argument_group("tokens, examples and rows").add_argument)
    _add_execution_options(parser.add_argument_group("execution").add_argument)
    options = parser.parse_args(argv)
    conversion = Conversion(
        sources=Sources(_sources(options), **_values(options, Sources, "sources")),
        progress=not options.no_progress,
        workers=options.workers or _cpus(),
        **_values(options, Conversion, "sources", "progress", "workers"),
    )
    if options.workers and options.engine == "spark" and not options.dry_run:
        raise UserError("--workers has no effect with --engine spark; the number of processes is that of the cluster")
    return conversion, options.json, options.dry_run


def _add_source_options(add: Callable[..., object]) -> None:
    text = (
        "what to read: a .parquet, .arrow, .jsonl, .json, .csv, .tsv or .txt file (all but the first two also .gz or "
        ".zst), a .tar, .tar.gz or .tar.xz of .txt files, a folder or a glob of these, a data set written by "
        f"save_to_disk; {DOCSTRINGS}: docstrings of the installed Python packages; "
        f"{HUB}: --dataset (default). May be repeated"
    )
    add("--source", action="append", metavar="PATH", help=text)
    text = (
        "how often each document of a --source is taken: 2 twice, 0.5 every second one on average; if given, once for "
        "each --source, in the same order (default: 1)"
    )
    add("--weight", action="append", type=number_of(Source, "weight"), metavar="W", help=text)
    text = (
        "file that lists the sources, instead of --source and --weight: a list under sources:, each with some of the "
        f"keys {', '.join(part.name for part in fields(Source))}"
    )
    add("--mixture", metavar="YAML", help=text)
    text = "data set on the Hugging Face Hub; one with a loading script cannot be read (default: %(default)s)"
    add("--dataset", help=text)
    add("--dataset-config", dest="config", help="configuration of the data set, if it has several")
    text = "branch or commit of the data set; main: its original files (default: %(default)s, converted by the hub)"
    add("--revision", help=text)
    text = "split of a data set, on the hub or written by save_to_disk (default: %(default)s)"
    add("--dataset-split", dest="split", help=text)
    text = (
        "column of the text in everything but .txt; a.b: the key b of the object a; in csv and tsv without a header a "
        "number from 0 (default: %(default)s; in csv and tsv also the only column that looks like text)"
    )
    add("--text-column", help=text)
    text = (
        "what ends a document in a .txt file: blank (a blank line), file (the end of the file), or N (every N lines "
        "that are not blank) (default: %(default)s)"
    )
    add("--txt-documents", type=number_of(Source, "txt_documents"), metavar="blank|file|N", help=text)


def _add_filter_options(add: Callable[..., object]) -> None:
    text = "leave out documents shorter than N characters (default: %(default)s)"
    add("--min-characters", type=number_of(Sources, "min_characters"), metavar="N", help=text)
    text = "leave out lines in which this regular expression matches; may be repeated"
    add("--drop-lines", action="append", metavar="REGEX", help=text)
    text = 'seed: delete "()" from every line, as richarddwang/electra_pytorch does (default: none)'
    add("--clean", choices=("seed",), help=text)
    add("--deduplicate", action="store_true", help="leave out exact copies of earlier documents")
    text = "convert text to this Unicode normalization form (default: none)"
    add("--normalize", choices=("NFC", "NFKC"), help=text)
    text = "leave out the rest of a truncated or corrupt file and report it at the end, instead of stopping"
    add("--skip-unreadable", action="store_true", help=text)
    add("--max-documents", type=number_of(Sources, "max_documents"), metavar="N", help="stop after N documents")
    text = "stop after this much text, such as 50mb"
    add("--max-bytes", type=number_of(Sources, "max_bytes"), metavar="SIZE", help=text)


def _add_output_options(add: Callable[..., object]) -> None:
    text = "folder to write, or URL of an object store (s3://, gs://, …); must not exist (default: %(default)s)"
    add("--out", help=text)
    text = "write nothing; estimate documents, tokens, disk space and time from a sample"
    add("--dry-run", action="store_true", help=text)
    add("--ignore-disk", action="store_true", help="start even if free disk space seems too small")
    text = "discard an interrupted conversion into --out instead of resuming it"
    add("--restart", action="store_true", help=text)
    text = "replace an existing folder of shards once the new one is complete"
    add("--overwrite", action="store_true", help=text)
    add("--compression", help="compress the shards, for example with zstd or zstd:7 (default: none)")
    add("--json", metavar="FILE", help="also write the summary, or the estimate of --dry-run, to a JSON file")


def _add_example_options(add: Callable[..., object]) -> None:
    text = (
        "a vocab.txt (WordPiece), a folder with a tokenizer, the name of one on the Hugging Face Hub, or "
        f"{TRAIN}: train a WordPiece vocabulary on the sources (default: %(default)s)"
    )
    add("--tokenizer", help=text)
    text = "append the N most frequent words that the vocabulary splits, to continue pretraining a model of it"
    add("--add-vocabulary", type=number_of(Conversion, "add_vocabulary"), metavar="N", help=text)
    text = "number of entries of a vocabulary to train (default: %(default)s)"
    add("--vocab-size", type=number_of(Conversion, "vocab_size"), metavar="N", help=text)
    text = f"keep upper case and accents; for a vocab.txt or --tokenizer {TRAIN}"
    add("--cased", action="store_true", help=text)
    text = f"convert to lower case, but keep accents; for a vocab.txt or --tokenizer {TRAIN}"
    add("--keep-accents", action="store_true", help=text)
    text = "maximum number of tokens in a row (default: %(default)s)"
    add("--max-seq-length", type=number_of(Conversion, "max_seq_length"), metavar="N", help=text)
    text = "fill each row with as many examples as fit, or write one example per row (default: %(default)s)"
    add("--packing", choices=("packed", "one"), help=text)
    text = (
        "build segments from lines, as ELECTRA's original code does, or from sentences, for text without line breaks "
        "(default: %(default)s)"
    )
    add("--lines", choices=("newline", "sentence"), help=text)
    text = (
        "drop tokens beyond the length of an example, as ELECTRA's original code does, or start the next example with "
        "them (default: %(default)s)"
    )
    add("--overflow", choices=("cut", "carry"), help=text)
    text = (
        "fraction of the documents for the validation split, which gets at least one document; 0: no such split "
        "(default: %(default)s)"
    )
    add("--val-fraction", type=number_of(Conversion, "val_fraction"), metavar="F", help=text)
    text = "seed of examples and split (default: %(default)s)"
    add("--seed", type=number_of(Conversion, "seed"), metavar="N", help=text)


def _add_execution_options(add: Callable[..., object]) -> None:
    text = f"number of processes, which the output does not depend on (default: CPUs, at most 16; here {_cpus()})"
    add("--workers", type=number_of(Conversion, "workers"), metavar="N", help=text)
    text = "local processes or Apache Spark; the output is the same (default: %(default)s)"
    add("--engine", choices=("local", "spark"), help=text)
    text = "Spark master, such as local[2] or spark://host:7077 (default: that of spark-submit)"
    add("--master", metavar="URL", help=text)
    add("--no-progress", action="store_true", help="show no progress bar")


def _values(options: argparse.Namespace, cls: type, *but: str) -> dict[str, Any]:
    return {part.name: getattr(options, part.name) for part in fields(cls) if part.name not in but}


def _sources(options: argparse.Namespace) -> list[Source]:
    """Return the sources of --mixture, or of --source and --weight.

    Raises:
        UserError: both are given, or the numbers of sources and weights differ; an option is for none of the sources.
    """
    values = _values(options, Source, "path", "name", "weight")
    given = {name: value for name, value in values.items() if value != getattr(Source(), name)}
    other = {"config": "--dataset-config", "split": "--dataset-split"}
    options_of = {name: other.get(name, f"--{name.replace('_', '-')}") for name in given}
    if options.mixture is not None:
        if options.source or options.weight:
            raise UserError("--mixture cannot be combined with --source and --weight; put the sources into its file")
        if given:
            option = next(iter(options_of.values()))
            raise UserError(f"{option} has no effect with --mixture; put it into its file, as a key of a source")
        return read_mixture(options.mixture)
    paths = options.source or [HUB]
    weights = options.weight or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"--weight was given {len(weights)} times for {len(paths)} sources; expected one for each")
    sources = [Source(path, weight=weight) for path, weight in zip(paths, weights, strict=True)]
    for name, value in given.items():
        kinds, words = USED_BY[name]
        users = [source for source in sources if source.kinds & kinds]
        if not users:
            raise UserError(f"{options_of[name]} {value} has no effect on {Sources(sources)}; it is for {words}")
        for source in users:
            setattr(source, name, value)
    return sources


def _cpus() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


if __name__ == "__main__":  # before the imports that take seconds
    parse_early(parse_arguments)

from electra_composer.corpus.conversion import convert
from electra_composer.corpus.dry_run import DryRun, dry_run
from electra_composer.corpus.readers import describe_columns
from electra_composer.corpus.summary import Summary, check_json_file, write_json
from electra_composer.next_steps import describe_end, pretrain, preview
from electra_composer.signals import unwind
from electra_composer.storage.remotes import is_remote

OPENWEBTEXT_DOCUMENTS = 8_013_769  # according to its authors
MUCH_DROPPED = 0.05  # fraction of tokens above which a warning is printed


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def report(conversion: Conversion, summary: Summary) -> None:
    """Print the summary, and warnings about what the user may not have intended."""
    print(summary)
    if summary.dropped_share > MUCH_DROPPED:
        _warn(
            f"{summary.dropped_share:.0%} of the tokens were dropped, because lines are longer than --max-seq-length "
            f"{conversion.max_seq_length} allows; --lines sentence and --overflow carry keep them"
        )
    text = summary.text
    if text.invalid_documents:
        _warn(f"{text.invalid_documents:,} documents contain bytes that are not UTF-8, read as U+FFFD")
    for reason in summary.unreadable:
        _warn(f"left out the rest of {reason}")
    left_out = {
        "short documents": text.short_documents,
        "duplicates": text.duplicate_documents,
        "lines": text.dropped_lines,
        "unreadable files": text.unreadable_files,
    }
    if any(left_out.values()):
        print("left out: " + ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count))
    if summary.filled_split is not None:
        _warn(
            f"--val-fraction {conversion.val_fraction} of {summary.total.documents:,} documents leaves the "
            f"{summary.filled_split} split empty; it got one document"
        )
    sources = conversion.sources
    unlimited = sources.max_documents is None and sources.max_bytes is None
    documents = summary.total.documents
    if sources.sources == [Source()] and unlimited and documents < OPENWEBTEXT_DOCUMENTS:
        _warn(
            f"read only {documents:,} of OpenWebText's {OPENWEBTEXT_DOCUMENTS:,} documents: the hub converts only the "
            "first gigabytes of a large data set to parquet; pass a full copy as --dataset or --source"
        )


def describe_shards(summary: Summary) -> str:
    """Describe where the shards are, and the commands that come next."""
    out, stored = summary.out, is_remote(summary.out)
    commands = {"look at them": None if stored else preview(out)}
    commands["pretrain on them"] = pretrain(out, summary.max_seq_length, stored)
    return describe_end({"shards": out}, commands)


@report_user_errors
def main(argv: list[str] | None = None) -> Summary | DryRun:
    """Run the command line: convert, print the summary and return it."""
    conversion, json_file, only_estimate = parse_arguments(argv)
    if json_file is not None:
        check_json_file(json_file)
    unwind()
    for line in describe_columns(conversion.sources):
        print(line)
    result = dry_run(conversion) if only_estimate else convert(conversion)
    if json_file is not None:
        write_json(json_file, result.to_dict(), result.out if isinstance(result, Summary) else None)
    if isinstance(result, Summary):
        report(conversion, result)
        print(describe_shards(result))
    else:
        print(result)
    return result


if __name__ == "__main__":
    main()
