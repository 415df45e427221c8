"""Tokens and windows of question answering against transformers' tokenizer and the rules of google-research/electra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from qa_tiny import answers, make_split, make_task, make_tokenizer, random_examples

from electra_composer.errors import UserError
from electra_composer.tasks import qa_windows
from electra_composer.tasks.encoded import EncodedRows

TOKENIZER = make_tokenizer()
LENGTH, STRIDE = 24, 6


def encode(name: str, examples: Any, length: int = LENGTH, stride: int = STRIDE, **settings: Any) -> EncodedRows:
    task = make_task(stride=stride, **settings)
    split = make_split(name, examples)
    task.learn(split)
    return task.encode(task.tokenize(split, TOKENIZER), TOKENIZER, length)


def rows_of(rows: EncodedRows, example: int) -> list[int]:
    return np.flatnonzero(rows.source.example == example).tolist()


def test_windows_are_those_of_transformers() -> None:
    examples = random_examples(40)
    rows = encode("train", examples)
    for index, (question, context, _) in enumerate(examples):
        room = LENGTH - 3 - len(TOKENIZER.tokenize(question))
        expected = TOKENIZER(
            question,
            context,
            truncation="only_second",
            max_length=LENGTH,
            stride=room - STRIDE,  # tokens that two windows have in common
            return_overflowing_tokens=True,
        )
        found = [rows[row].input_ids.tolist() for row in rows_of(rows, index)]
        assert found == expected["input_ids"]
    assert len(rows) > 2 * len(examples)


def test_windows_do_not_leave_out_tokens_if_the_stride_is_longer_than_they_are() -> None:
    rows = encode("train", random_examples(10), stride=1000)
    for example in range(10):
        parts = [rows[row].input_ids[rows[row].first_length : -1] for row in rows_of(rows, example)]
        context = TOKENIZER(random_examples(10)[example][1], add_special_tokens=False)["input_ids"]
        assert np.concatenate(parts).tolist() == context


def test_targets_are_the_tokens_of_the_answer_where_they_are_inside() -> None:
    examples = random_examples(60, seed=1)
    rows = encode("train", examples)
    found = [0, 0]
    for row in range(len(rows)):
        _, context, golds = examples[rows.source.example[row]]
        start, end = rows.per_row["start_positions"][row], rows.per_row["end_positions"][row]
        answer = TOKENIZER(golds["text"][0], add_special_tokens=False)["input_ids"]
        places = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        first = [place[0] for place in places].index(golds["answer_start"][0]) - rows.source.firsts[row]
        inside = first >= 0 and first + len(answer) <= rows.lengths[row] - rows.first_lengths[row] - 1
        found[inside] += 1
        if inside:
            assert rows[row].input_ids[start : end + 1].tolist() == answer
            assert start == first + rows.first_lengths[row]
        else:
            assert (start, end) == (0, 0)
    assert min(found) > 20
    assert not rows.per_row["impossible"].any()


@pytest.mark.parametrize(
    ("context", "answer", "tokens"),
    [
        ("The car  (red) is blue", "red", ["red"]),
        ("a redblue car", "blue", ["##b", "##l", "##u", "##e"]),  # inside a word
        ("Ein grüner car in the house", "grüner", ["g", "##r", "##u", "##n", "##e", "##r"]),  # the accent is dropped
        ("car\u200b red", "\u200b red", ["red"]),  # a character that the tokenizer drops
        ("the 𝒳 car", "𝒳 car", ["[UNK]", "car"]),
    ],
)
def test_answers_are_mapped_by_characters(context: str, answer: str, tokens: list[str]) -> None:
    rows = encode("train", [("what", context, answers((answer, context.index(answer))))])
    start, end = rows.per_row["start_positions"][0], rows.per_row["end_positions"][0]
    assert TOKENIZER.convert_ids_to_tokens(rows[0].input_ids[start : end + 1]) == tokens


def test_questions_without_an_answer_are_marked() -> None:
    rows = encode("train", [("what", "the red car", answers(("red", 4))), ("what", "the red car", answers())])
    assert rows.per_row["impossible"].tolist() == [0, 1]
    assert rows.per_row["start_positions"].tolist() == [3 + 1, 0]


def test_each_distinct_context_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qa_windows, "CONTEXT_CHUNK", 4)
    examples = random_examples(30)
    examples += examples[:10]
    split = make_split("validation", examples)
    questions = make_task().tokenize(split, TOKENIZER)
    texts = list(dict.fromkeys(context for _, context, _ in examples))
    assert questions.texts is not None
    assert questions.texts.contexts == texts
    assert len(questions.contexts.lengths) == len(texts)
    assert [texts[index] for index in questions.context_of] == [context for _, context, _ in examples]
    lengths = [len(TOKENIZER(f"{q} {c}", add_special_tokens=False)["input_ids"]) + 3 for q, c, _ in examples]
    assert questions.lengths.tolist() == lengths


def test_questions_are_cut_to_64_tokens() -> None:
    rows = encode("train", [("red " * 100, "the red car", answers(("red", 4)))], length=80)
    assert rows.first_lengths.tolist() == [66]
    assert TOKENIZER.decode(rows[0].input_ids[66:]) == "the red car [SEP]"


def test_a_length_without_room_for_the_context_is_an_error() -> None:
    examples = [("what is red", "the red car", answers(("red", 4)))]
    assert len(encode("train", examples, length=7)) == 3
    with pytest.raises(UserError, match=r"^data.max_seq_length=6 leaves no room .* of 3 tokens in train; .* least 7"):
        encode("train", examples, length=6)


def test_each_token_may_start_an_answer_in_the_window_with_most_context() -> None:
    """The rule of `_check_is_max_context`, token by token."""
    rows = encode("validation", random_examples(30, seed=2))
    for example in range(30):
        windows = rows_of(rows, example)
        spans = [
            (rows.source.firsts[row], rows.lengths[row] - rows.first_lengths[row] - 1, rows[row]) for row in windows
        ]
        total = max(first + length for first, length, _ in spans)
        chosen = np.zeros((len(windows), total), dtype=int)
        for token in range(total):
            scores = [
                min(token - first, first + length - 1 - token) + 0.01 * length
                if first <= token < first + length
                else -1.0
                for first, length, _ in spans
            ]
            chosen[int(np.argmax(scores)), token] = 1
        for number, (first, length, row) in enumerate(spans):
            marks = row.per_token["may_start"]
            assert marks[row.first_length : -1].tolist() == chosen[number, first : first + length].tolist()
            assert not marks[: row.first_length].any()
            assert not marks[-1]


def test_examples_without_a_context_or_question_have_a_row() -> None:
    rows = encode("test", [("what", "", None), ("", "the red car", None), (None, None, None)])
    decoded = [TOKENIZER.decode(rows[row].input_ids) for row in range(len(rows))]
    assert decoded == ["[CLS] what [SEP]", "[CLS] [SEP] the red car [SEP]", "[CLS] [SEP]"]
