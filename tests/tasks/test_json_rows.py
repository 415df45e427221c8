"""JSON Lines and arrays of objects, whatever the pieces in which a file is read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_composer.errors import UserError
from electra_composer.tasks.json_rows import JsonText, read_json, read_jsonl

common = settings(derandomize=True, database=None, max_examples=100, deadline=None)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=6) | st.sampled_from(["}", '"', "\\", "\n", "😀"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.lists(st.dictionaries(texts, values, max_size=4), max_size=4)


@common
@given(
    records=objects,
    ascii=st.booleans(),
    indent=st.sampled_from([None, 1]),
    size=st.integers(3, 40),  # a byte-order mark has three
    before=st.sampled_from(["", "\n\n", "\ufeff"]),
)
def test_values_are_those_of_the_json_module(
    records: list[dict[str, Any]], ascii: bool, indent: int | None, size: int, before: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        array, lines = Path(folder) / "a.json", Path(folder) / "a.jsonl"
        array.write_text(before + json.dumps(records, ensure_ascii=ascii, indent=indent) + "\n", encoding="utf-8")
        text = JsonText(str(array), "an array", size)
        places = [(where, value) for where, value in text.array()]
        text.end()
        assert [value for _, value in places] == records
        assert [row.values for row in read_json(str(array))] == records
        if indent:  # each object begins a line
            lines_of_array = array.read_text(encoding="utf-8").split("\n")
            assert all(lines_of_array[int(where.rpartition(":")[2]) - 1].startswith(" {") for where, _ in places)
        lines.write_text("".join(json.dumps(r, ensure_ascii=ascii) + "\n\n" for r in records), encoding="utf-8")
        read = list(read_jsonl(str(lines)))
        assert [row.values for row in read] == records
        assert [row.where for row in read] == [f"{lines}:{2 * number + 1}" for number in range(len(records))]


@common
@given(record=st.dictionaries(texts, values, max_size=3), number=st.integers(), size=st.integers(1, 9))
def test_an_object_is_read_key_by_key(record: dict[str, Any], number: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(json.dumps({**record, "n": number}), encoding="utf-8")
        text = JsonText(str(path), "an object", size)
        assert {key: text.value() for key in text.object_keys()} == {**record, "n": number}


def test_jsonl_equals_pandas(tmp_path: Path) -> None:
    table = pandas.DataFrame({"id": range(9), "text": [f"é {i}\n" * i for i in range(9)], "score": [0.5] * 9})
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "a.json", orient="records")
    assert [row.values for row in read_jsonl(str(tmp_path / "a.jsonl"))] == table.to_dict("records")
    assert [row.values for row in read_json(str(tmp_path / "a.json"))] == table.to_dict("records")


LINES = {
    "broken": ('{"a": 1}\n\n{"a": }\n', r"a\.json:3: not JSON \(Expecting value at character 7\); expected one"),
    "no object": ('{"a": 1}\n[1]\n', r"a\.json:2: expected an object, found a list"),
    "half a character": ('{"a": "\\ud83d"}\n', r"a\.json:1: an unpaired surrogate \(\\ud83d\)"),
    "deep": ("[" * 100_000, r"a\.json:1: not JSON \(maximum recursion"),
    "Latin-1": (b'{"a": 1}\n{"a": "\xe9"}\n', r"a\.json:2: not UTF-8 \(byte 0xe9\)"),
}
ARRAYS = {
    "broken": ('[{"a": 1},\n{"a": }]' + " " * 50, r"a\.json:2: not JSON: Expecting value; expected an array of obj"),
    "no object": ('[{"a": 1},\n2]', r"a\.json:2: expected an object, found a int"),
    "no array": ('{"a": 1}', r"a\.json:1: found '\{' instead of '\['; expected an array of objects"),
    "truncated": ('[{"a": 1},\n{"a": "b', r"a\.json:2: the file ends too early, or a string is not closed"),
    "truncated after an object": ('[{"a": 1}\n', r"a\.json:2: the file ends too early; expected an array"),
    "no comma": ('[{"a": 1}\n{"a": 1}]', r"a\.json:2: found '\{' instead of ','"),
    "two arrays": ('[{"a": 1}]\n[]', r"a\.json:2: more text after the end"),
    "half a character": ('[\n{"a": "\\uD83D"}]', r"a\.json:2: an unpaired surrogate \(\\ud83d\)"),
    "deep": ("[" * 100_000, r"a\.json:1: nested too deeply"),
    "Latin-1": (b'[{"a": 1},\n\n{"a": "\xe9"}]', r"a\.json:3: not UTF-8 \(byte 0xe9\)"),
    "cut UTF-8": ('[{"a": "é'.encode()[:-1], r"a\.json:1: not UTF-8 \(byte 0xc3\)"),
}


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [(read_jsonl, *case) for case in LINES.values()] + [(read_json, *case) for case in ARRAYS.values()],
    ids=[f"lines, {name}" for name in LINES] + [f"array, {name}" for name in ARRAYS],
)
def test_malformed_json(reader: Any, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        list(reader(str(path)))
