"""Build a small synthetic GLUE-style task from plain text: original against corrupted sentences.

    python -m electra_composer.finetuning.synthetic --source docstrings --out data/synthetic_glue

The task is **synthetic** and named so wherever it appears; its scores do not compare with published ones. It shows the
gain from pretraining in a minute. In a corrupted sentence, some words are replaced by others, drawn uniformly from the
words of the text. To detect this, a model must know which words fit where; a few hundred examples show few of them.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from electra_composer.arguments import ArgumentParser, number, number_of
from electra_composer.atomic_files import replaced_folder
from electra_composer.corpus.documents import ReadStats, read_documents
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetuning.tasks import TASKS
from electra_composer.ranges import Range

TASK = TASKS["synthetic-words"]
WORDS = range(6, 19)  # words of a sentence; with [CLS] and [SEP] it fits into the 32 tokens of the quickstart
REPLACEABLE = re.compile(r"[A-Za-z]{2,}")  # words that may be replaced: without punctuation
REPLACED_FRACTION = 0.25  # of the replaceable words of a corrupted sentence, at least MIN_REPLACED words
MIN_REPLACED = 2
MIN_COUNT = 2  # occurrences of a word that may replace another
PER_DOCUMENT = 8  # maximum number of sentences of one document, so that many documents contribute
EXAMPLES = Range(ge=1, le=10**7)  # of a split
MAX_DOCUMENTS = 100_000  # maximum number of documents to read
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True)
class Labelled:
    """A sentence with its label: original (1) or corrupted (0)."""

    sentence: str
    label: int


def sentences(text: str) -> Iterator[str]:
    """Yield the prose sentences of 6 to 18 words in order, with whitespace reduced to single spaces.

    A blank line ends a sentence too. Text that is mostly not words (code, tables, markup) is skipped.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split(" ")
            if len(words) not in WORDS or not sentence[0].isalpha() or sentence[-1] not in ".!?":
                continue
            if sum(bool(REPLACEABLE.fullmatch(word)) for word in words) >= 0.75 * len(words):
                yield sentence


def vocabulary(pool: Iterable[str]) -> list[str]:
    """Return the replacement words: all that occur at least :data:`MIN_COUNT` times, sorted."""
    counts = Counter(
        word.casefold() for sentence in pool for word in sentence.split(" ") if REPLACEABLE.fullmatch(word)
    )
    return sorted(word for word, count in counts.items() if count >= MIN_COUNT)


def corrupt(sentence: str, words: list[str], rng: random.Random) -> str | None:
    """Replace about a quarter of the words of a sentence by other words; return None if it has too few.

    The first word and words with punctuation are kept, because their replacements would lack capitals and punctuation.
    """
    parts = sentence.split(" ")
    replaceable = [i for i in range(1, len(parts)) if REPLACEABLE.fullmatch(parts[i])]
    count = max(MIN_REPLACED, round(REPLACED_FRACTION * len(replaceable)))
    if len(replaceable) < count:
        return None
    for i in rng.sample(replaceable, count):
        word = rng.choice(words)
        while word == parts[i].casefold():
            word = rng.choice(words)
        parts[i] = word
    return " ".join(parts)


def build(documents: Iterable[str], train_size: int, dev_size: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Build train and dev sets: balanced, without duplicates, from different documents, determined by input and seed.

    A sentence is used once, original or corrupted, so that no pair reveals an answer.

    Args:
        documents: texts; read once.
        train_size, dev_size: number of examples; rounded down to even numbers.

    Raises:
        UserError: there are not enough sentences.
    """
    rng = random.Random(seed)
    sizes = {"dev": dev_size - dev_size % 2, "train": train_size - train_size % 2}
    pools: dict[str, list[str]] = {"dev": [], "train": []}
    dev_fraction = max(0.1, sizes["dev"] / max(1, sum(sizes.values())))
    seen: set[str] = set()
    for document in documents:
        found = list(sentences(document))
        part = "dev" if rng.random() < dev_fraction else "train"
        for sentence in rng.sample(found, min(len(found), PER_DOCUMENT)):
            if (key := sentence.casefold()) not in seen:
                seen.add(key)
                pools[part].append(sentence)
    parts = {}
    words = vocabulary(pools["dev"] + pools["train"])
    if len(words) < 2:
        raise UserError(
            f"synthetic task: {len(words)} words occur {MIN_COUNT} times; expected at least 2: give more text"
        )
    for part, size in sizes.items():
        rng.shuffle(pools[part])
        parts[part] = _label(pools[part], size, words, rng)
        if len(parts[part]) < size or not size:
            raise UserError(
                f"synthetic task: {len(parts[part])} sentences of {WORDS[0]} to {WORDS[-1]} words for {part}; "
                f"expected {max(size, 2)}: give more text, or a smaller --{part}"
            )
    return parts["train"], parts["dev"]


def _label(pool: list[str], size: int, words: list[str], rng: random.Random) -> list[Labelled]:
    """Take the first `size` sentences that can be corrupted, corrupt every other one, and shuffle.

    Original sentences must be corruptible too; otherwise, sentences that are not would always be originals.
    """
    examples: list[Labelled] = []
    for sentence in pool:
        if len(examples) == size:
            break
        corrupted = corrupt(sentence, words, rng)
        if corrupted is not None:
            label = len(examples) % 2
            examples.append(Labelled(sentence if label else corrupted, label))
    rng.shuffle(examples)
    return examples


def write(out: str, train: list[Labelled], dev: list[Labelled], about: dict[str, object]) -> None:
    """Write `out/synthetic-words/{train,dev}.tsv` in the format of SST-2, and `about.json`, atomically.

    Raises:
        UserError: the folder exists.
    """
    folder = os.path.join(out, TASK.folder)
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; remove it, or give another --out")
    with replaced_folder(folder) as unfinished:
        for part, examples in (("train", train), ("dev", dev)):
            with open(os.path.join(unfinished, TASK.splits[part].file), "w", encoding="utf-8", newline="\n") as file:
                file.write("sentence\tlabel\n")
                file.writelines(f"{example.sentence}\t{example.label}\n" for example in examples)
        with open(os.path.join(unfinished, "about.json"), "w", encoding="utf-8") as file:
            json.dump({"synthetic": True, **about, "train": len(train), "dev": len(dev)}, file, indent=2)
            file.write("\n")


def main(arguments: list[str] | None = None) -> None:
    """Build the task from a source of text and write it."""
    parser = ArgumentParser(prog="python -m electra_composer.finetuning.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("--source", required=True, help="text as for data_prep/convert_owt.py: docstrings, a file, …")
    parser.add_argument("--out", required=True, help=f"folder for {TASK.folder}/; the data.path for glue.py")
    parser.add_argument("--train", type=number(EXAMPLES), default=600, help="training examples (%(default)s)")
    parser.add_argument("--dev", type=number(EXAMPLES), default=1000, help="dev examples (%(default)s)")
    limit = number_of(Sources, "max_documents")
    parser.add_argument(
        "--max-documents", type=limit, default=MAX_DOCUMENTS, help="maximum number to read (%(default)s)"
    )
    parser.add_argument("--seed", type=number(Range(ge=0, le=2**31 - 1)), default=0)
    options = parser.parse_args(arguments)
    if os.path.exists(os.path.join(options.out, TASK.folder)):  # before reading the text
        raise UserError(f"{os.path.join(options.out, TASK.folder)}: exists already; remove it, or give another --out")
    sources = Sources.of(options.source, max_documents=options.max_documents)
    documents = tqdm(read_documents(sources, ReadStats()), desc="reading", unit="doc", leave=False, disable=None)
    train, dev = build(documents, options.train, options.dev, options.seed)
    write(options.out, train, dev, {"source": options.source, "seed": options.seed})
    print(f"synthetic task {TASK.folder}: {len(train)} training and {len(dev)} dev examples in {options.out}")


if __name__ == "__main__":
    report_user_errors(main)()
