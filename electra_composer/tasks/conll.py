"""Read CoNLL files: a token a line with its tags in columns, blank lines between sentences; also CoNLL-U."""

from __future__ import annotations

import re
from collections.abc import Iterator

from electra_composer.errors import UserError
from electra_composer.tasks.rows import Row
from electra_composer.tasks.texts import read_lines

# https://universaldependencies.org/format.html; CoNLL-X has the same columns.
CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
DOCUMENT_BEGIN = "-DOCSTART-"
# Of CoNLL-U, and `# id …` of MultiCoNER. A token `#` that begins a sentence is not taken for a comment.
_COMMENT = re.compile(r"#\s*(?:newdoc\b|newpar\b|id\s|[\w.:-]+\s*=\s)")
_NEW_DOCUMENT = re.compile(r"#\s*newdoc\b")
_LOOK_AT = 200  # lines


def read_conll(path: str, first_document: int = 0) -> Iterator[Row]:
    """Yield the sentences of a CoNLL file.

    Columns are separated by tabs or, in a line without a tab, by spaces. Values of a row:

    - `tokens`, the first column, and `tags`, the last one, as lists (no `tags` if there is one column);
    - every column by its number, `"0"`, `"1"`, …;
    - `document`, an integer that grows at `-DOCSTART-` lines and `# newdoc` comments;
    - of CoNLL-U (named `.conllu`, or ten columns separated by tabs that begin with a number): every column by its name
      in :data:`CONLLU`, `tokens` being the forms and `tags` the universal parts of speech. Comments, ranges (`1-2`) and
      empty nodes (`1.1`) are skipped.

    Args:
        first_document: number of the first document.

    Raises:
        UserError: not UTF-8, or a line with another number of columns than the first.
    """
    names: list[str] = []  # of columns
    sentence: list[list[str]] = []
    begin, width_at, document = 0, 0, first_document
    is_conllu = ".conllu" in path.rpartition("/")[2].lower()
    for number, line in enumerate(read_lines(path), 1):
        if (is_conllu and line.startswith("#")) or (not sentence and _COMMENT.match(line)):
            # the first document of a file has no number of its own
            document += bool(names and _NEW_DOCUMENT.match(line))
            continue
        columns = _split(line)
        if columns is None or columns[0] == DOCUMENT_BEGIN:
            if sentence:
                yield _row(sentence, names, document, f"{path}:{begin}")
                sentence = []
            document += bool(names and columns)
            continue
        if not names:
            is_conllu = is_conllu or _is_conllu(line)
            names = list(CONLLU) if is_conllu else [str(position) for position in range(len(columns))]
            width_at = number
        if len(columns) != len(names):
            raise _other_width(f"{path}:{number}", len(columns), len(names), width_at, is_conllu)
        if is_conllu and not columns[0].isdecimal():
            continue
        if not sentence:
            begin = number
        sentence.append(columns)
    if sentence:
        yield _row(sentence, names, document, f"{path}:{begin}")


def looks_like_conll(text: str) -> bool:
    """Tell whether the begin of a file has lines of the same number of columns, at least two, and blank lines."""
    lines = text.split("\n")[:_LOOK_AT]
    lines = lines[:-1] if len(lines) > 1 else lines  # the last one may be cut
    columns = [_split(line) for line in lines if not line.startswith(("#", DOCUMENT_BEGIN))]
    widths = {len(values) for values in columns if values is not None}
    return len(widths) == 1 and widths.pop() >= 2 and None in columns


def _split(line: str) -> list[str] | None:
    """Split a line into columns; None if it is blank. Only spaces separate, not other white space such as U+00A0."""
    line = line.rstrip("\r\n")
    if not line.strip(" \t"):
        return None
    return line.split("\t") if "\t" in line else [column for column in line.split(" ") if column]


def _is_conllu(line: str) -> bool:
    columns = line.split("\t")
    return len(columns) == len(CONLLU) and re.fullmatch(r"[01](-\d+|\.\d+)?", columns[0]) is not None


def _row(sentence: list[list[str]], names: list[str], document: int, where: str) -> Row:
    columns = [list(column) for column in zip(*sentence, strict=True)]
    by_number = {str(position): column for position, column in enumerate(columns)}
    values = {"tokens": columns[0]}
    if len(columns) > 1:
        values["tags"] = columns[-1]
    if names[0] == CONLLU[0]:
        by_name = dict(zip(names, columns, strict=True))
        values = {"tokens": by_name["form"], "tags": by_name["upos"], **by_name}
    return Row({**values, **by_number, "document": document}, where)


def _other_width(where: str, found: int, expected: int, first_line: int, is_conllu: bool) -> UserError:
    why = "by CoNLL-U" if is_conllu else f"as in line {first_line}"
    return UserError(
        f"{where}: {found} column{'s'[: found != 1]}; expected {expected} {why}: a token and its tags, separated by "
        "tabs or spaces, and blank lines between sentences; correct the line"
    )
