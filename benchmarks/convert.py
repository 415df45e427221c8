"""Conversion to shards compared with a single-process baseline and with the tokenizer alone; prints one JSON line.

    python benchmarks/convert.py --source '../shared/data/corpus/*.jsonl.gz' --tokenizer vocab.txt --workers 2

`usual` is one process that calls the tokenizer line by line, as most data preparation scripts do, and builds, packs and
writes the same rows. `tokenizer` is only `encode_batch_fast` of the `tokenizers` library on all lines at once, on all
cores: an upper bound for any conversion. The variants run in alternation; the result is MB of text per second, from
documents in memory. The exit status is 1 unless `usual` and `ours` write the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import interleave, print_result
from transformers import PreTrainedTokenizerFast

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.corpus.chunks import document_lines
from electra_composer.corpus.conversion import Conversion, Summary, convert
from electra_composer.corpus.documents import ReadStats, read_documents
from electra_composer.corpus.examples import ExampleBuilder, Packer
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.corpus.sources import Sources
from electra_composer.errors import report_user_errors
from electra_composer.storage.shard_folder import Meta, SplitCounts, describe_tokenizer, id_dtype
from electra_composer.vocabulary import load_tokenizer, special_ids

LENGTH = 128


def usual(documents: list[str], tokenizer: PreTrainedTokenizerFast, lines: str, out: str) -> int:
    """Convert in one process with one tokenizer call per line; return the number of tokens in the rows."""
    ids, dtype, counts = special_ids(tokenizer), id_dtype(len(tokenizer)), SplitCounts(documents=len(documents))
    builder = ExampleBuilder(LENGTH, ids["cls"], ids["sep"], random.Random(0), "carry")
    packer = Packer(LENGTH)
    with ShardFolder(out) as folder:
        part = folder.begin(dtype, ["train"])

        def write(rows: Any) -> None:
            for row in rows:
                counts.rows += 1
                counts.tokens += len(row.input_ids)
                part.write("train", row)

        for document in documents:
            for line in document_lines(document, lines):
                for example in builder.add_line(tokenizer(line, add_special_tokens=False)["input_ids"]):
                    write(packer.add(example))
            for example in builder.end_document():
                write(packer.add(example))
        write(packer.finish())
        folder.finish(
            Meta(describe_tokenizer(tokenizer, "usual"), LENGTH, "packed", 0, {}, {"train": counts}), tokenizer
        )
    return counts.tokens


def tokenizer_alone(documents: list[str], tokenizer: PreTrainedTokenizerFast, lines: str) -> int:
    """Encode all lines with `encode_batch_fast` on all cores; return the number of tokens."""
    batch = list(itertools.chain.from_iterable(document_lines(document, lines) for document in documents))
    total = 0
    for first in range(0, len(batch), 20_000):
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(
            batch[first : first + 20_000], add_special_tokens=False
        )
        total += sum(map(len, encodings))
    return total


def words_in(folder: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the tokens in a folder of shards other than `[CLS]` and `[SEP]`, the only tokens that conversion adds."""
    reader = reader_of_split(folder, "train")
    assert reader is not None  # written by this program, uncompressed
    ids = reader.read(np.arange(reader.rows)).input_ids
    special = special_ids(tokenizer)
    return int((~np.isin(ids, [special["cls"], special["sep"]])).sum())


class Runs:
    """Callable that runs a conversion into a new folder each time and keeps its results."""

    def __init__(self, make: Callable[[str], Any], folder: str, name: str) -> None:
        self._make, self._folder, self._name = make, folder, name
        self.results: list[Any] = []

    def __call__(self) -> None:
        self.results.append(self._make(os.path.join(self._folder, f"{self._name}-{len(self.results)}")))


@report_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Measure and print one JSON line.

    Returns:
        1 if the variants do not give the same tokens, otherwise 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--lines", choices=("newline", "sentence"), default="sentence")
    parser.add_argument("--megabytes", type=float, default=20, help="of text to convert (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    sources = Sources.of(options.source, max_bytes=int(options.megabytes * 1e6))
    documents = list(read_documents(sources, ReadStats()))
    tokenizer = load_tokenizer(options.tokenizer)
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))

        def ours(out: str) -> Summary:
            settings = {"max_seq_length": LENGTH, "lines": options.lines, "overflow": "carry", "val_fraction": 0.0}
            rest = {"workers": options.workers, "progress": False}
            return convert(Conversion(Sources.of(str(text)), out, options.tokenizer, **settings, **rest))

        def alone(_: str) -> int:
            os.environ["TOKENIZERS_PARALLELISM"] = "true"
            return tokenizer_alone(documents, tokenizer, options.lines)

        runs = {
            "usual": Runs(partial(usual, documents, tokenizer, options.lines), folder, "usual"),
            "ours": Runs(ours, folder, "ours"),
            "tokenizer": Runs(alone, folder, "tokenizer"),
        }
        seconds = interleave(dict(runs), options.repeats, warmup=1, device="cpu")  # type: ignore[arg-type]
        words = [words_in(os.path.join(folder, name), tokenizer) for name in ("usual-0", "ours-0")]
    speed = {name: megabytes / statistics.median(taken) for name, taken in seconds.items()}
    summary = runs["ours"].results[-1]
    print_result(
        "convert",
        lines=options.lines,
        workers=options.workers,
        max_seq_length=LENGTH,
        text_megabytes=round(megabytes, 2),
        tokens=summary.total.tokens,
        megabytes_per_second={name: round(value, 2) for name, value in speed.items()},
        ours_tokens_per_second=round(speed["ours"] * summary.total.tokens / megabytes),
        ours_over_usual=round(speed["ours"] / speed["usual"], 2),
        ours_over_tokenizer=round(speed["ours"] / speed["tokenizer"], 3),
    )
    if {*words, runs["tokenizer"].results[0]} != {words[0]}:
        print(f"not the same text: {words} and {runs['tokenizer'].results[0]} tokens", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
