"""Finetuning benchmark: equal inputs for both sides, correct timing, an error for a missing package."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))  # as when they run as scripts

import glue as benchmark
import glue_runs

from electra_composer.errors import UserError
from electra_composer.finetuning.data import encode
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.tasks import TASKS
from electra_composer.tasks.encoded import collate
from electra_composer.vocabulary import load_tokenizer

WORDS = ["good", "bad", "film", "the", "a", "dull", "fine", "plot"]
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """SST-2 files, labelled by whether `good` occurs, and STS-B files."""
    rng = random.Random(0)
    for split, size in (("train", 70), ("dev", 21)):
        sst2, stsb = ["sentence\tlabel"], ["sentence1\tsentence2\tscore"]
        for index in range(size):
            words = " ".join(rng.choice(WORDS[1:]) for _ in range(rng.randint(1, 9)))
            sst2.append(f"{'good ' * (index % 2)}{words}\t{index % 2}")
            stsb.append(f"{words}\t{words}\t{index % 6}.000")
        for folder, lines in (("SST-2", sst2), ("STS-B", stsb)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_missing_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs accelerate, which is not installed; pip install accelerate"):
        benchmark.parse([])


def test_options_that_leave_nothing_to_time() -> None:
    with pytest.raises(UserError, match="3 steps; expected more than --warmup 3"):
        benchmark.parse(["--examples=70", "--warmup=3"])
    with pytest.raises(UserError, match="--repeats is 0"):
        benchmark.parse(["--repeats=0"])


def test_the_clock_leaves_out_the_first_steps_and_knows_the_last_batch() -> None:
    clock = glue_runs.Clock(on_gpu=False)
    clock.ends = [10.0, 12.0, 13.0, 20.0, 21.0, 21.5]  # two epochs of 32 + 32 + 6
    result = clock.result(examples=70, batch=32, epochs=2, warmup=2, score=50.0)
    assert result["train_seconds"] == pytest.approx(9.5)
    assert result["examples_per_second"] == pytest.approx((6 + 32 + 32 + 6) / 9.5)
    clock.ends.pop()
    with pytest.raises(AssertionError, match="not recorded"):
        clock.result(examples=70, batch=32, epochs=2, warmup=2, score=50.0)


def test_both_sides_get_the_same_tokens(vocabulary: str) -> None:
    tokenizer = load_tokenizer(vocabulary)
    examples = [Example(("good film the plot", "bad"), 4.0), Example(("a", "the dull film a fine plot a a a"), 1.0)]
    theirs = glue_runs.padded(TASKS["stsb"], examples, tokenizer, 24)
    encoded = encode(TASKS["stsb"], examples, tokenizer, 24)
    ours = collate([encoded[0], encoded[1]], tokenizer.pad_token_id)
    width = ours["input_ids"].shape[1]
    for mine, name in (("input_ids",) * 2, ("token_type_ids",) * 2, ("sequence_ids", "attention_mask")):
        rows = np.array(theirs[name])
        assert rows.shape == (2, 24)
        np.testing.assert_array_equal(rows[:, :width], ours[mine].numpy())
        assert not rows[:, width:].any()
    np.testing.assert_allclose(theirs["labels"], ours["labels"].numpy(), rtol=1e-6)


@needs_accelerate
def test_one_line_for_a_classification_and_a_regression(
    data: Path, vocabulary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tasks=sst2,stsb", f"--data={data}", f"--vocab={vocabulary}", "--size=tiny", "--device=cpu"]
    benchmark.main([*arguments, "--examples=64", "--batch=8", "--warmup=2", "--length=24", "--repeats=2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(line["tasks"]) == ["sst2", "stsb"]
    for name, metric in (("sst2", "accuracy"), ("stsb", "spearman")):
        task = line["tasks"][name]
        assert (task["train_examples"], task["dev_examples"], task["score"]) == (64, 21, metric)
        assert task["speedup"] == pytest.approx(
            task["ours"]["examples_per_second"] / task["transformers"]["examples_per_second"], rel=1e-2
        )
        assert all(len(task[who]["scores"]) == 2 for who in ("ours", "transformers"))
    assert line["machine"]["versions"]["torch"]
    assert str(data) not in json.dumps(line)
