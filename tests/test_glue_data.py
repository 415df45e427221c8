"""Reading, truncating and padding GLUE: quirks of the real files, faults of broken ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.glue_data import (
    Example,
    build_loader,
    collate,
    encode,
    read_examples,
    split_batch,
    training_examples,
    truncated_lengths,
)
from electra_composer.glue_tasks import TASKS

GLUE_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue_data"
real_data = pytest.mark.skipif(not GLUE_DATA.is_dir(), reason="the GLUE files of ../shared/data are not here")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", '"', "."]
PAD, CLS, SEP, A = 0, 2, 3, 5  # A: id of the word a


@pytest.fixture
def tokenizer(tmp_path: Path) -> ElectraTokenizerFast:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    return ElectraTokenizerFast(vocab_file=str(vocabulary))


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")


def test_cola_train_and_dev_have_no_header_and_test_has_one(tmp_path: Path) -> None:
    write(tmp_path, "CoLA/train.tsv", "gj04\t1\t\tA b c.\nks08\t0\t*\tC b a.\n")
    write(tmp_path, "CoLA/test.tsv", "index\tsentence\n0\tA b.\n1\tB a.\n")
    cola = TASKS["cola"]
    assert read_examples(cola, "train", str(tmp_path)) == [(("A b c.",), 1), (("C b a.",), 0)]
    assert read_examples(cola, "test", str(tmp_path)) == [(("A b.",), None), (("B a.",), None)]


def test_byte_order_mark_bare_quotes_trailing_blanks_and_windows_line_ends(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    write(tmp_path, "MRPC/train.tsv", f'{header}\r\n1\t1\t2\t" a b\tHe said " c\r\n0\t3\t4\ta\tb\r\n')
    write(tmp_path, "SST-2/train.tsv", 'sentence\tlabel\na "b c \t0\n')
    assert read_examples(TASKS["mrpc"], "train", str(tmp_path)) == [(('" a b', 'He said " c'), 1), (("a", "b"), 0)]
    assert read_examples(TASKS["sst2"], "train", str(tmp_path)) == [(('a "b c ',), 0)]


def test_stsb_columns_are_found_by_name(tmp_path: Path) -> None:
    write(tmp_path, "STS-B/dev.tsv", "index\tscore\tsentence2\tsentence1\n0\t2.500\tb\ta\n")
    assert read_examples(TASKS["stsb"], "dev", str(tmp_path)) == [(("a", "b"), 2.5)]


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "sentence\tsentiment\na\t0\n", r"SST-2/train.tsv:1: no column 'label' .*'sentence', 'sentiment'"),
        ("sst2", "sentence\tlabel\na\t0\nb\n", r"SST-2/train.tsv:3: 1 columns; expected 2 \(sentence, label\)"),
        ("sst2", "sentence\tlabel\na\tb\t0\n", r"SST-2/train.tsv:2: 3 columns; expected 2"),
        ("sst2", "sentence\tlabel\na\tpositive\n", r"SST-2/train.tsv:2: label 'positive'; expected one of 0, 1"),
        ("sst2", "sentence\tlabel\n", r"no examples"),
        ("sst2", "", r"SST-2/train.tsv: the file is empty"),
        ("cola", "sentence\tlabel\na\t0\n", r"CoLA/train.tsv:1: 2 columns; expected 4, without a header"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", r"STS-B/train.tsv:2: label 'high' is not a number"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t5.5\n", r"STS-B/train.tsv:2: score 5.5 is outside of 0 to 5"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"STS-B/train.tsv:2: score nan is outside"),
    ],
)
def test_faults_name_file_line_and_expectation(tmp_path: Path, task: str, text: str, message: str) -> None:
    write(tmp_path, f"{TASKS[task].folder}/train.tsv", text)
    with pytest.raises(UserError, match=message):
        read_examples(TASKS[task], "train", str(tmp_path))


def test_missing_folder_file_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_examples(TASKS["sst2"], "train", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"SST-2/train.tsv: no such file"):
        read_examples(TASKS["sst2"], "train", str(tmp_path))
    write(tmp_path, "SST-2/train.tsv", "")
    (tmp_path / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t0\n")
    with pytest.raises(UserError, match=r"SST-2/train.tsv: .*expected UTF-8"):
        read_examples(TASKS["sst2"], "train", str(tmp_path))


def test_hub_rows_and_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [3.8], "idx": [0]})
    asked = []

    def load(*args: str, split: str) -> datasets.Dataset:
        asked.append((*args, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_examples(TASKS["stsb"], "dev", "hub") == [(("a", "b"), 3.8)]
    assert read_examples(TASKS["stsb"], "test", "hub") == [(("a", "b"), None)]
    assert asked[0] == ("nyu-mll/glue", "stsb", "validation")
    with pytest.raises(UserError, match="no column 'sentence'; it has sentence1"):
        read_examples(TASKS["sst2"], "dev", "hub")

    def fail(*args: str, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="no route to host; check the connection"):
        read_examples(TASKS["sst2"], "dev", "hub")
    with pytest.raises(UserError, match="synthetic-words is not on it"):
        read_examples(TASKS["synthetic-words"], "dev", "hub")


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


def test_encoding_of_pairs_single_sentences_and_an_empty_second(tokenizer: ElectraTokenizerFast) -> None:
    mrpc, sst2 = TASKS["mrpc"], TASKS["sst2"]
    pairs = [Example(("a b c d e f", "a b"), 1), Example(("a b", ""), 0)]
    encoded = encode(mrpc, pairs, tokenizer, max_seq_length=8)
    assert encoded.input_ids == [[CLS, A, A + 1, A + 2, SEP, A, A + 1, SEP], [CLS, A, A + 1, SEP]]
    assert encoded.first_lengths == [5, 4]
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.labels.dtype == torch.int64
    single = encode(sst2, [Example(("a b c d ",), 0)], tokenizer, max_seq_length=5)
    assert single.input_ids == [[CLS, A, A + 1, A + 2, SEP]]
    with pytest.raises(UserError, match=r"max_seq_length is 4; MRPC needs at least 5"):
        encode(mrpc, pairs, tokenizer, max_seq_length=4)


def test_stsb_targets_are_scaled_to_one(tokenizer: ElectraTokenizerFast) -> None:
    examples = [Example(("a", "b"), score) for score in (0.0, 2.5, 5.0)]
    encoded = encode(TASKS["stsb"], examples, tokenizer, max_seq_length=16)
    assert encoded.labels is not None
    assert torch.equal(encoded.labels, torch.tensor([0.0, 0.5, 1.0]))


def test_swapped_pairs_double_the_training_examples_of_mrpc_and_stsb_alone() -> None:
    pairs = [Example(("a", "b"), 1), Example(("c", "d"), 0)]
    expected = [(("a", "b"), 1), (("c", "d"), 0), (("b", "a"), 1), (("d", "c"), 0)]
    assert training_examples(TASKS["mrpc"], pairs, None, seed=0) == expected
    assert training_examples(TASKS["stsb"], pairs, None, seed=0) == expected
    assert training_examples(TASKS["sst2"], [Example(("a",), 1)], None, seed=0) == [(("a",), 1)]


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


def test_training_order_is_seeded_and_new_every_epoch_and_dev_keeps_its_own(tokenizer: ElectraTokenizerFast) -> None:
    words = WORDS[5:21]
    examples = [Example((f"{first} {second}",), 0) for first in words for second in words]
    encoded = encode(TASKS["sst2"], examples, tokenizer, max_seq_length=8)

    def order(seed: int | None, epoch: int = 0) -> list[list[int]]:
        loader = build_loader(encoded, PAD, 16, num_workers=0, shuffle_seed=seed).dataloader
        loader.sampler.set_epoch(epoch)
        return [row for batch in loader for row in batch["input_ids"][:, 1:3].tolist()]

    assert order(None) == [ids[1:3] for ids in encoded.input_ids]
    assert sorted(order(1)) == sorted(order(None))
    assert order(1) == order(1) != order(2)
    assert order(1, epoch=0) != order(1, epoch=1)


@real_data
@pytest.mark.parametrize(
    ("name", "sizes", "labels"),
    [  # counted in the official files by other means (cut, sort, uniq)
        ("cola", (8551, 1043, 1063), {1: 6023, 0: 2528}),
        ("sst2", (67349, 872, 1821), {1: 37569, 0: 29780}),
        ("mrpc", (3667, 408, 1725), {1: 2473, 0: 1194}),  # this download lacks one row of 3668
        ("stsb", (5749, 1500, 1379), None),
    ],
)
def test_sizes_and_labels_of_the_real_files(name: str, sizes: tuple[int, ...], labels: dict[int, int] | None) -> None:
    task = TASKS[name]
    splits = {split: read_examples(task, split, str(GLUE_DATA)) for split in ("train", "dev", "test")}
    counts = tuple(len(examples) for examples in splits.values())
    assert counts == sizes
    if labels is not None:
        assert Counter(example.label for example in splits["train"]) == labels
    else:
        scores = [example.label for example in splits["train"] if example.label is not None]
        assert (min(scores), max(scores)) == (0.0, 5.0)
        assert sum(scores) / len(scores) == pytest.approx(2.70, abs=0.01)
    assert all(len(example.texts) == len(task.hub_texts) for example in splits["dev"])
    assert all(text.strip() for examples in splits.values() for example in examples for text in example.texts)


@real_data
def test_real_sentences_keep_their_quotation_marks() -> None:
    examples = read_examples(TASKS["mrpc"], "train", str(GLUE_DATA))
    assert examples[0].texts[0].startswith('Amrozi accused his brother , whom he called " the witness "')
