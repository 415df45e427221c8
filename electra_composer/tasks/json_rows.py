"""Read JSON Lines, and arrays of objects in JSON files of any size as streams."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from electra_composer.corpus.readers import parse_object
from electra_composer.errors import UserError
from electra_composer.tasks.rows import Row
from electra_composer.tasks.texts import PIECE, read_lines, read_pieces, refuse_surrogates

_SPACE = re.compile(r"[ \t\r\n]*")
_CUT = 16  # characters before the end of a piece, in which an error may come from a number or escape that is cut there


def read_jsonl(path: str) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file; blank lines are skipped.

    Raises:
        UserError: not UTF-8, a line that is not JSON or no object.
    """
    for where, record in read_objects(path):
        yield Row(record, where)


def read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `file:line` and the object of each line that is not blank; see :func:`read_jsonl`."""
    for number, line in enumerate(read_lines(path), 1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        record = parse_object(line, where)
        if "\\ud" in line or "\\uD" in line:
            refuse_surrogates(record, where)
        yield where, record


def read_json(path: str) -> Iterator[Row]:
    """Yield the objects of a JSON file that is an array of objects.

    Raises:
        UserError: not UTF-8, not JSON, no array, or an element that is no object.
    """
    text = JsonText(path, "an array of objects, [{…}, …]")
    for where, record in text.array():
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found a {type(record).__name__}")
        yield Row(record, where)
    text.end()


class JsonText:
    """A JSON file that is parsed value by value; no more than one value of it is in memory.

    Args:
        expected: layout of the file, for messages.
    """

    def __init__(self, path: str, expected: str, size: int = PIECE) -> None:
        self.path = path
        self.expected = expected
        self._pieces = read_pieces(path, size)
        self._decoder = json.JSONDecoder()
        self._text = ""  # what has been read of the file, from a place before `_at`
        self._at = 0
        self._line = 1  # line of `_at`

    @property
    def where(self) -> str:
        return f"{self.path}:{self._line}"

    def peek(self) -> str:
        """Return the next character that is not white space, empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # it may be empty
            self._advance(space.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, character: str) -> None:
        """Go past a character such as `[`; anything else is an error."""
        found = self.peek()
        if found != character:
            raise self._error(f"found {found!r} instead of {character!r}" if found else "the file ends too early")
        self._advance(self._at + 1)

    def value(self) -> Any:
        """Parse the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                may_be_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT
                if may_be_cut and self._read_more():
                    continue
                if may_be_cut:
                    raise self._error("the file ends too early, or a string is not closed") from error
                self._advance(error.pos)
                raise self._error(f"not JSON: {error.msg}") from error
            except RecursionError as error:
                raise self._error("nested too deeply") from error
            if end == len(self._text) and self._read_more():  # a number may continue
                continue
            for escape in ("\\ud", "\\uD"):
                if self._text.find(escape, self._at, end) >= 0:
                    refuse_surrogates(value, self.where)
            self._advance(end)
            return value

    def array(self) -> Iterator[tuple[str, Any]]:
        """Yield place and value of each element of the array that comes next."""
        self.take("[")
        while self.peek() != "]":
            where = self.where
            yield where, self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def object_keys(self) -> Iterator[str]:
        """Yield the keys of the object that comes next; the caller parses the value of each before the next."""
        self.take("{")
        while self.peek() != "}":
            if self.peek() != '"':
                raise self._error("expected a key in quotes")
            key = self.value()
            self.take(":")
            yield key
            if self.peek() != "}":
                self.take(",")
        self.take("}")

    def end(self) -> None:
        """Refuse anything but white space up to the end of the file."""
        if self.peek():
            raise self._error("more text after the end of the value")

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Read at least as much as is left, so that a long value is parsed a few times only."""
        wanted = len(self._text) - self._at
        new = []
        for piece in self._pieces:
            new.append(piece)
            wanted -= len(piece)
            if wanted <= 0:
                break
        if new:
            self._text, self._at = self._text[self._at :] + "".join(new), 0
        return bool(new)

    def _error(self, reason: str) -> UserError:
        return UserError(f"{self.where}: {reason}; expected {self.expected}")
