"""Collect the `# Workaround` comments of the code into the section "Workarounds" of docs/architecture.md.

    python docs/list_workarounds.py            rewrite the section
    python docs/list_workarounds.py --check    exit with 1 if the section is out of date

A workaround is a comment, which may span lines, of the form

    # Workaround (composer 0.32): what is wrong or private; goes when <condition>.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
CODE = ("electra_composer", "data_prep")
HEADING = "## Workarounds\n"
# A reason of several sentences may end in a full stop: "… . Goes when <condition>."
FORM = re.compile(r"Workaround \(([A-Za-z][\w .-]*?) (\d[\w.+-]*)\): (.+)[;.] [Gg]oes when (.+?)\.?$")
INTRODUCTION = """
Code that exists only because of a fault or a private part of a library, by library. When a library is upgraded, check
the condition of each of its rows. The list is generated from comments by `python docs/list_workarounds.py`.
"""


class Workaround(NamedTuple):
    """One workaround comment; `file` is relative to the repository."""

    library: str
    file: str
    line: int
    version: str
    reason: str
    condition: str


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every workaround comment of a program, its lines joined."""
    start, column, last, text = 0, 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, position = token.start
        words = token.string.lstrip("#").strip()
        complete = "goes when" in text.lower() and text.endswith(".")
        if text and not complete and (line, position) == (last + 1, column) and not words.startswith("Workaround"):
            text, last = f"{text} {words}", line
            continue
        if text:
            yield start, text
        start, column, last = line, position, line
        text = words if words.startswith("Workaround") else ""
    if text:
        yield start, text


def parse(text: str, file: str, line: int) -> Workaround:
    """Parse one comment.

    Raises:
        ValueError: the comment does not have the form above.
    """
    match = FORM.match(text)
    if match is None:
        raise ValueError(
            f"{file}:{line}: {text!r}; expected '# Workaround (library version): what is wrong; goes when <condition>.'"
        )
    library, version, reason, condition = match.groups()
    return Workaround(library.lower(), file, line, version, reason, condition)


def collect(root: Path = ROOT, folders: tuple[str, ...] = CODE) -> list[Workaround]:
    """Return the workarounds of all Python files in `folders`, sorted by library, file and line."""
    found = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            found += [parse(text, file, line) for line, text in comments(path.read_text(encoding="utf-8"))]
    return sorted(found)


def section(workarounds: list[Workaround]) -> str:
    """Return the section as Markdown. Line numbers are left out, since every edit above a comment changes them."""
    parts = [HEADING, INTRODUCTION]
    for library in sorted({workaround.library for workaround in workarounds}):
        parts.append(f"\n### {library}\n\n| where | seen with | what is wrong or private | goes when |\n")
        parts.append("| --- | --- | --- | --- |\n")
        for row in workarounds:
            if row.library == library:
                short = row.file.removeprefix("electra_composer/")
                cells = (f"[{short}](../{row.file})", row.version, row.reason, row.condition)
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    if not workarounds:
        parts.append("\nNone.\n")
    return "".join(parts)


def updated(page: str, workarounds: list[Workaround]) -> str:
    """Return the page with its section replaced, or with the section appended if there is none."""
    before, _, rest = f"\n{page}".partition(f"\n{HEADING}")
    after = rest.partition("\n## ")[2]
    text = f"{before.lstrip(chr(10)).rstrip()}\n\n{section(workarounds)}"
    return f"{text}\n## {after}" if after else text


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the page; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the section is out of date")
    options = parser.parse_args(argv)
    try:
        workarounds = collect()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page, workarounds)
    if new == page:
        return 0
    if options.check:
        print(f"error: {PAGE.name} is out of date; run python docs/list_workarounds.py", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(workarounds)} workarounds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
