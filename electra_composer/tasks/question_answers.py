"""Read extractive question answering data: SQuAD's JSON (1.1 and 2.0) and MRQA's JSON Lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from electra_composer.errors import UserError
from electra_composer.tasks.json_rows import JsonText, read_objects
from electra_composer.tasks.rows import Row

SQUAD = "SQuAD's layout, data[].{title, paragraphs[].{context, qas[].{id, question, answers[].{text, answer_start}}}}"
MRQA = "MRQA's layout, {context, qas[].{qid, question, detected_answers[].{text, char_spans}}}"


def read_squad(path: str) -> Iterator[Row]:
    """Yield the questions of a file in SQuAD's layout.

    Values of a row: `id`, `question`, `context` and `title`, all text; `answers`, the columns of the hub's data set,
    `{"text": […], "answer_start": […]}`, or None for a question without the key `answers`, as in a test set; and
    `is_impossible`, by default whether `answers` is an empty list.

    Raises:
        UserError: not UTF-8, not JSON, or of another layout.
    """
    text = JsonText(path, SQUAD)
    has_data = False
    for key in text.object_keys():
        if key != "data":
            text.value()
            continue
        has_data = True
        for where, article in text.array():
            title = _get(article, "title", str, where, SQUAD, "")
            for paragraph in _get(article, "paragraphs", list, where, SQUAD):
                context = _get(paragraph, "context", str, where, SQUAD)
                for question in _get(paragraph, "qas", list, where, SQUAD):
                    yield _squad_row(path, where, title, context, question)
    text.end()
    if not has_data:
        raise UserError(f"{path}: no key 'data'; expected {SQUAD}")


def _squad_row(path: str, article: str, title: str, context: str, question: Any) -> Row:
    name = str(_get(question, "id", str | int, article, SQUAD))
    where = f"{path}, question {name!r}"
    answers = _get(question, "answers", list | None, where, SQUAD, None)
    columns = None if answers is None else _answers(answers, where)
    return Row(
        {
            "id": name,
            "question": _get(question, "question", str, where, SQUAD),
            "context": context,
            "answers": columns,
            "is_impossible": _get(question, "is_impossible", bool, where, SQUAD, columns is not None and not answers),
            "title": title,
        },
        where,
    )


def _answers(answers: list[Any], where: str) -> dict[str, list[Any]]:
    return {
        "text": [_get(answer, "text", str, where, SQUAD) for answer in answers],
        "answer_start": [_get(answer, "answer_start", int, where, SQUAD) for answer in answers],
    }


def read_mrqa(path: str) -> Iterator[Row]:
    """Yield the questions of a file in MRQA's layout, with the columns of :func:`read_squad`.

    The texts of `answers` are the characters of the context in each detected span. A detected spelling that differs
    from all of them is added at the end, with the begin of its first span.

    Raises:
        UserError: not UTF-8, not JSON, of another layout, or a span outside of the context.
    """
    for line, (where, record) in enumerate(read_objects(path)):
        if line == 0 and record.keys() == {"header"}:
            continue
        context = _get(record, "context", str, where, MRQA)
        for question in _get(record, "qas", list, where, MRQA):
            name = str(_get(question, "qid", str | int, where, MRQA))
            place = f"{where}, question {name!r}"
            detected = _get(question, "detected_answers", list | None, place, MRQA, None)
            values = {
                "id": name,
                "question": _get(question, "question", str, place, MRQA),
                "context": context,
                "answers": None if detected is None else _detected(detected, context, place),
                "is_impossible": detected is not None and not detected,
                "title": "",
            }
            yield Row(values, place)


def _detected(answers: list[Any], context: str, where: str) -> dict[str, list[Any]]:
    spans: dict[tuple[int, str], None] = {}  # in the order of the file, each once
    spellings: dict[str, int] = {}
    for answer in answers:
        char_spans = _get(answer, "char_spans", list, where, MRQA)
        for span in char_spans:
            if not (isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)):
                raise UserError(f"{where}: char_spans has {span!r}; expected [first, last] character, both inclusive")
            first, last = span
            if not 0 <= first <= last < len(context):
                raise UserError(
                    f"{where}: the span {first} to {last} is outside of the context of {len(context)} characters"
                )
            spans[first, context[first : last + 1]] = None
        if char_spans:
            spellings.setdefault(_get(answer, "text", str, where, MRQA), char_spans[0][0])
    texts, starts = [text for _, text in spans], [first for first, _ in spans]
    for text, start in spellings.items():
        if text not in texts:
            texts.append(text)
            starts.append(start)
    return {"text": texts, "answer_start": starts}


_REQUIRED: Any = object()


def _get(node: Any, key: str, kind: Any, where: str, layout: str, default: Any = _REQUIRED) -> Any:
    """Return a value of an object, of a given type; `default` if the key is absent.

    Raises:
        UserError: `node` is no object, the key is missing, or the value has another type.
    """
    if not isinstance(node, dict):
        raise UserError(f"{where}: found a {type(node).__name__} instead of an object with {key!r}; expected {layout}")
    if key not in node:
        if default is _REQUIRED:
            raise UserError(f"{where}: no key {key!r}; expected {layout}")
        return default
    value = node[key]
    if not isinstance(value, kind):
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}; expected {layout}")
    return value
