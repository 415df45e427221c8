"""Reference of the configuration's keys: type, range, default and meaning of each, and the text of `--help`.

The meaning of a key is the comment above its field or beside it; that of a section also the first line of the docstring
of its dataclass. Comments are read from the source. Nothing here imports a library but OmegaConf.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from electra_composer.errors import UserError, nearest
from electra_composer.ranges import container, expected

NO_VALUE = dataclasses.MISSING
"""`Entry.default` of a section, and of a key that a file or the command line must set."""


@dataclass(frozen=True)
class Entry:
    """A key or a section of a schema.

    Attributes:
        path: such as `optimizer`, `optimizer.lr` or `data.streams.<name>.repeat`.
        hint: type of the field, with its range.
        default: :data:`NO_VALUE` if there is none.
        meaning: the comment on the field; of a section, the first sentence of the docstring of its dataclass.
        section: the dataclass of a section; None for a key.
    """

    path: str
    hint: Any
    default: Any
    meaning: str
    section: type | None = None

    def expected(self) -> str:
        """Describe the valid values: `a list of 2 values, each a number in [0, 1)`."""
        text, inner = expected(self.hint, []), container(self.hint)
        element = expected(get_args(inner)[0], []) if get_origin(inner) is list else "text"
        return text if element == "text" else f"{text}, each {element}"


def entries(schema: type, prefix: str = "") -> Iterator[Entry]:
    """Return all keys and sections of a schema: of each section its keys in the order of the fields, then its parts."""
    hints, meanings = get_type_hints(schema, include_extras=True), comments(schema)
    parts: list[tuple[Entry | None, type, str]] = []
    for field in fields(schema):
        path, hint = prefix + field.name, hints[field.name]
        inner, meaning = container(hint), meanings.get(field.name, "")
        if isinstance(inner, type) and is_dataclass(inner):
            summary = f"{first_line(inner)} {meaning}".strip()
            parts.append((Entry(path, hint, default_of(field), summary, inner), inner, f"{path}."))
            continue
        yield Entry(path, hint, default_of(field), meaning)
        if get_origin(inner) is dict and isinstance(part := get_args(inner)[1], type) and is_dataclass(part):
            parts.append((None, part, f"{path}.<name>."))
    for entry, part, start in parts:
        if entry is not None:
            yield entry
        yield from entries(part, start)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; :data:`NO_VALUE` for sections that are always there."""
    if field.default is not NO_VALUE:
        return NO_VALUE if field.default == MISSING else field.default
    default = field.default_factory() if field.default_factory is not NO_VALUE else NO_VALUE
    return NO_VALUE if is_dataclass(default) else default


def first_line(schema: type) -> str:
    """Return the first line of the docstring of a dataclass."""
    return (schema.__doc__ or "").partition("\n")[0]


def comments(schema: type) -> dict[str, str]:
    """Return the comment on each field of a dataclass and of its bases: that above it, and that beside it."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base):
            found |= _comments_of_module(base.__module__)[base.__name__]
    return found


@cache
def _comments_of_module(name: str) -> dict[str, dict[str, str]]:
    """Return class → field → comment."""
    source = inspect.getsource(sys.modules[name])
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = {token.start[0]: token.string.lstrip("#").strip() for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name] = {}
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno
                while lines[first - 2].lstrip().startswith("#"):
                    first -= 1
                above = " ".join(texts[line] for line in range(first, field.lineno))
                beside = texts.get(field.end_lineno or 0, "")
                found[node.name][field.target.id] = f"{above}; {beside}" if above and beside else above or beside
    return found


def written(value: Any) -> str:
    """Return a default as YAML writes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def help_text(schema: type, part: str | None = None) -> str:
    """Return the reference of all keys, or of a key or a section, for a terminal.

    Raises:
        UserError: there is no such part; the message has the nearest.
    """
    found = list(entries(schema))
    if part is not None:
        chosen = [entry for entry in found if f"{entry.path}.".startswith(f"{part}.")]
        if not chosen:
            paths = [entry.path for entry in found]
            same = [path for path in paths if path.rpartition(".")[2] == part]
            hint = f"did you mean {' or '.join(same)}?" if same else nearest(part, paths)
            raise UserError(f"--help {part}: no such key or section; {hint}")
        found = chosen
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    return "\n".join(line for entry in found for line in _lines(entry, width))


def _lines(entry: Entry, width: int) -> Iterator[str]:
    """Format an entry: the key with its default, what is valid, and below them what it means."""
    if entry.section is not None:
        default = "" if entry.default is NO_VALUE else f" (default: {written(entry.default)})"
        yield ""
        yield from textwrap.wrap(f"{entry.path}{default}: {entry.meaning}", width, subsequent_indent="  ")
        return
    key = f"  {entry.path}" + (" (required)" if entry.default is NO_VALUE else f"={written(entry.default)}")
    valid = entry.expected()
    if max(len(key), 40) + 2 + len(valid) <= width:
        yield f"{key:40}  {valid}"
    else:
        yield key
        yield from textwrap.wrap(valid, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    yield from textwrap.wrap(entry.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
