"""Do scores of sentences mean something: is held-out text more likely to a run than the same text with a small change?

    python benchmarks/electric_scores.py --checkpoint runs/electric --data data/reviews

Prints a JSON line. In texts of the shards' held-out split, two words are swapped, or one word is replaced by a random
one of another text with as many pieces, so that the numbers of tokens are equal. It counts how often the original has
the higher score (electra_composer/score.py; chance is 0.5).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
from machine import print_result, require_positive
from numpy.random import Generator

from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import read_meta
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.errors import UserError, report_user_errors
from electra_composer.model.pseudo_likelihood import KINDS, pseudo_log_likelihoods
from electra_composer.vocabulary import load_tokenizer

Words = list[list[int]]
"""A text as words, which are lists of the ids of their pieces."""
SHORTEST = 8  # words of a text


def held_out_texts(folder: Path, count: int, rng: Generator) -> list[Words]:
    """Return segments A of random rows of the held-out split, without special tokens.

    Raises:
        UserError: there are too few.
    """
    meta = read_meta(str(folder))
    reader = reader_of_split(str(folder), "val")
    if reader is None:
        raise UserError(f"{folder}: some shards are compressed; train on them once, which decompresses them")
    rows = reader.read(np.sort(rng.permutation(reader.rows)[: 10 * count]))
    starts = np.cumsum(rows.row_lengths) - rows.row_lengths
    first = np.cumsum(rows.examples_per_row) - rows.examples_per_row
    lengths = rows.segment_lengths.reshape(-1, 2)[first, 0].astype(int)
    vocabulary = tokens_of(meta.tokenizer_folder)
    texts = []
    for start, length in zip(starts, lengths, strict=True):
        words: Words = []
        for index in rows.input_ids[start + 1 : start + length - 1].tolist():
            if words and vocabulary[index].startswith("##"):
                words[-1].append(index)
            else:
                words.append([index])
        if len(words) >= SHORTEST:
            texts.append(words)
    if len(texts) < count:
        raise UserError(f"{folder}: {len(texts)} texts of {SHORTEST} words in its held-out split; expected {count}")
    return [texts[place] for place in rng.permutation(len(texts))[:count]]


def tokens_of(folder: str) -> list[str]:
    """Return the entries of a tokenizer by their ids."""
    entries = load_tokenizer(folder).get_vocab()
    return sorted(entries, key=lambda token: entries[token])


def swapped(words: Words, rng: Generator) -> Words:
    """Swap two words that differ."""
    changed = list(words)
    while changed == words:
        one, other = rng.choice(len(words), 2, replace=False)
        changed = list(words)
        changed[one], changed[other] = words[other], words[one]
    return changed


def replaced(words: Words, others: Words, rng: Generator) -> Words:
    """Replace a word by another with as many pieces."""
    while True:
        place, other = rng.integers(len(words)), others[rng.integers(len(others))]
        if len(other) == len(words[place]) and other != words[place]:
            return [*words[:place], other, *words[place + 1 :]]


@report_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a run with objective.kind=electric or mlm")
    parser.add_argument("--data", type=Path, required=True, help="its shards, with a held-out split")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    require_positive(options, "sentences")
    model = read_checkpoint(options.checkpoint).build_model()
    if model.objective.kind not in KINDS:
        raise UserError(f"{options.checkpoint}: objective.kind={model.objective.kind}; expected {' or '.join(KINDS)}")
    rng = np.random.default_rng(options.seed)
    texts = held_out_texts(options.data, options.sentences, rng)
    pool = [word for words in texts for word in words]
    changes = {
        "originals": texts,
        "swapped": [swapped(words, rng) for words in texts],
        "replaced": [replaced(words, pool, rng) for words in texts],
    }
    scores, began = {}, time.perf_counter()
    for name, changed in changes.items():
        ids = [[index for word in words for index in word] for words in changed]
        scores[name] = np.array([math.fsum(each) for each in pseudo_log_likelihoods(model, ids, 64)])
    seconds = time.perf_counter() - began
    result = {}
    for name in ("swapped", "replaced"):
        higher = scores["originals"] > scores[name]
        difference = scores["originals"] - scores[name]
        result[name] = {
            "original_higher": round(float(higher.mean()), 3),
            "standard_error": round(float(higher.std() / math.sqrt(len(higher))), 3),
            "median_difference": round(float(np.median(difference)), 3),
        }
    tokens = sum(len(word) for word in pool) / len(texts)
    print_result(
        "electric_scores",
        kind=model.objective.kind,
        sentences=len(texts),
        tokens_per_sentence=round(tokens, 1),
        mean_score_per_token=round(float(scores["originals"].sum() / tokens / len(texts)), 3),
        sentences_per_second=round(3 * len(texts) / seconds, 1),
        **result,
    )


if __name__ == "__main__":
    main()
