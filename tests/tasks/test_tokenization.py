"""Rows of token ids: truncation, special tokens, padding, against a loop over the examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ElectraTokenizerFast

from electra_composer.tasks import tokenization
from electra_composer.tasks.encoded import IGNORED, EncodedRows, collate
from electra_composer.tasks.tokenization import Pieces, full_lengths, join, offsets_of, tokenize, truncated_lengths

CLS, SEP, PAD = 1, 2, 0
TEXTS = st.lists(st.integers(3, 99), max_size=12)
Pairs = list[tuple[list[int], list[int]]]


def pieces(texts: list[list[int]]) -> Pieces:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return Pieces(np.array([token for text in texts for token in text], dtype=np.int32), offsets_of(lengths))


def popped(first: int, second: int, budget: int) -> tuple[int, int]:
    """The loop of google-research/electra."""
    while first + second > budget:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_truncated_lengths_are_those_of_the_loop(first: int, second: int, budget: int) -> None:
    assert truncated_lengths(first, second, budget) == popped(first, second, budget)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.integers(5, 20), st.booleans(), st.data())
def test_join_equals_a_loop(
    pairs: list[tuple[list[int], list[int]]], length: int, single: bool, data: st.DataObject
) -> None:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    chunk = data.draw(st.integers(1, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "JOIN_CHUNK", chunk)
        rows = join(pieces(first), None if single else pieces(second), length, CLS, SEP)
    for index, (a, b) in enumerate(pairs):
        b = [] if single else b
        keep = popped(len(a), len(b), length - 3) if b else (min(len(a), length - 2), 0)
        expected = [CLS, *a[: keep[0]], SEP, *([*b[: keep[1]], SEP] if b else [])]
        assert rows[index].input_ids.tolist() == expected
        assert rows[index].first_length == keep[0] + 2
    whole = full_lengths(pieces(first), None if single else pieces(second))
    assert whole.tolist() == join(pieces(first), None if single else pieces(second), 99, CLS, SEP).lengths.tolist()


def test_texts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch, letters: ElectraTokenizerFast) -> None:
    monkeypatch.setattr(tokenization, "TOKENIZER_CHUNK", 2)
    texts = [("a b", "c"), ("b", ""), ("", "a a a"), ("c", "b"), ("a", "a")]
    found = tokenize(iter(texts), 2, letters, "train")
    for column, one in enumerate(found):
        for index, text in enumerate(texts):
            tokens = one.tokens[one.offsets[index] : one.offsets[index + 1]].tolist()
            assert tokens == letters(text[column], add_special_tokens=False)["input_ids"]


def test_a_batch_is_padded_to_a_multiple_of_eight() -> None:
    rows = EncodedRows(
        np.arange(10, 22, dtype=np.int32),
        np.array([0, 3, 12]),
        np.array([3, 4]),
        {"labels": np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)},
        {"tags": np.arange(12, dtype=np.int16)},
    )
    batch = collate([rows[1], rows[0]], PAD)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][1].tolist() == [10, 11, 12, *[PAD] * 13]
    assert batch["tags"][0].tolist() == [*range(3, 12), *[IGNORED] * 7]
    assert batch["token_type_ids"][0].tolist() == [0] * 4 + [1] * 5 + [0] * 7
    assert batch["position_ids"][1].tolist() == [0, 1, 2, *[0] * 13]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert (batch["indices"].tolist(), batch["num_tokens"]) == ([1, 0], 12)
