"""docs/reliability.md names a test for each of its rows: they are there."""

from __future__ import annotations

import re

from tiny import ROOT


def test_the_tests_that_the_table_names_are_there():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"\b(test_\w+)(?!\w|\.py)", text)) - {
        path.stem for path in (ROOT / "tests").rglob("test_*.py")
    }
    assert len(named) > 25
    assert not named - there
    for path, name in re.findall(r"((?:\w+/)*test_\w+\.py)::(test_\w+)", text):
        assert re.search(rf"^def {name}\b", (ROOT / "tests" / path).read_text(encoding="utf-8"), re.MULTILINE), (
            path,
            name,
        )
