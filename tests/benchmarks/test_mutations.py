"""The mutations of benchmarks/mutations.py still apply to the code, and leave it valid Python."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import mutations
import pytest
from tiny import ROOT


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_applies(mutation: mutations.Mutation, tmp_path: Path) -> None:
    copy = tmp_path / mutation.path
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.path, copy)
    mutations.apply(mutation, tmp_path)
    assert copy.read_text() != (ROOT / mutation.path).read_text()
    ast.parse(copy.read_text())
    assert all((ROOT / test).exists() for test in mutation.tests.split())


def test_a_mutation_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("a = 1\na = 1\n")
    for text, times in (("a = 1", 2), ("b = 1", 0)):
        with pytest.raises(ValueError, match=f"occurs {times} times in module.py"):
            mutations.apply(mutations.Mutation("name", "fault", "module.py", text, "c", ""), tmp_path)
