"""Counting the rows that are left out."""

from __future__ import annotations

import pytest

from electra_composer.errors import UserError
from electra_composer.tasks.rows import LeftOut, Row


def of(total: int, *reasons: str) -> LeftOut:
    left_out = LeftOut("train")
    rows = [Row({"text": "a"}, f"a.csv:{number}") for number in range(2, total + 2)]
    assert list(left_out.count(rows)) == rows
    for number, reason in enumerate(reasons, 17):
        left_out.add(reason, f"a.csv:{number}")
    return left_out


def test_reasons_are_listed_by_frequency_with_the_place_of_the_first() -> None:
    assert of(5).describe() is None
    assert of(1203, "have no label", "have an empty text", "have an empty text").describe() == (
        "train: 3 of 1,203 rows left out: 2 have an empty text (first: a.csv:18), 1 has no label (first: a.csv:17)"
    )
    assert of(9, "are too long").describe() == "train: 1 of 9 rows left out: 1 is too long (first: a.csv:17)"
    uncounted = LeftOut("validation")
    uncounted.add("have an empty text", "b.jsonl:1")
    assert uncounted.describe() == "validation: 1 row left out: 1 has an empty text (first: b.jsonl:1)"


def test_a_split_of_which_less_than_half_is_left_is_refused() -> None:
    of(2, "have no label").check()
    of(1).check()
    with pytest.raises(UserError, match=r"2 of 3 rows left out: 2 have no label .*expected at most half.*data.columns"):
        of(3, "have no label", "have no label").check()
    with pytest.raises(UserError, match="1 of 1 row left out"):
        of(1, "have no label").check()
    with pytest.raises(UserError, match=r"train: no rows; expected at least one; check data\.train"):
        of(0).check()
