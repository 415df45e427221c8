"""A small GLUE-shaped data set from any plain text: whole sentences against corrupted ones.

    python -m electra_composer.finetune.synthetic --source docstrings --out data/synthetic_glue

It is **synthetic** and called so wherever it appears; its scores compare with nobody's. It exists to show in a minute
what pretraining buys. In a corrupted sentence some words have given their places to others, drawn evenly from the words
of the text: to tell, one has to know which words are at home where, and a few hundred examples show few of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from electra_composer.corpus.documents import ReadStats, read_documents
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetune.tasks import TASKS

TASK = TASKS["synthetic-words"]
WORDS = range(6, 19)  # of a sentence that is taken; with [CLS] and [SEP] it fits the quickstart's 32 tokens
REPLACEABLE = re.compile(r"[A-Za-z]{2,}")  # words that may be replaced: without marks that would show it
REPLACED_SHARE = 0.25  # of the replaceable words of a corrupted sentence, at least REPLACED_LEAST
REPLACED_LEAST = 2
LEAST_COUNT = 2  # of a word that may replace another
PER_DOCUMENT = 8  # sentences of one document at most, so that many documents are heard
MAX_DOCUMENTS = 100_000  # read at most; the rest of a large source is left alone
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True)
class Labelled:
    """A sentence and whether it is whole (1) or corrupted (0)."""

    sentence: str
    label: int


def sentences(text: str) -> Iterator[str]:
    """Prose sentences of 6 to 18 words, single spaces between them, in their order.

    A blank line ends a sentence too. What is mostly not words (code, tables, markup) is left out.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split(" ")
            if len(words) not in WORDS or not sentence[0].isalpha() or sentence[-1] not in ".!?":
                continue
            if sum(bool(REPLACEABLE.fullmatch(word)) for word in words) >= 0.75 * len(words):
                yield sentence


def vocabulary(pool: Iterable[str]) -> list[str]:
    """The words that a corrupted sentence may get: all that occur often enough, each once, in alphabetical order."""
    counts = Counter(
        word.casefold() for sentence in pool for word in sentence.split(" ") if REPLACEABLE.fullmatch(word)
    )
    return sorted(word for word, count in counts.items() if count >= LEAST_COUNT)


def corrupt(sentence: str, words: list[str], rng: random.Random) -> str | None:
    """The sentence with about a quarter of its words replaced by other ones; None if it has too few.

    The first word and words with punctuation stay: capitals and full stops would give the game away.
    """
    parts = sentence.split(" ")
    replaceable = [i for i in range(1, len(parts)) if REPLACEABLE.fullmatch(parts[i])]
    count = max(REPLACED_LEAST, round(REPLACED_SHARE * len(replaceable)))
    if len(replaceable) < count:
        return None
    for i in rng.sample(replaceable, count):
        word = rng.choice(words)
        while word == parts[i].casefold():
            word = rng.choice(words)
        parts[i] = word
    return " ".join(parts)


def build(documents: Iterable[str], train_size: int, dev_size: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Train and dev sets: balanced, without duplicates, from different documents; the same for the same input and seed.

    A sentence is used once, whole or corrupted, so that no pair of the two gives an answer away.

    Args:
        documents: texts; read once.
        train_size, dev_size: examples; each is made even.

    Raises:
        UserError: not enough sentences.
    """
    rng = random.Random(seed)
    sizes = {"dev": dev_size - dev_size % 2, "train": train_size - train_size % 2}
    pools: dict[str, list[str]] = {"dev": [], "train": []}
    dev_share = max(0.1, sizes["dev"] / max(1, sum(sizes.values())))
    seen: set[str] = set()
    for document in documents:
        found = list(sentences(document))
        part = "dev" if rng.random() < dev_share else "train"
        for sentence in rng.sample(found, min(len(found), PER_DOCUMENT)):
            if (key := sentence.casefold()) not in seen:
                seen.add(key)
                pools[part].append(sentence)
    parts = {}
    words = vocabulary(pools["dev"] + pools["train"])
    if len(words) < 2:
        raise UserError(f"synthetic task: {len(words)} words occur {LEAST_COUNT} times; 2 are needed; give more text")
    for part, size in sizes.items():
        rng.shuffle(pools[part])
        parts[part] = _label(pools[part], size, words, rng)
        if len(parts[part]) < size or not size:
            raise UserError(
                f"synthetic task: {len(parts[part])} sentences of {WORDS[0]} to {WORDS[-1]} words for {part}, "
                f"{max(size, 2)} are needed; give more text or ask for fewer"
            )
    return parts["train"], parts["dev"]


def _label(pool: list[str], size: int, words: list[str], rng: random.Random) -> list[Labelled]:
    """The first `size` sentences that can be corrupted, every other one of them corrupted, in random order.

    Whole ones too must be such as could be corrupted: otherwise what cannot be would always be whole.
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
    """`out/synthetic-words/{train,dev}.tsv` in the layout of SST-2, and `about.json`; all of it or nothing.

    Raises:
        UserError: the folder is there already.
    """
    folder = os.path.join(out, TASK.folder)
    if os.path.exists(folder):
        raise UserError(f"{folder}: exists already; remove it, or give another --out")
    unfinished = f"{folder}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    for part, examples in (("train", train), ("dev", dev)):
        with open(os.path.join(unfinished, TASK.splits[part].file), "w", encoding="utf-8", newline="\n") as file:
            file.write("sentence\tlabel\n")
            file.writelines(f"{example.sentence}\t{example.label}\n" for example in examples)
    with open(os.path.join(unfinished, "about.json"), "w", encoding="utf-8") as file:
        json.dump({"synthetic": True, **about, "train": len(train), "dev": len(dev)}, file, indent=2)
        file.write("\n")
    os.rename(unfinished, folder)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m electra_composer.finetune.synthetic", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--source", required=True, help="text, as data_prep/convert_owt.py takes it: docstrings, a file, …"
    )
    parser.add_argument("--out", required=True, help=f"the data.path for glue.py; {TASK.folder}/ is made in it")
    parser.add_argument("--train", type=int, default=600, help="training examples (%(default)s)")
    parser.add_argument("--dev", type=int, default=1000, help="dev examples (%(default)s)")
    parser.add_argument("--max-documents", type=int, default=MAX_DOCUMENTS, help="read at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if os.path.exists(os.path.join(options.out, TASK.folder)):  # before the text is read, not after
        raise UserError(f"{os.path.join(options.out, TASK.folder)}: exists already; remove it, or give another --out")
    sources = Sources.of(options.source, max_documents=options.max_documents)
    documents = tqdm(read_documents(sources, ReadStats()), desc="reading", unit="doc", leave=False, disable=None)
    train, dev = build(documents, options.train, options.dev, options.seed)
    write(options.out, train, dev, {"source": options.source, "seed": options.seed})
    print(f"synthetic task {TASK.folder}: {len(train)} training and {len(dev)} dev examples in {options.out}")


if __name__ == "__main__":
    report_user_errors(main)()
