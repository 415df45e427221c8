"""Tagging against transformers, brute force and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tagging_inputs import INVISIBLE, SENTENCES, encoded, learned, make_split, make_task, outputs_of
from transformers import ElectraTokenizerFast

from electra_composer.errors import UserError
from electra_composer.tasks.encoded import IGNORED, collate
from electra_composer.tasks.rows import LeftOut
from electra_composer.tasks.sentences import Sentences, divide
from electra_composer.tasks.tokenization import offsets_of


def test_the_label_of_a_word_is_at_its_first_token(tokenizer: ElectraTokenizerFast) -> None:
    task = learned()
    rows = encoded(task, make_split(SENTENCES), tokenizer)
    assert task.labels == ["O", "B-X", "B-Y", "I-X", "I-Y"]
    for number, (words, tags) in enumerate(SENTENCES):
        # Each word by itself, as in google-research/electra.
        pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        expected = [tokenizer.cls_token_id, *(piece for word in pieces for piece in word), tokenizer.sep_token_id]
        assert rows[number].input_ids.tolist() == expected
        labels = [IGNORED]
        for word, tag in zip(pieces, tags, strict=True):
            labels += [task.labels.index(tag), *[IGNORED] * (len(word) - 1)] if word else []
        assert rows[number].per_token["labels"].tolist() == [*labels, IGNORED]
        assert rows[number].first_length == len(expected)


def row_begins(tokens: int, room: int, overlap: int) -> list[int]:
    """Begins of the rows of a sentence: `overlap` tokens before the end of the previous one; the last ends with it."""
    begins = [0]
    while begins[-1] + room < tokens:
        begins.append(min(begins[-1] + room - min(overlap, room // 2), tokens - room))
    return begins


def sentences_of(lengths: list[list[int]]) -> Sentences:
    """Sentences of words of so many tokens; token i of all is 100 + i, the label of word i is i."""
    bounds = offsets_of(np.array([sum(words) for words in lengths], dtype=np.int64))
    firsts = [
        begin + sum(words[:number]) if words[number] else -1
        for begin, words in zip(bounds[:-1].tolist(), lengths, strict=True)
        for number in range(len(words))
    ]
    return Sentences(
        "validation",
        np.arange(100, 100 + bounds[-1], dtype=np.int32),
        np.stack([bounds[:-1], bounds[1:]], axis=1),
        None,
        offsets_of(np.array([len(words) for words in lengths], dtype=np.int64)),
        np.array(firsts, dtype=np.int64),
        np.arange(len(firsts)),
        None,
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=3),
    st.integers(5, 12),
    st.integers(1, 12),
)
def test_every_word_is_in_one_row_with_the_most_context(
    lengths: list[list[int]], max_seq_length: int, overlap: int
) -> None:
    sentences, room = sentences_of(lengths), max_seq_length - 2
    rows = divide(sentences, max_seq_length, overlap, cls=2, sep=3)
    labels, firsts = rows.per_token["labels"], sentences.first_tokens
    # Every word with a token once, in order, at its first token.
    assert labels[labels != IGNORED].tolist() == np.flatnonzero(firsts >= 0).tolist()
    assert rows.tokens[labels != IGNORED].tolist() == (100 + firsts[firsts >= 0]).tolist()
    assert rows.lengths.max() <= max_seq_length
    for row in rows:
        assert (row.input_ids[0], row.input_ids[-1]) == (2, 3)
        for token in row.input_ids[row.per_token["labels"] != IGNORED]:
            first, last = int(row.input_ids[1]), int(row.input_ids[-2])
            assert row.input_ids[1:-1].tolist() == list(range(first, last + 1))
            (begin, end), *_ = ((begin, end) for begin, end in sentences.bounds + 100 if begin <= token < end)
            begins = [begin + shift for shift in row_begins(int(end - begin), room, overlap)]
            assert first in begins
            assert last == min(first + room, end) - 1
            assert min(token - first, last - token) == max(
                min(token - each, min(each + room, end) - 1 - token) for each in begins
            )


def test_context_is_of_the_same_document_and_on_both_sides(tokenizer: ElectraTokenizerFast) -> None:
    rows = [
        (["a", "a"], ["O", "B-X"], 1),
        (["b", "b", "b", "b"], ["O"] * 4, 1),
        (["c"], ["O"], 1),
        (["d"], ["O"], 1),
        (["e", "e"], ["O", "O"], 2),
    ]
    task = learned(rows, context=True)
    split = make_split(rows)

    def texts(length: int) -> list[str]:
        encodings = encoded(task, split, tokenizer, length)
        return ["".join(tokenizer.convert_ids_to_tokens(encodings[n].input_ids[1:-1])) for n in range(len(encodings))]

    assert texts(9) == ["aabbbbc", "abbbbcd", "abbbbcd", "abbbbcd", "ee"]
    assert texts(7) == ["aabbb", "bbbbc", "bbbcd", "bbbcd", "ee"]
    encodings = encoded(task, split, tokenizer, 9)
    assert (encodings.per_token["labels"] != IGNORED).sum() == 10
    # Of a sample of the rows only these are labelled; the others remain their context.
    split.chosen, split.left_out = np.array([False, False, True, False, True]), LeftOut("train")
    assert texts(9) == ["abbbbcd", "ee"]
    assert split.left_out.total == 2
    task.config.context = False
    assert texts(9) == ["c", "ee"]


def test_documents_are_whole_where_rows_are_filled(tokenizer: ElectraTokenizerFast) -> None:
    rows = [(["a"], ["O"], 1), (["b"], ["B-X"], 1), (["c"], ["O"], 2)]
    split = make_split(rows)
    assert learned(rows, context=True).tokenize(split, tokenizer).lengths.tolist() == [4, 4, 3]
    assert learned(rows).tokenize(split, tokenizer).lengths.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("scheme", "tags"),
    [
        ("iob1", ["I-X", "I-X", "B-X", "O", "I-Y"]),
        ("iob2", ["B-X", "I-X", "B-X", "O", "B-Y"]),
        ("bioes", ["B-X", "E-X", "S-X", "O", "S-Y"]),
    ],
)
def test_predictions_are_tags_in_the_scheme_of_the_data_and_spans(
    tokenizer: ElectraTokenizerFast, scheme: str, tags: list[str]
) -> None:
    words = ["a", "bc", "c", "d", "e-f"]
    task = learned([(words, tags)])
    assert task.notes == [f"task.scheme: {scheme}, guessed from the tags of data.train"]
    assert len(task.labels) == 1 + 2 * (4 if scheme == "bioes" else 2)
    encodings = encoded(task, make_split([(words, tags)], "validation"), tokenizer, length=6)
    assert len(encodings) > 1  # in several rows
    outputs = outputs_of(encodings, lambda label: label, len(task.labels))
    assert task.scores(encodings, outputs)["f1"] == 1.0
    (prediction,) = task.predictions(encodings, outputs)
    assert prediction["tags"] == tags
    assert prediction["spans"] == [
        {"label": "X", "start": 0, "end": 2, "text": "a bc"},
        {"label": "X", "start": 2, "end": 3, "text": "c"},
        {"label": "Y", "start": 4, "end": 5, "text": "e-f"},
    ]
    other = make_task()
    other.load_state(task.state())
    assert list(other.predictions(encodings, outputs)) == [prediction]


def test_texts_are_divided_into_words_and_spans_have_characters(tokenizer: ElectraTokenizerFast) -> None:
    task = learned()
    rows = [("A b-c.", None), ([], None), ("", None), (["a", INVISIBLE], None)]
    encodings = encoded(task, make_split(rows, "test"), tokenizer)
    assert "labels" not in encodings.per_token
    batch = collate(list(encodings), pad_id=0)
    logits = torch.zeros(*batch["input_ids"].shape, 5)
    logits[0, 2:4] = torch.tensor([[0.0, 9, 0, 0, 0], [0.0, 0, 0, 9, 0]])  # b: B-X, -: I-X
    predictions = list(task.predictions(encodings, task.keep(logits, batch)))
    assert predictions[0]["tokens"] == ["A", "b", "-", "c", "."]
    assert predictions[0]["tags"] == ["O", "B-X", "I-X", "O", "O"]
    assert predictions[0]["spans"] == [
        {"label": "X", "start": 1, "end": 3, "text": "b-", "start_char": 2, "end_char": 4}
    ]
    assert predictions[1] == {"tags": [], "spans": [], "scores": []}
    assert predictions[2] == {"tokens": [], "tags": [], "spans": [], "scores": []}
    assert predictions[3] == {"tags": ["O", "O"], "spans": [], "scores": [pytest.approx(1 / 5), None]}


def test_unusable_sentences_are_left_out_and_counted(tokenizer: ElectraTokenizerFast) -> None:
    rows = [*SENTENCES, ([], []), (["a"], None), (["a", "b"], ["O", None])]
    task, split = learned(rows), make_split(rows, "validation")
    assert len(encoded(task, split, tokenizer)) == len(SENTENCES)
    assert split.left_out.describe() == (
        "validation: 3 of 6 rows left out: 2 have words without a tag (first: a.conll:5), 1 has no words "
        "(first: a.conll:4)"
    )
    assert len(encoded(task, make_split(rows, "test"), tokenizer)) == 6


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        ([(["a", "b"], ["O"])], {}, r"a\.conll:1: 2 words, 1 tags; expected a tag for each word"),
        ([(["a", "b"], ["O", "B-Z"])], {}, r"a\.conll:1: tag 'B-Z' of word 2 is not in data\.train; .*O, B-X"),
        ([(["a"], ["I-Z"])], {"scheme": "iob1"}, r"a\.conll:1: tag 'I-Z' of word 1 is not in data\.train"),
        ([(["a"], ["X"])], {"scheme": "iob1"}, r"a\.conll:1: tag 'X' of word 1 is not in data\.train"),
        ([("a b", ["O", "O"])], {}, r"a\.conll:1: tags of the text 'a b'; expected a list of words: .*columns\.tokens"),
        ([(7, ["O"])], {}, r"a\.conll:1: tokens is 7; expected a list of words"),
        ([(["a"], "O")], {}, r"a\.conll:1: tags is 'O'; expected a list of tags: set data\.columns\.tags"),
        ([([], [])], {}, r"1 row left out"),
    ],
)
def test_rows_that_cannot_be_read(
    tokenizer: ElectraTokenizerFast, rows: list[tuple[Any, Any]], config: dict[str, Any], message: str
) -> None:
    task = learned(**config)
    with pytest.raises(UserError, match=message):
        task.tokenize(make_split(rows, "validation"), tokenizer)


@pytest.mark.parametrize(
    ("rows", "scheme", "message"),
    [
        ([(["a", "b"], ["O", "O"])], "auto", r"data\.train: one tag, O, in column 'tags'; expected at least two"),
        ([(["a"], None)], "auto", r"data\.train: 0 different tags"),
        ([(["a"], ["O"]), (["b", "c"], ["B-X", "X"])], "auto", r"a\.conll:2: 'X' is not a tag of task\.scheme=iob2"),
        ([(["a", "b"], ["B-X", "S-X"])], "iob1", r"'S-X' is not a tag of task\.scheme=iob1; expected O, B-…, I-…"),
        ([(["a", "b"], ["B-X", "I-X"])], "bioes", r"task\.scheme=bioes: no tag .* set task\.scheme=iob2"),
    ],
)
def test_tags_that_cannot_be_learned(rows: list[tuple[Any, Any]], scheme: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learned(rows, scheme=scheme)


def test_another_scheme_than_that_of_the_tags_is_said() -> None:
    task = learned([(["a", "b"], ["I-X", "I-Y"])], scheme="iob2")
    assert task.notes == ["task.scheme: iob2, but the tags of data.train look like iob1"]
    assert learned(scheme="iob2").notes == []
    assert make_task(scheme="none").metrics == ("accuracy", "macro_f1")
