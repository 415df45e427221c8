"""Questions of extractive question answering: the fields of a row, and the place of an answer in its context."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from electra_composer.errors import UserError
from electra_composer.tasks.base import Split
from electra_composer.tasks.rows import Row

LAYOUT = '{"text": ["…"], "answer_start": [0]}, a list of {"text": "…", "answer_start": 0}, or a text'
TRAINED = ("train", "validation")
"""Splits of which unusable rows are left out; of the others every row gets a prediction."""


class Answers(NamedTuple):
    """Right answers of a question; none: it has no answer.

    Attributes:
        texts: as in the file.
        starts: first character in the context, as in the file; None: not given.
    """

    texts: Sequence[str]
    starts: Sequence[int | None]


class Question(NamedTuple):
    """A question about a context.

    Attributes:
        id: None if there is no such column.
        answers: None if they are not known.
        span: first character of the first answer in the context and the character after its last; None: no answer, or
            not known.
        where: see :class:`Row`.
    """

    id: str | None
    question: str
    context: str
    answers: Answers | None
    span: tuple[int, int] | None
    where: str


def read_questions(split: Split, unanswerable: bool) -> Iterator[Question]:
    """Yield the questions of a split. Rows that cannot be used are left out of training and validation.

    Args:
        unanswerable: whether questions without an answer are used.

    Raises:
        UserError: a field of another type, or an id given twice except in training; with the place.
    """
    places: dict[str, str] = {}
    for row in split.left_out.count(split):
        name = _text(row, split, "id") if split.columns.get("id") is not None else None
        if name is not None and split.name != "train":
            if name in places:
                raise UserError(
                    f"{row.where}: the id {name!r} was given before, at {places[name]}; expected one of each"
                )
            places[name] = row.where
        question, context, answers = _text(row, split, "question"), _text(row, split, "context"), answers_of(row, split)
        if split.name not in TRAINED:
            yield Question(name, question, context, answers, None, row.where)
            continue
        span = _first_span(context, answers)
        reason = _unusable(question, context, answers, span, unanswerable, split.name == "train")
        if reason is not None:
            split.left_out.add(reason, row.where)
        else:
            yield Question(name, question, context, answers, span, row.where)


def _unusable(
    question: str,
    context: str,
    answers: Answers | None,
    span: tuple[int, int] | None,
    unanswerable: bool,
    training: bool,
) -> str | None:
    """Return why a row cannot be used; validation does not need the place of an answer."""
    if not question.strip():
        return "have an empty question"
    if not context.strip():
        return "have an empty context"
    if answers is None:
        return "have null for their answers"
    if not answers.texts:
        return None if unanswerable else "have no answer, which task.unanswerable excludes"
    if training and span is None:
        if not answers.texts[0].strip():
            return "have an empty answer"
        if answers.starts[0] is not None and answers.starts[0] < 0:
            return "have an answer that starts before the context"
        return "have an answer that is not in the context"
    return None


def all_answers(split: Split) -> Iterator[Answers | None]:
    """Yield the answers of all rows of a split; see :func:`answers_of`."""
    return (answers_of(row, split) for row in split)


def answers_of(row: Row, split: Split) -> Answers | None:
    """Return the answers of a row, in one of the layouts of :data:`LAYOUT`; None if there is no value.

    Raises:
        UserError: another layout.
    """
    column = split.columns.get("answers")
    value = None if column is None else row.values.get(column)  # type: ignore[arg-type]
    flag = split.columns.get("is_impossible")
    if flag is not None and row.values.get(flag) is True:  # type: ignore[arg-type]
        return Answers((), ())
    if value is None:
        return None
    if isinstance(value, str):
        # A dict that was written to a csv file would be searched as a text.
        if value.lstrip().startswith(("{", "[{")):
            raise _other_layout(row, column, value)
        return Answers((value,), (None,)) if value.strip() else Answers((), ())
    texts: Any
    starts: Any
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        texts, starts = [each.get("text") for each in value], [each.get("answer_start") for each in value]
    elif isinstance(value, list):
        texts, starts = value, [None] * len(value)
    elif isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start", [None] * len(texts) if isinstance(texts, list) else None)
    else:
        raise _other_layout(row, column, value)
    if not (
        isinstance(texts, list)
        and isinstance(starts, list)
        and len(texts) == len(starts)
        and all(isinstance(text, str) for text in texts)
        and all(start is None or type(start) is int for start in starts)
    ):
        raise _other_layout(row, column, value)
    return Answers(texts, starts)


def _other_layout(row: Row, column: Any, value: Any) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    return UserError(f"{row.where}: {column} is {shown}; expected {LAYOUT}")


def _text(row: Row, split: Split, role: str) -> str:
    column = split.columns[role]
    value = row.values.get(column)  # type: ignore[arg-type]
    if value is None:
        return ""
    if role == "id" and type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}: {column} is a {type(value).__name__}; expected text: set data.columns.{role}=… to another "
            "column, or correct the row"
        )
    return value


def _first_span(context: str, answers: Answers | None) -> tuple[int, int] | None:
    if not answers or not answers.texts or (answers.starts[0] or 0) < 0:
        return None
    return locate(context, answers.texts[0], answers.starts[0])


def locate(context: str, text: str, start: int | None) -> tuple[int, int] | None:
    """Find an answer: at its place, or its occurrence nearest to that, exact or without regard to case and whitespace.

    Args:
        start: first character of the answer in the context; None: not given, the first occurrence is taken.

    Returns:
        First character and the one after the last, without whitespace around the answer; None: not found.
    """
    answer = text.strip()
    if not answer:
        return None
    near = (start or 0) + len(text) - len(text.lstrip())
    if context.startswith(answer, near):
        return near, near + len(answer)
    for pattern, flags in ((re.escape(answer), 0), (r"\s+".join(map(re.escape, answer.split())), re.IGNORECASE)):
        found = [match.span() for match in re.finditer(pattern, context, flags)]
        if found:
            return min(found, key=lambda span: abs(span[0] - near))
    return None
