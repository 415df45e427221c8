"""Tokenizing, truncating, sampling and swapping of GLUE examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from glue_tiny import CLS, SEP, A, ids
from transformers import ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetuning.data import encode, encode_split, training_examples
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.tasks import TASKS
from electra_composer.tasks.tokenization import truncated_lengths


@pytest.mark.parametrize(
    ("first", "second", "budget", "expected"),
    [
        (4, 5, 9, (4, 5)),  # fits
        (10, 3, 9, (6, 3)),  # only the longer one is truncated
        (3, 10, 9, (3, 6)),
        (10, 10, 9, (5, 4)),  # equal: B is truncated first
        (10, 10, 10, (5, 5)),
        (9, 7, 8, (4, 4)),
        (7, 0, 4, (4, 0)),
    ],
)
def test_truncation_pops_from_the_longer(first: int, second: int, budget: int, expected: tuple[int, int]) -> None:
    assert truncated_lengths(first, second, budget) == expected


def test_encoding_of_pairs_single_sentences_and_an_empty_second(tokenizer: ElectraTokenizerFast) -> None:
    mrpc, sst2 = TASKS["mrpc"], TASKS["sst2"]
    pairs = [Example(("a b c d e f", "a b"), 1), Example(("a b", ""), 0)]
    encoded = encode(mrpc, pairs, tokenizer, max_seq_length=8)
    assert ids(encoded) == [[CLS, A, A + 1, A + 2, SEP, A, A + 1, SEP], [CLS, A, A + 1, SEP]]
    assert encoded.first_lengths.tolist() == [5, 4]
    assert encoded.per_row["labels"].tolist() == [1, 0]
    assert encoded.per_row["labels"].dtype == "int64"
    single = encode(sst2, [Example(("a b c d ",), 0)], tokenizer, max_seq_length=5)
    assert ids(single) == [[CLS, A, A + 1, A + 2, SEP]]
    with pytest.raises(UserError, match=r"max_seq_length is 4; MRPC needs at least 5"):
        encode(mrpc, pairs, tokenizer, max_seq_length=4)


def test_stsb_targets_are_scaled_to_one(tokenizer: ElectraTokenizerFast) -> None:
    examples = [Example(("a", "b"), score) for score in (0.0, 2.5, 5.0)]
    encoded = encode(TASKS["stsb"], examples, tokenizer, max_seq_length=16)
    assert encoded.per_row["labels"].tolist() == [0.0, 0.5, 1.0]


def test_swapped_pairs_double_the_training_examples_of_mrpc_and_stsb_alone() -> None:
    pairs = [Example(("a", "b"), 1), Example(("c", "d"), 0)]
    swapped = [Example(("b", "a"), 1), Example(("d", "c"), 0)]
    assert training_examples(TASKS["mrpc"], pairs, None, seed=0) == pairs + swapped
    assert training_examples(TASKS["stsb"], pairs, None, seed=0) == pairs + swapped
    assert training_examples(TASKS["sst2"], [Example(("a",), 1)], None, seed=0) == [Example(("a",), 1)]


def test_a_sample_is_seeded_and_drawn_before_swapping() -> None:
    pairs = [Example((f"a{i}", f"b{i}"), i % 2) for i in range(50)]
    sample = training_examples(TASKS["mrpc"], pairs, 10, seed=3)
    assert len(sample) == 20
    assert [example.texts[::-1] for example in sample[:10]] == [example.texts for example in sample[10:]]
    assert sample == training_examples(TASKS["mrpc"], pairs, 10, seed=3)
    assert sample != training_examples(TASKS["mrpc"], pairs, 10, seed=4)
    assert len(training_examples(TASKS["mrpc"], pairs, 1000, seed=3)) == 100


def test_pairs_are_swapped_in_training_alone(files: Path, tokenizer: ElectraTokenizerFast) -> None:
    train, dev, test = (encode_split(TASKS["mrpc"], s, str(files), tokenizer, 16) for s in ("train", "dev", "test"))
    assert ids(train)[:2] == ids(dev) == ids(test)
    assert ids(train)[2] == [CLS, A + 3, SEP, A, A + 1, A + 2, SEP]
    assert train.per_row["labels"].tolist() == [1, 0, 1, 0]
    assert len(dev) == len(test) == 2
    assert len(encode_split(TASKS["mrpc"], "train", str(files), tokenizer, 16, limit=1, seed=3)) == 2
    assert len(encode_split(TASKS["mrpc"], "dev", str(files), tokenizer, 16, limit=1, seed=3)) == 2
    plain = dataclasses.replace(TASKS["mrpc"], swap_augmentation=False)
    assert ids(encode_split(plain, "train", str(files), tokenizer, 16)) == ids(dev)
