"""Convert text to shards for pretraining. Without options: the hub's OpenWebText, for length 128, into data/owt.

python data_prep/convert_owt.py
python data_prep/convert_owt.py --source docstrings --tokenizer train --vocab-size 8192 --out data/docstrings
python data_prep/convert_owt.py --source 'corpus/*.jsonl.gz' --lines sentence --out data/corpus
python data_prep/convert_owt.py --source owt/ --weight 1 --source wiki/ --weight 2.5 --out s3://bucket/mixed
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import fields
from typing import Any

from streaming.base.util import bytes_to_int

from electra_composer.corpus.conversion import TRAIN, Conversion, Summary, convert
from electra_composer.corpus.dry_run import DryRun, dry_run
from electra_composer.corpus.sources import DOCSTRINGS, HUB, Source, Sources, read_mixture
from electra_composer.errors import UserError, report_user_errors

OPENWEBTEXT_DOCUMENTS = 8_013_769  # as its makers count them
MUCH_DROPPED = 0.25


def parse_arguments(argv: list[str] | None) -> tuple[Conversion, str | None, bool]:
    defaults, source = Conversion(), Source()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    add = parser.add_argument_group("what is read").add_argument
    add(
        "--source",
        action="append",
        metavar="PATH",
        help=f"a .parquet, .jsonl or .txt (the last two also .gz or .zst), a .tar(.gz, .xz) of .txt, "
        f"a folder or a glob of these; {DOCSTRINGS}: "
        f"of the Python packages installed here; {HUB} (default): --dataset. Several may be given",
    )
    add(
        "--weight",
        action="append",
        type=float,
        metavar="W",
        help="of each --source, in their order: how often its documents are taken; 2: twice, 0.5: every second one",
    )
    add(
        "--mixture",
        metavar="YAML",
        help="the sources in a file instead: a list under sources:, each with path, name, weight, text_column, "
        "txt_documents, dataset, config, revision as needed",
    )
    add("--dataset", default=source.dataset, help="on the hub, not one with a loading script (default: %(default)s)")
    add("--dataset-config", help="configuration of the data set, if it has several")
    add(
        "--revision",
        default=source.revision,
        help="of the data set; main for its own files (default: %(default)s, the hub's own conversion to parquet)",
    )
    add("--text-column", default=source.text_column, help="in parquet, JSON lines and the hub (default: %(default)s)")
    add(
        "--txt-documents",
        choices=("blank", "file"),
        default="blank",
        help="what ends a document in .txt: a blank line (default), or the file",
    )

    add = parser.add_argument_group("what is left out, and what is made of it").add_argument
    add("--min-characters", type=int, default=0, help="leave out shorter documents (default: %(default)s)")
    add(
        "--drop-lines",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out lines in which this regular expression is found; several may be given",
    )
    add("--deduplicate", action="store_true", help="leave out documents that were there before, to the letter")
    add("--normalize", choices=("NFC", "NFKC"), help="bring all text into this Unicode form (default: as it is)")
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave out the rest of a file that is cut short or damaged, name and count it, instead of stopping there",
    )
    add("--max-documents", type=int, help="stop after so many")
    add("--max-bytes", type=_size, help="stop after so much text, such as 50mb")

    add = parser.add_argument_group("where it goes").add_argument
    add(
        "--out",
        default=defaults.out,
        help="folder to write, or a URL of an object store (s3://, gs://, azure://, …); must not exist "
        "(default: %(default)s)",
    )
    add("--dry-run", action="store_true", help="write nothing; tell documents, tokens, disk and time, by a sample")
    add("--ignore-disk", action="store_true", help="begin even if there seems to be too little room")
    add("--restart", action="store_true", help="begin anew where an interrupted conversion left finished parts")
    add("--overwrite", action="store_true", help="replace a folder of shards, once the new one is whole")
    add("--compression", help="of the shards, such as zstd (default: none)")
    add("--json", metavar="FILE", help="also write the summary there")

    add = parser.add_argument_group("tokens, examples, rows").add_argument
    add(
        "--tokenizer",
        default=defaults.tokenizer,
        help=f"a vocab.txt (WordPiece), a tokenizer's folder, its name on the hub, or {TRAIN}: a new WordPiece "
        "vocabulary from the sources (default: %(default)s)",
    )
    add("--vocab-size", type=int, default=defaults.vocab_size, help=f"of --tokenizer {TRAIN} (default: %(default)s)")
    add("--cased", action="store_true", help=f"keep upper case and accents; of a vocab.txt and {TRAIN}")
    add("--keep-accents", action="store_true", help=f"lower-case, but keep accents; of a vocab.txt and {TRAIN}")
    add("--max-seq-length", type=int, default=defaults.max_seq_length, help="tokens in a row (default: %(default)s)")
    add(
        "--packing",
        choices=("packed", "one"),
        default=defaults.packing,
        help="as many examples as fit in a row (default), or one",
    )
    add(
        "--lines",
        choices=("newline", "sentence"),
        default=defaults.lines,
        help="what a segment is made of: lines (default, the recipe), or sentences, for text without line breaks",
    )
    add(
        "--overflow",
        choices=("cut", "carry"),
        default=defaults.overflow,
        help="tokens beyond an example's length: dropped (default, the recipe), or the start of the next one",
    )
    add(
        "--val-fraction",
        type=float,
        default=defaults.val_fraction,
        help="share of the documents that is kept for validation (default: %(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, help="of examples and split (default: %(default)s)")

    add = parser.add_argument_group("how it runs").add_argument
    add(
        "--workers",
        type=int,
        default=_cpus(),
        help="processes; the output does not depend on it (default here: %(default)s)",
    )
    add(
        "--engine",
        choices=("local", "spark"),
        default=defaults.engine,
        help="processes of this machine (default), or Apache Spark; the output is the same",
    )
    add(
        "--master",
        metavar="URL",
        help="of Spark, such as local[2] or spark://host:7077 (default: as spark-submit says)",
    )
    add("--no-progress", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    conversion = Conversion(
        sources=Sources(
            _sources(options),
            **_values(options, Sources, "sources"),
        ),
        progress=not options.no_progress,
        **_values(options, Conversion, "sources", "progress"),
    )
    return conversion, options.json, options.dry_run


def _values(options: argparse.Namespace, cls: type, *but: str) -> dict[str, Any]:
    return {part.name: getattr(options, part.name) for part in fields(cls) if part.name not in but}


def _sources(options: argparse.Namespace) -> list[Source]:
    """Of --mixture, or of each --source with its --weight.

    Raises:
        UserError: both, or another number of weights.
    """
    if options.mixture is not None:
        if options.source or options.weight:
            raise UserError("--mixture names the sources and their weights; give it, or --source and --weight")
        return read_mixture(options.mixture)
    paths = options.source or [HUB]
    weights = options.weight or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise UserError(f"--weight was given {len(weights)} times for {len(paths)} sources; expected one for each")
    return [
        Source(
            path,
            weight=weight,
            text_column=options.text_column,
            txt_documents=options.txt_documents,
            dataset=options.dataset,
            config=options.dataset_config,
            revision=options.revision,
        )
        for path, weight in zip(paths, weights, strict=True)
    ]


def _cpus() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _size(text: str) -> int:
    try:
        return bytes_to_int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 50mb") from error


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def report(conversion: Conversion, summary: Summary) -> None:
    """Print what was done, and what in it may not be what the person wanted."""
    print(summary)
    if summary.dropped_share > MUCH_DROPPED:
        _warn(
            f"{summary.dropped_share:.0%} of the tokens were dropped, because the lines are long against "
            f"--max-seq-length {conversion.max_seq_length}; --lines sentence and --overflow carry keep them"
        )
    text = summary.text
    if text.invalid_documents:
        _warn(f"{text.invalid_documents:,} documents hold bytes that are not UTF-8, read as U+FFFD")
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
    for name, counts in summary.splits.items():
        if not counts.rows:
            _warn(f"the {name} split is empty; choose another --val-fraction or --seed")
    sources = conversion.sources
    whole = sources.max_documents is None and sources.max_bytes is None
    documents = summary.total.documents
    if sources.sources == [Source()] and whole and documents < OPENWEBTEXT_DOCUMENTS:
        _warn(
            f"{documents:,} of OpenWebText's {OPENWEBTEXT_DOCUMENTS:,} documents: the hub converts only the first "
            "gigabytes of a large data set to parquet; a full copy can be given by --dataset or --source"
        )


@report_user_errors
def main(argv: list[str] | None = None) -> Summary | DryRun:
    """Convert as the command line says, print the summary and return it.

    Raises:
        SystemExit: with 2 and one line of text for what the person can mend; 130 and 143 when interrupted.
    """
    conversion, json_file, only_estimate = parse_arguments(argv)
    if only_estimate:
        estimate = dry_run(conversion)
        print(estimate)
        return estimate
    if json_file is not None and not os.path.isdir(os.path.dirname(os.path.abspath(json_file))):
        raise UserError(f"--json {json_file}: no such folder")
    summary = convert(conversion)
    report(conversion, summary)
    if json_file is not None:
        with open(json_file, "w", encoding="utf-8") as file:
            json.dump(summary.to_dict(), file, indent=2)
    return summary


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written stays
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
