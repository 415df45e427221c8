"""Batches of finetuning: padding, splitting, and the order of examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from glue_tiny import CLS, LETTERS, PAD, SEP, A, ids
from transformers import ElectraTokenizerFast

from electra_composer.batches.collation import split_batch
from electra_composer.finetuning.data import encode
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.loader import build_loader
from electra_composer.finetuning.tasks import TASKS
from electra_composer.tasks.encoded import collate


def test_a_batch_is_padded_to_a_multiple_of_eight(tokenizer: ElectraTokenizerFast) -> None:
    examples = [Example(("a b", "c"), 1), Example(("a b c d e", "a b c"), 0)]  # 6 and 11 tokens
    encoded = encode(TASKS["mrpc"], examples, tokenizer, max_seq_length=64)
    batch = collate([encoded[0], encoded[1]], PAD)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [CLS, A, A + 1, SEP, A + 2, SEP] + [PAD] * 10
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1] + [0] * 10
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5] + [0] * 10
    assert batch["sequence_ids"][0].tolist() == [1] * 6 + [0] * 10
    assert batch["labels"].tolist() == [1, 0]
    assert batch["num_tokens"] == 17
    assert isinstance(batch["num_tokens"], int)
    parts = split_batch(batch, 1)
    assert [part["labels"].tolist() for part in parts] == [[1], [0]]
    assert [part["input_ids"].shape for part in parts] == [(1, 16), (1, 16)]


def test_a_batch_is_what_transformers_pads(tokenizer: ElectraTokenizerFast) -> None:
    texts = [("a b", "c d e"), ("a b c d e f g", "h"), ("a", "b c d e f g h i j")]
    encoded = encode(TASKS["rte"], [Example(pair, 0) for pair in texts], tokenizer, max_seq_length=64)
    batch = collate([encoded[i] for i in range(3)], PAD)
    theirs = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, pad_to_multiple_of=8, return_tensors="pt")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    assert torch.equal(batch["token_type_ids"], theirs["token_type_ids"])
    assert torch.equal(batch["sequence_ids"], theirs["attention_mask"])


def test_a_test_set_has_no_labels_and_keeps_its_index(tokenizer: ElectraTokenizerFast) -> None:
    examples = [Example(("a b",), None, 17), Example(("a b c d e f g h i",), None, 4), Example(("a b c d",), None, 9)]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=16)
    assert not encoded.per_row
    assert encoded.source.tolist() == [17, 4, 9]
    batches = list(build_loader(encoded, PAD, 2, num_workers=0, shuffle_seed=None).dataloader)
    assert [batch["indices"].tolist() for batch in batches] == [[1, 2], [0]]  # from the longest to the shortest example
    assert [batch["input_ids"].shape for batch in batches] == [(2, 11), (1, 4)]  # a CPU needs no multiple of 8
    assert batches[0]["indices"].dtype == torch.int64
    assert "labels" not in batches[0]
    assert split_batch(batches[0], 1)[1]["indices"].tolist() == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_each_example_once_and_order_is_restored_by_index(
    tokenizer: ElectraTokenizerFast, workers: int
) -> None:
    rng = np.random.default_rng(0)
    examples = [Example((" ".join(rng.choice(LETTERS[5:], rng.integers(1, 30))),), int(i % 2)) for i in range(101)]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=40)
    batches = list(build_loader(encoded, PAD, 16, workers, shuffle_seed=None).dataloader)
    places = torch.cat([batch["indices"] for batch in batches])
    assert places.sort().values.tolist() == list(range(101))
    assert torch.equal(
        torch.cat([batch["labels"] for batch in batches])[places.argsort()], torch.from_numpy(encoded.per_row["labels"])
    )
    rows = [row[row != PAD].tolist() for batch in batches for row in batch["input_ids"]]
    assert [rows[i] for i in places.argsort()] == ids(encoded)
    assert [batch["input_ids"].shape[1] for batch in batches] == sorted(
        (batch["input_ids"].shape[1] for batch in batches), reverse=True
    )


@pytest.mark.slow
def test_training_order_is_seeded_and_new_every_epoch_and_dev_has_one(tokenizer: ElectraTokenizerFast) -> None:
    words = LETTERS[5:21]
    examples = [Example((f"{first} {second}",), 0) for first in words for second in words]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=8)

    def order(seed: int | None, epoch: int = 0) -> list[list[int]]:
        loader = build_loader(encoded, PAD, 16, num_workers=0, shuffle_seed=seed).dataloader
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in batch["input_ids"][:, 1:3].tolist()]

    assert order(None) == [row[1:3] for row in ids(encoded)]  # equal lengths: the order of the file
    assert order(None, epoch=1) == order(None)
    assert sorted(order(1)) == sorted(order(None))
    assert order(1) == order(1) != order(2)
    assert order(1, epoch=0) != order(1, epoch=1)
    assert order(1, epoch=1) != order(2, epoch=0)
