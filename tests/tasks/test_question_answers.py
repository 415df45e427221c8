"""Questions of SQuAD's and MRQA's layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from electra_composer.errors import UserError
from electra_composer.tasks.question_answers import read_mrqa, read_squad

CONTEXT = "The Cat sat on the mat."


def squad(*questions: Any, **paragraph: Any) -> dict[str, Any]:
    paragraph = {"context": CONTEXT, "qas": list(questions), **paragraph}
    return {"version": {"a": [1]}, "data": [{"title": "Cats", "paragraphs": [paragraph]}], "more": [{"data": 1}]}


def question(**changed: Any) -> dict[str, Any]:
    return {"id": "q1", "question": "Who?", "answers": [{"text": "Cat", "answer_start": 4}], **changed}


def write(folder: Path, name: str, *records: Any, indent: int | None = None) -> str:
    (folder / name).write_text("".join(json.dumps(record, indent=indent) + "\n" for record in records))
    return str(folder / name)


@pytest.mark.parametrize("indent", [None, 2])
def test_squad(indent: int | None, tmp_path: Path) -> None:
    impossible = question(id=7, answers=[], is_impossible=True, plausible_answers=[{}])
    unlabelled = {"id": "q3", "question": "When?"}
    data = squad(question(), impossible, question(id="q2", answers=[]), unlabelled)
    rows = list(read_squad(path := write(tmp_path, "dev.json", data, indent=indent)))
    empty: dict[str, list[Any]] = {"text": [], "answer_start": []}
    assert [row.values["answers"] for row in rows] == [{"text": ["Cat"], "answer_start": [4]}, empty, empty, None]
    assert [row.values["is_impossible"] for row in rows] == [False, True, True, False]
    assert [row.values["id"] for row in rows] == ["q1", "7", "q2", "q3"]
    assert {(row.values["context"], row.values["title"]) for row in rows} == {(CONTEXT, "Cats")}
    assert rows[1].where == f"{path}, question '7'"
    assert list(rows[0].values) == ["id", "question", "context", "answers", "is_impossible", "title"]


def test_a_long_squad_file_is_read_in_pieces(tmp_path: Path) -> None:
    """A file of several pieces, with articles that are longer than one."""
    articles = [
        {"title": f"é{number}", "paragraphs": [{"context": "ü" * length, "qas": [question(id=f"{number}")]}]}
        for number, length in enumerate([10, 300_000, 7, 1_000_000, 3])
    ]
    (tmp_path / "a.json").write_text(json.dumps({"data": articles}, ensure_ascii=False), encoding="utf-8")
    rows = list(read_squad(str(tmp_path / "a.json")))
    assert [(row.values["title"], len(row.values["context"])) for row in rows] == [
        ("é0", 10),
        ("é1", 300_000),
        ("é2", 7),
        ("é3", 1_000_000),
        ("é4", 3),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"version": "1"}, r"a\.json: no key 'data'; expected SQuAD's layout, data\[\]"),
        ({"data": [{"title": "x"}]}, r"a\.json:1: no key 'paragraphs'; expected SQuAD's layout"),
        ({"data": ["x"]}, r"a\.json:1: found a str instead of an object with 'title'"),
        ({"data": {"x": 1}}, r"a\.json:1: found '\{' instead of '\['; expected SQuAD's layout"),
        (squad(question(), context=3), r"a\.json:1: 'context' is a int; expected SQuAD's layout"),
        (squad({"question": "Who?"}), r"a\.json:1: no key 'id'"),
        (squad(question(answers=[{"text": "Cat"}])), r"a\.json, question 'q1': no key 'answer_start'"),
        (squad(question(answers=["Cat"])), r"question 'q1': found a str instead of an object with 'text'"),
        ([1], r"a\.json:1: found '\[' instead of '\{'"),
    ],
)
def test_json_of_another_layout(data: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(read_squad(write(tmp_path, "a.json", data)))


def mrqa(*spans: Any, text: str = "Cat", **changed: Any) -> dict[str, Any]:
    detected = [{"text": text, "char_spans": list(spans), "token_spans": []}]
    answered = {"qid": "q1", "question": "Who?", "answers": ["cat"], "detected_answers": detected, **changed}
    return {"context": CONTEXT, "qas": [answered], "context_tokens": []}


def test_mrqa(tmp_path: Path) -> None:
    lines = [
        {"header": {"dataset": "x"}},
        mrqa([4, 6], [19, 21]),
        mrqa([4, 6], text="cat"),
        mrqa(detected_answers=None),
    ]
    rows = list(read_mrqa(path := write(tmp_path, "a.jsonl", *lines)))
    assert [row.values["answers"] for row in rows] == [
        {"text": ["Cat", "mat"], "answer_start": [4, 19]},
        {"text": ["Cat", "cat"], "answer_start": [4, 4]},
        None,
    ]
    assert all(CONTEXT[4:7] == row.values["answers"]["text"][0] for row in rows[:2])
    assert rows[0].where == f"{path}:2, question 'q1'"
    assert {row.values["id"] for row in rows} == {"q1"}
    assert list(rows[0].values) == ["id", "question", "context", "answers", "is_impossible", "title"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (mrqa([4, 23]), r"a\.jsonl:1, question 'q1': the span 4 to 23 is outside of the context of 23 characters"),
        (mrqa([6, 4]), r"the span 6 to 4 is outside"),
        (mrqa([4]), r"char_spans has \[4\]; expected \[first, last\]"),
        ({"context": CONTEXT}, r"a\.jsonl:1: no key 'qas'; expected MRQA's layout"),
        (mrqa(qid=None), r"a\.jsonl:1: 'qid' is a NoneType; expected MRQA's layout"),
    ],
)
def test_mrqa_of_another_layout(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        list(read_mrqa(write(tmp_path, "a.jsonl", record)))
