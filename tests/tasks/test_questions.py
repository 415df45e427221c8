"""Rows of question answering data: fields, layouts of answers, places of answers, unusable rows."""

from __future__ import annotations

from typing import Any

import pytest
from qa_tiny import answers, make_split

from electra_composer.errors import UserError
from electra_composer.tasks.questions import Answers, locate, read_questions

CONTEXT = "The house is red. The  Red car is blue, a red one."


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("red", 13, "red"),  # in its place
        (" red ", 12, "red"),  # whitespace around it
        ("red", 40, "red"),  # the nearest one
        ("red", None, "red"),
        ("RED CAR", 13, "Red car"),
        ("the red", 0, "The  Red"),
        ("car is\nblue", 27, "car is blue"),
        ("green", 13, None),
        ("  ", 13, None),
        ("blue", 1000, "blue"),
    ],
)
def test_answers_are_found_near_their_place(text: str, start: int | None, expected: str | None) -> None:
    span = locate(CONTEXT, text, start)
    assert (None if span is None else CONTEXT[slice(*span)]) == expected


def test_the_nearest_occurrence_is_taken() -> None:
    places = [index for index in range(len(CONTEXT)) if CONTEXT.startswith("red", index)]
    assert len(places) == 2
    assert locate(CONTEXT, "red", places[1] - 2) == (places[1], places[1] + 3)
    assert locate(CONTEXT, "red", None) == (places[0], places[0] + 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (answers(("red", 13), ("house", 4)), Answers(["red", "house"], [13, 4])),
        ({"text": ["red"]}, Answers(["red"], [None])),
        ([{"text": "red", "answer_start": 13}], Answers(["red"], [13])),
        (["red", "house"], Answers(["red", "house"], [None, None])),
        ("red", Answers(("red",), (None,))),
        ([], Answers([], [])),
        ("", Answers((), ())),
    ],
)
def test_layouts_of_answers(value: Any, expected: Answers) -> None:
    (question,) = read_questions(make_split("validation", [("what?", CONTEXT, value)]), unanswerable=True)
    assert question.answers is not None
    assert tuple(map(list, question.answers)) == tuple(map(list, expected))


@pytest.mark.parametrize(
    "value",
    [
        5,
        {"text": "red", "answer_start": 13},
        {"text": ["red"], "answer_start": [13, 14]},
        {"text": ["red"], "answer_start": ["13"]},
        {"answers": ["red"]},
        [{"answer": "red"}],
        [5],
        "{'text': ['red'], 'answer_start': [13]}",
    ],
)
def test_another_layout_of_answers_is_an_error(value: Any) -> None:
    with pytest.raises(UserError, match=r'^data.jsonl:1: answers is .*; expected \{"text"'):
        list(read_questions(make_split("train", [("what?", CONTEXT, value)]), unanswerable=True))


@pytest.mark.parametrize(("question", "context"), [(5, CONTEXT), ("what?", ["a", "b"]), ({}, CONTEXT)])
def test_a_field_that_is_no_text_is_an_error(question: Any, context: Any) -> None:
    with pytest.raises(UserError, match=r"^data.jsonl:1: (question|context) is a (int|list|dict); expected text"):
        list(read_questions(make_split("train", [(question, context, "red")]), unanswerable=False))


def test_an_id_given_twice_is_an_error_except_in_training() -> None:
    rows = [("what?", CONTEXT, "red", "one"), ("what?", CONTEXT, "red", "two"), ("what?", CONTEXT, "red", "one")]
    assert len(list(read_questions(make_split("train", rows), unanswerable=False))) == 3
    with pytest.raises(UserError, match=r"^data.jsonl:3: the id 'one' was given before, at data.jsonl:1;"):
        list(read_questions(make_split("validation", rows), unanswerable=False))


def test_unusable_rows_are_left_out_with_the_reason() -> None:
    rows = [
        ("what?", CONTEXT, answers(("red", 13))),
        (" ", CONTEXT, answers(("red", 13))),
        ("what?", "", answers(("red", 13))),
        ("what?", None, answers(("red", 13))),
        ("what?", CONTEXT, answers(("green", 13))),
        ("what?", CONTEXT, answers(("red", -1))),
        ("what?", CONTEXT, answers((" ", 3))),
        ("what?", CONTEXT, answers()),
        ("what?", CONTEXT, None),
    ]
    split = make_split("train", rows)
    assert len(list(read_questions(split, unanswerable=False))) == 1
    assert split.left_out.reasons == {
        "have an empty question": (1, "data.jsonl:2"),
        "have an empty context": (2, "data.jsonl:3"),
        "have an answer that is not in the context": (1, "data.jsonl:5"),
        "have an answer that starts before the context": (1, "data.jsonl:6"),
        "have an empty answer": (1, "data.jsonl:7"),
        "have no answer, which task.unanswerable excludes": (1, "data.jsonl:8"),
        "have null for their answers": (1, "data.jsonl:9"),
    }
    # Without an answer: used if such questions are part of the task. Validation does not need the place of an answer.
    assert len(list(read_questions(make_split("train", rows), unanswerable=True))) == 2
    assert len(list(read_questions(make_split("validation", rows), unanswerable=True))) == 5
    # Each row to predict gets a prediction.
    assert len(list(read_questions(make_split("test", rows), unanswerable=False))) == len(rows)


def test_a_question_marked_as_impossible_has_no_answer() -> None:
    split = make_split("train", [("what?", CONTEXT, answers(("red", 13)))])
    split.columns = {**split.columns, "is_impossible": "impossible"}
    next(iter(split.table)).values["impossible"] = True
    (question,) = read_questions(split, unanswerable=True)
    assert question.answers == Answers((), ())
    assert question.span is None
