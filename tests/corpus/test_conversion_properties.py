"""Properties that hold for every text: no document lost or repeated, no example too long, every token counted."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from electra_composer.corpus.chunks import EncodingSettings, convert_documents, document_lines, is_validation
from electra_composer.corpus.documents import ReadStats, filter_documents
from electra_composer.corpus.examples import Packer, one_per_row
from electra_composer.corpus.sources import Sources
from electra_composer.corpus.tokenizer import without_truncation
from electra_composer.vocabulary import load_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["un", "##do", "film", "the", *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", "!", "文", "я", "##я"]
CLS, SEP = 2, 3

documents = st.lists(
    st.one_of(
        st.text(max_size=200),  # any script, any control character, empty
        st.text(alphabet="ab film.\n", max_size=400),
        st.sampled_from(["", " ", "\n\n", "film", "文я 文я\nя", "[MASK] [CLS] [SEP]", "a" * 300, "film " * 200]),
    ),
    max_size=12,
)
common = settings(
    derandomize=True,
    database=None,
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    plain = Tokenizer.from_str(without_truncation(load_tokenizer(str(path))).to_str())
    plain.encode_special_tokens = True
    return plain


def settings_of(tokenizer, length, lines, overflow, val_fraction, seed):
    return EncodingSettings(tokenizer.to_str(), length, CLS, SEP, lines, overflow, val_fraction, seed, "uint16")


def body(example):
    """Return the tokens of an example without `[CLS]` and `[SEP]`."""
    ids, length_a, length_b = example.ids.tolist(), example.length_a, example.length_b
    assert len(ids) == length_a + length_b
    assert (ids[0], ids[length_a - 1]) == (CLS, SEP)
    if length_b:
        assert ids[-1] == SEP
    return ids[1 : length_a - 1] + ids[length_a : length_a + max(0, length_b - 1)]


@common
@given(
    texts=documents,
    length=st.integers(5, 70),
    lines=st.sampled_from(["newline", "sentence"]),
    overflow=st.sampled_from(["cut", "carry"]),
    fraction=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 3),
    first=st.integers(0, 1000),
)
def test_every_token_is_in_one_example_or_counted_as_dropped(
    tokenizer, texts, length, lines, overflow, fraction, seed, first
):
    how = settings_of(tokenizer, length, lines, overflow, fraction, seed)
    kept = list(filter_documents(texts, Sources(), ReadStats()))
    assert [document.text for document in kept] == [
        text.encode("utf-8", "replace").decode() for text in texts if text and not text.isspace()
    ]
    parts = convert_documents(how, tokenizer, str(first), kept)
    assert sum(part.documents for part in parts) == len(kept)
    for split, part in zip(how.splits, parts, strict=True):
        mine = [
            document.text for document in kept if is_validation(seed, document.digest, fraction) == (split == "val")
        ]
        tokens = [
            tokenizer.encode(line, add_special_tokens=False).ids
            for text in mine
            for line in document_lines(text, lines)
        ]
        expected = [token for line in tokens for token in line]
        examples = list(part.examples())
        found = [token for example in examples for token in body(example)]
        assert all(0 < len(example.ids) <= length for example in examples)
        assert len(found) + part.dropped_tokens == len(expected)
        if overflow == "carry":
            assert part.dropped_tokens == 0
        if not part.dropped_tokens:
            assert found == expected  # in order, none repeated


@common
@given(
    texts=documents,
    length=st.integers(5, 70),
    window=st.integers(1, 20),
    open_rows=st.integers(1, 10),
)
def test_packing_splits_and_loses_no_example(tokenizer, texts, length, window, open_rows):
    kept = list(filter_documents(texts, Sources(), ReadStats()))
    (part,) = convert_documents(settings_of(tokenizer, length, "sentence", "carry", 0.0, 0), tokenizer, "0", kept)
    examples = list(part.examples())
    packer = Packer(length, window, open_rows)
    rows = [row for example in examples for row in packer.add(example)] + list(packer.finish())
    unpacked = []
    for row in rows:
        assert len(row.input_ids) == row.segment_lengths.sum() <= length
        start = 0
        for a, b in row.segment_lengths.reshape(-1, 2).tolist():
            unpacked.append((tuple(row.input_ids[start : start + a + b].tolist()), a, b))
            start += a + b
    alone = [(tuple(row.input_ids.tolist()), *row.segment_lengths.tolist()) for row in one_per_row(examples)]
    assert sorted(unpacked) == sorted(alone)
