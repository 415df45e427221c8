"""A small GLUE-shaped data set from any plain text: whole sentences against scrambled ones.

    python -m electra_composer.synthetic --source docstrings --out data/synthetic_glue

It is **synthetic** and called so wherever it appears; its scores compare with nobody's. It exists to show in a minute
what pretraining buys. In a scrambled sentence a few words have exchanged their places and nothing else has changed:
which words occur says nothing about the label, only their order does, and a few thousand examples are too few to learn
word order from. A model that was pretrained on text knows it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from electra_composer.documents import ReadStats, Sources, read_documents
from electra_composer.errors import UserError, report_user_errors
from electra_composer.glue_tasks import TASKS

TASK = TASKS["synthetic-order"]
WORDS = range(8, 31)  # of a sentence that is taken
MOVABLE = re.compile(r"[A-Za-z]{2,}")  # words that may change places: without the marks that would show that they did
MOVED_SHARE = 0.3  # of the movable words of a scrambled sentence, at least MOVED_LEAST
MOVED_LEAST = 3
PER_DOCUMENT = 8  # sentences of one document at most, so that many documents are heard
MAX_DOCUMENTS = 100_000  # read at most; the rest of a large source is left alone
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass(frozen=True)
class Labelled:
    """A sentence and whether it is whole (1) or scrambled (0)."""

    sentence: str
    label: int


def sentences(text: str) -> Iterator[str]:
    """Prose sentences of 8 to 30 words, single spaces between them, in their order.

    A blank line ends a sentence too. What is mostly not words (code, tables, markup) is left out.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split(" ")
            if len(words) not in WORDS or not sentence[0].isalpha() or sentence[-1] not in ".!?":
                continue
            if sum(bool(MOVABLE.fullmatch(word)) for word in words) >= 0.75 * len(words):
                yield sentence


def scramble(sentence: str, rng: random.Random) -> str | None:
    """The sentence with about a third of its words at one another's places; None if it has too few different ones.

    The first word and words with punctuation stay where they are: capitals and full stops would give the game away.
    Every chosen word goes to another one's place, and no two of them are equal, so that something has always changed.
    """
    words = sentence.split(" ")
    different: dict[str, int] = {}
    movable = [i for i in range(1, len(words)) if MOVABLE.fullmatch(words[i])]
    for i in rng.sample(movable, len(movable)):
        different.setdefault(words[i].casefold(), i)
    chosen = list(different.values())[: max(MOVED_LEAST, round(MOVED_SHARE * len(movable)))]
    if len(chosen) < MOVED_LEAST:
        return None
    moved = list(words)
    for source, target in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        moved[target] = words[source]
    return " ".join(moved)


def build(documents: Iterable[str], train_size: int, dev_size: int, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """Train and dev sets: balanced, without duplicates, from different documents; the same for the same input and seed.

    A sentence is used once, whole or scrambled, so that no pair of the two gives an answer away.

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
    for part, size in sizes.items():
        rng.shuffle(pools[part])
        parts[part] = _label(pools[part], size, rng)
        if len(parts[part]) < size or not size:
            raise UserError(
                f"synthetic task: {len(parts[part])} sentences of {WORDS[0]} to {WORDS[-1]} words for {part}, "
                f"{max(size, 2)} are needed; give more text or ask for fewer"
            )
    return parts["train"], parts["dev"]


def _label(pool: list[str], size: int, rng: random.Random) -> list[Labelled]:
    """The first `size` sentences that can be scrambled, every other one of them scrambled, in random order.

    Whole ones too must be such as could be scrambled: otherwise what cannot be would always be whole.
    """
    examples: list[Labelled] = []
    for sentence in pool:
        if len(examples) == size:
            break
        scrambled = scramble(sentence, rng)
        if scrambled is not None:
            label = len(examples) % 2
            examples.append(Labelled(sentence if label else scrambled, label))
    rng.shuffle(examples)
    return examples


def write(out: str, train: list[Labelled], dev: list[Labelled], about: dict[str, object]) -> None:
    """`out/synthetic-order/{train,dev}.tsv` in the layout of SST-2, and `about.json`; all of it or nothing.

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
    parser = argparse.ArgumentParser(prog="python -m electra_composer.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--source", required=True, help="text, as data_prep/convert_owt.py takes it: docstrings, a file, …"
    )
    parser.add_argument("--out", required=True, help=f"the data.path for glue.py; {TASK.folder}/ is made in it")
    parser.add_argument("--train", type=int, default=3000, help="training examples (3000)")
    parser.add_argument("--dev", type=int, default=1000, help="dev examples (1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if os.path.exists(os.path.join(options.out, TASK.folder)):  # before the text is read, not after
        raise UserError(f"{os.path.join(options.out, TASK.folder)}: exists already; remove it, or give another --out")
    sources = Sources([options.source], max_documents=MAX_DOCUMENTS)
    documents = tqdm(read_documents(sources, ReadStats()), desc="reading", unit="doc", leave=False, disable=None)
    train, dev = build(documents, options.train, options.dev, options.seed)
    write(options.out, train, dev, {"source": options.source, "seed": options.seed})
    print(f"synthetic task {TASK.folder}: {len(train)} training and {len(dev)} dev examples in {options.out}")


if __name__ == "__main__":
    report_user_errors(main)()
