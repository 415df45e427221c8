"""The pages that the tests of the documentation read, and what they share."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from tiny import ROOT

DOCS = ROOT / "docs"
# docs/log.md is a record of commands as they were typed, most of which no longer exist in that form.
PAGES = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
PAGES |= {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")) if path.name != "log.md"}
LINKED = [*PAGES, DOCS / "log.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"]


def blocks(language, pages=PAGES):
    """Return the fenced blocks of a language."""
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)]


def functions_of_tests():
    """Return the names of all test functions."""
    return {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }


def load_script(path):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
