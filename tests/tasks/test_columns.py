"""Columns by the user's choice or by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from electra_composer.errors import UserError
from electra_composer.tasks.columns import find_columns
from electra_composer.tasks.tables import Table, open_table

WANTED = {"text": ["text", "sentence"], "text_pair": ["text_pair", "sentence2", None], "label": ["label", "class"]}


def table(folder: Path, *columns: str, header: bool = True) -> Table:
    line = ",".join(columns) + "\n"
    (folder / "a.csv").write_text(line * 2)
    return open_table("data.train", str(folder / "a.csv"), header=header)


@pytest.mark.parametrize(
    ("columns", "given", "found"),
    [
        (["Label", "TEXT"], {}, ["TEXT", None, "Label"]),
        (["sentence", "text", "label"], {}, ["text", None, "label"]),
        (["sentence", "sentence2", "class"], {"text": None}, ["sentence", "sentence2", "class"]),
        (["sentence", "sentence2", "class"], {"text_pair": ""}, ["sentence", None, "class"]),
        (["sentence", "sentence2", "class"], {"text": "sentence2"}, ["sentence2", None, "class"]),
        (["a", "b", "c"], {"text": "a", "label": ["c", "b"]}, ["a", None, ["c", "b"]]),
        (["Text", "text", "label"], {"text": "Text"}, ["Text", None, "label"]),
    ],
)
def test_choices_and_guesses(columns: list[str], given: dict[str, Any], found: list[Any], tmp_path: Path) -> None:
    chosen = find_columns(table(tmp_path, *columns), "data.columns", WANTED, given)
    assert chosen == dict(zip(WANTED, found, strict=True))
    assert list(chosen) == list(WANTED)


def test_numbers_of_columns_without_a_header(tmp_path: Path) -> None:
    found = find_columns(table(tmp_path, "x", "y", header=False), "data.columns", WANTED, {"text": 1, "label": "0"})
    assert found == {"text": "1", "text_pair": None, "label": "0"}


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            ["a", "label"],
            {},
            r"a\.csv: which column is text .*\(a, label\); expected text or sentence: set it, as",
        ),
        (["a", "label"], {}, r"data\.columns\.text=a, or data\.header=false if the file has no header"),
        (["Text", "TEXT", "label"], {}, r"more than one column could be text: Text, TEXT; .*data\.columns\.text=Text"),
        (
            ["text", "label"],
            {"label": "lable"},
            r"data\.columns\.label=lable: .*a\.csv has no such column; did you",
        ),
        (["text", "label"], {"label": ["label", "x"]}, r"data\.columns\.label=x: .*valid are label, text"),
        (
            ["text", "label"],
            {"labels": "label"},
            r"data\.columns\.labels: no such column of this task; did you mean",
        ),
        (["text", "label"], {"text": ""}, r"data\.columns\.text=: .*no such column"),
    ],
)
def test_absent_and_ambiguous_columns(columns: list[str], given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_columns(table(tmp_path, *columns), "data.columns", WANTED, given)
