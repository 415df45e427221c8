"""Tokenizing, truncating, caching, grouping and padding GLUE."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetune import data as glue_data
from electra_composer.finetune.data import (
    EncodedExamples,
    encode,
    encode_split,
    training_examples,
    truncated_lengths,
)
from electra_composer.finetune.files import Example
from electra_composer.finetune.loader import build_loader, collate, split_batch
from electra_composer.finetune.tasks import TASKS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", '"', "."]
PAD, CLS, SEP, A = 0, 2, 3, 5  # A: id of the word a


@pytest.fixture
def tokenizer(tmp_path: Path) -> ElectraTokenizerFast:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))


@pytest.mark.parametrize(
    ("first", "second", "budget", "expected"),
    [
        (4, 5, 9, (4, 5)),  # fits
        (10, 3, 9, (6, 3)),  # only the longer loses
        (3, 10, 9, (3, 6)),
        (10, 10, 9, (5, 4)),  # equal: B loses first
        (10, 10, 10, (5, 5)),
        (9, 7, 8, (4, 4)),
        (7, 0, 4, (4, 0)),
    ],
)
def test_truncation_pops_from_the_longer(first: int, second: int, budget: int, expected: tuple[int, int]) -> None:
    assert truncated_lengths(first, second, budget) == expected


def ids(encoded: EncodedExamples) -> list[list[int]]:
    return [encoded[i].input_ids.tolist() for i in range(len(encoded))]


def test_encoding_of_pairs_single_sentences_and_an_empty_second(tokenizer: ElectraTokenizerFast) -> None:
    mrpc, sst2 = TASKS["mrpc"], TASKS["sst2"]
    pairs = [Example(("a b c d e f", "a b"), 1), Example(("a b", ""), 0)]
    encoded = encode(mrpc, pairs, tokenizer, max_seq_length=8)
    assert ids(encoded) == [[CLS, A, A + 1, A + 2, SEP, A, A + 1, SEP], [CLS, A, A + 1, SEP]]
    assert encoded.first_lengths.tolist() == [5, 4]
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.labels.dtype == torch.int64
    single = encode(sst2, [Example(("a b c d ",), 0)], tokenizer, max_seq_length=5)
    assert ids(single) == [[CLS, A, A + 1, A + 2, SEP]]
    with pytest.raises(UserError, match=r"max_seq_length is 4; MRPC needs at least 5"):
        encode(mrpc, pairs, tokenizer, max_seq_length=4)


def test_stsb_targets_are_scaled_to_one(tokenizer: ElectraTokenizerFast) -> None:
    examples = [Example(("a", "b"), score) for score in (0.0, 2.5, 5.0)]
    encoded = encode(TASKS["stsb"], examples, tokenizer, max_seq_length=16)
    assert encoded.labels is not None
    assert torch.equal(encoded.labels, torch.tensor([0.0, 0.5, 1.0]))


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
    assert encoded.labels is None
    assert encoded.indices is not None
    assert encoded.indices.tolist() == [17, 4, 9]
    batches = list(build_loader(encoded, PAD, 2, num_workers=0, shuffle_seed=None).dataloader)
    assert [batch["indices"].tolist() for batch in batches] == [[1, 2], [0]]  # from the longest to the shortest
    assert [batch["input_ids"].shape for batch in batches] == [(2, 16), (1, 8)]
    assert batches[0]["indices"].dtype == torch.int64
    assert "labels" not in batches[0]
    assert split_batch(batches[0], 1)[1]["indices"].tolist() == [2]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_sees_each_example_once_and_order_is_restored_by_index(
    tokenizer: ElectraTokenizerFast, workers: int
) -> None:
    rng = np.random.default_rng(0)
    examples = [Example((" ".join(rng.choice(WORDS[5:], rng.integers(1, 30))),), int(i % 2)) for i in range(101)]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=40)
    batches = list(build_loader(encoded, PAD, 16, workers, shuffle_seed=None).dataloader)
    places = torch.cat([batch["indices"] for batch in batches])
    assert places.sort().values.tolist() == list(range(101))
    assert torch.equal(torch.cat([batch["labels"] for batch in batches])[places.argsort()], encoded.labels)
    rows = [row[row != PAD].tolist() for batch in batches for row in batch["input_ids"]]
    assert [rows[i] for i in places.argsort()] == ids(encoded)
    assert [batch["input_ids"].shape[1] for batch in batches] == sorted(
        (batch["input_ids"].shape[1] for batch in batches), reverse=True
    )


def test_training_order_is_seeded_and_new_every_epoch_and_dev_has_one(tokenizer: ElectraTokenizerFast) -> None:
    words = WORDS[5:21]
    examples = [Example((f"{first} {second}",), 0) for first in words for second in words]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=8)

    def order(seed: int | None, epoch: int = 0) -> list[list[int]]:
        loader = build_loader(encoded, PAD, 16, num_workers=0, shuffle_seed=seed).dataloader
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in batch["input_ids"][:, 1:3].tolist()]

    assert order(None) == [row[1:3] for row in ids(encoded)]  # all of one length: as in the file
    assert order(None, epoch=1) == order(None)
    assert sorted(order(1)) == sorted(order(None))
    assert order(1) == order(1) != order(2)
    assert order(1, epoch=0) != order(1, epoch=1)
    assert order(1, epoch=1) != order(2, epoch=0)


MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta b c\td\n0\t3\t4\te\tf g\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """MRPC with two pairs and STS-B with one."""
    for split in ("train", "dev"):
        (tmp_path / "MRPC").mkdir(exist_ok=True)
        (tmp_path / "MRPC" / f"{split}.tsv").write_text(MRPC)
    (tmp_path / "MRPC" / "test.tsv").write_text(MRPC.replace("Quality", "index"))
    (tmp_path / "STS-B").mkdir()
    (tmp_path / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\t2.5\n")
    return tmp_path


def same(first: EncodedExamples, second: EncodedExamples) -> bool:
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(first)]
    return all((a is None and b is None) or (a.dtype == b.dtype and a.tolist() == b.tolist()) for a, b in pairs)


def test_pairs_are_swapped_in_training_alone(files: Path, tokenizer: ElectraTokenizerFast) -> None:
    train, dev, test = (encode_split(TASKS["mrpc"], s, str(files), tokenizer, 16) for s in ("train", "dev", "test"))
    assert ids(train)[:2] == ids(dev) == ids(test)
    assert ids(train)[2] == [CLS, A + 3, SEP, A, A + 1, A + 2, SEP]
    assert train.labels is not None
    assert train.labels.tolist() == [1, 0, 1, 0]
    assert len(dev) == len(test) == 2
    assert len(encode_split(TASKS["mrpc"], "train", str(files), tokenizer, 16, limit=1, seed=3)) == 2
    assert len(encode_split(TASKS["mrpc"], "dev", str(files), tokenizer, 16, limit=1, seed=3)) == 2
    plain = dataclasses.replace(TASKS["mrpc"], swap_augmentation=False)
    assert ids(encode_split(plain, "train", str(files), tokenizer, 16)) == ids(dev)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were tokenized, one entry a time."""
    names: list[str] = []

    @functools.wraps(glue_data.encode)
    def counted(task: Any, *rest: Any) -> EncodedExamples:
        names.append(task.name)
        return encode(task, *rest)

    monkeypatch.setattr(glue_data, "encode", counted)
    return names


@pytest.mark.parametrize(("name", "split"), [("mrpc", "train"), ("mrpc", "test"), ("stsb", "dev")])
def test_what_comes_from_the_cache_is_what_went_in(
    files: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], name: str, split: str
) -> None:
    arguments = (TASKS[name], split, str(files), tokenizer, 16)
    first = encode_split(*arguments, cache_folder=str(files / "cache"))
    again = encode_split(*arguments, cache_folder=str(files / "cache"))
    assert tokenized == [name]
    assert same(first, again)
    assert same(first, encode_split(*arguments))
    assert collate([again[0]], PAD)["input_ids"].tolist() == collate([first[0]], PAD)["input_ids"].tolist()
    assert [file.suffix for file in (files / "cache").iterdir()] == [".npz"]  # nothing half written stays


def test_the_cache_is_found_by_content_alone(
    files: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], tmp_path: Path
) -> None:
    def run(task: Any = TASKS["mrpc"], by: Any = tokenizer, length: int = 16, **settings: Any) -> None:
        encode_split(task, "train", str(files), by, length, str(tmp_path / "cache"), **settings)

    cased = ElectraTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), do_lower_case=False)
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]) + "\n")
    settings: list[dict[str, Any]] = [
        {},
        {"length": 8},
        {"by": cased},
        {"by": ElectraTokenizerFast(vocab_file=str(other))},
        {"task": dataclasses.replace(TASKS["mrpc"], swap_augmentation=False)},
        {"limit": 1},
        {"limit": 1, "seed": 5},
    ]
    for count, changed in enumerate(settings, start=1):
        run(**changed)
        assert len(tokenized) == count
        run(**changed)
        assert len(tokenized) == count
    run(seed=9)  # which draws nothing without a limit
    tokenizer("a b", truncation=True, max_length=3, padding="max_length")  # which leaves traces in a tokenizer
    run()
    (files / "MRPC").rename(files / "mrpc")  # the same file elsewhere
    run()
    assert len(tokenized) == len(settings)
    (files / "mrpc" / "train.tsv").write_text(MRPC.replace("a b c", "a b d"))
    run()
    assert len(tokenized) == len(settings) + 1


def test_rows_of_the_hub_are_cached_by_their_content(
    tmp_path: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Example(("a", "b"), 1)]
    monkeypatch.setattr(glue_data, "read_examples", lambda task, split, path: list(rows))
    arguments = (TASKS["rte"], "train", "hub", tokenizer, 16, str(tmp_path / "cache"))
    assert same(encode_split(*arguments), encode_split(*arguments))
    assert len(tokenized) == 1
    rows.append(Example(("c", "d"), 0))
    assert len(encode_split(*arguments)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_a_broken_cache_file_is_made_anew_with_a_warning(
    files: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = (TASKS["mrpc"], "train", str(files), tokenizer, 16, str(files / "cache"))
    first = encode_split(*arguments)
    (file,) = (files / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "another":
        np.savez(file, tokens=np.zeros(3))
    else:
        content[content.index(first.tokens.tobytes())] ^= 1
        file.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(first, encode_split(*arguments))
    assert "not a readable cache file" in caplog.text
    assert len(tokenized) == 2
    caplog.clear()
    assert same(first, encode_split(*arguments))
    assert len(tokenized) == 2
    assert not caplog.text


def test_a_cache_that_cannot_be_written(
    files: Path,
    tokenizer: ElectraTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match=r"data.cache .*vocab.txt: cannot create this folder .*; set another one"):
        encode_split(TASKS["mrpc"], "dev", str(files), tokenizer, 16, str(files / "vocab.txt"))

    def full(stream: Any, **arrays: Any) -> None:
        stream.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with caplog.at_level(logging.WARNING):
        assert len(encode_split(TASKS["mrpc"], "dev", str(files), tokenizer, 16, str(files / "cache"))) == 2
    assert "not written (No space left on device)" in caplog.text
    assert not list((files / "cache").iterdir())
