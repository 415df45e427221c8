"""Cache of tokenized files."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from glue_tiny import LETTERS, MRPC, PAD
from transformers import ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.finetuning import data
from electra_composer.finetuning.data import encode, encode_split
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.tasks import TASKS
from electra_composer.tasks.encoded import EncodedRows, collate


def same(first: EncodedRows, second: EncodedRows) -> bool:
    return {name: (a.dtype, a.tolist()) for name, a in arrays_of(first).items()} == {
        name: (b.dtype, b.tolist()) for name, b in arrays_of(second).items()
    }


def arrays_of(rows: EncodedRows) -> dict[str, Any]:
    found = {**{name: getattr(rows, name) for name in data.ROW_ARRAYS}, **rows.per_row}
    return found if rows.source is None else {**found, "source": rows.source}


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks tokenized so far, one entry per call."""
    names: list[str] = []

    @functools.wraps(data.encode)
    def counted(task: Any, *rest: Any) -> EncodedRows:
        names.append(task.name)
        return encode(task, *rest)

    monkeypatch.setattr(data, "encode", counted)
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
    assert [file.suffix for file in (files / "cache").iterdir()] == [".npz"]  # no temporary files


def test_the_cache_is_found_by_content_alone(
    files: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], tmp_path: Path
) -> None:
    def run(task: Any = TASKS["mrpc"], by: Any = tokenizer, length: int = 16, **settings: Any) -> None:
        encode_split(task, "train", str(files), by, length, str(tmp_path / "cache"), **settings)

    cased = ElectraTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), do_lower_case=False)
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*LETTERS[:5], *reversed(LETTERS[5:])]) + "\n")
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
    run(seed=9)  # without a limit nothing is drawn
    tokenizer("a b", truncation=True, max_length=3, padding="max_length")  # changes the tokenizer's state
    run()
    (files / "MRPC").rename(files / "mrpc")  # the same content in another folder
    run()
    assert len(tokenized) == len(settings)
    (files / "mrpc" / "train.tsv").write_text(MRPC.replace("a b c", "a b d"))
    run()
    assert len(tokenized) == len(settings) + 1


def test_rows_of_the_hub_are_cached_by_their_content(
    tmp_path: Path, tokenizer: ElectraTokenizerFast, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Example(("a", "b"), 1)]
    monkeypatch.setattr(data, "read_examples", lambda task, split, path: list(rows))
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
