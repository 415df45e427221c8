"""Read UTF-8 text files, plain or compressed, by lines or by pieces, with errors that name file and line."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from electra_composer.corpus.files import open_lines, reason_of
from electra_composer.corpus.readers import without_mark
from electra_composer.errors import UserError

PIECE = 1 << 18  # bytes


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a file with their ends; a line ends in a line feed. A byte-order mark is left out.

    Raises:
        UserError: the file cannot be read, is truncated, or is not UTF-8.
    """
    number = 0
    try:
        with explain_reading(path), open_lines(path) as file:
            for line in file:
                number += 1
                if number == 1:
                    line = _checked_begin(line, path)
                yield line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path}:{number}", error) from error


def read_pieces(path: str, size: int = PIECE) -> Iterator[str]:
    """Yield the text of a file in pieces of about `size` bytes, for formats that do not depend on lines.

    Raises:
        UserError: see :func:`read_lines`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, piece = 1, b""
    try:
        with explain_reading(path), open_lines(path) as file:
            first = True
            while piece := file.read(size):
                if first:
                    piece, first = _checked_begin(piece, path), False
                text = decoder.decode(piece)
                line += text.count("\n")
                yield text
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise _not_utf8(f"{path}:{line}", error) from error


@contextlib.contextmanager
def explain_reading(path: str) -> Iterator[None]:
    """Turn an error of a file that cannot be read, or is corrupt, into a :class:`UserError`."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path}: cannot be read: {reason_of(error)}; the file must exist, be readable and complete: check its "
            "permissions, or copy it again"
        ) from error


def _checked_begin(begin: bytes, path: str) -> bytes:
    begin = without_mark(begin, path)
    if begin.startswith(b"\x1f\x8b"):
        raise UserError(f"{path}: is compressed by gzip; expected text: rename it to {path}.gz")
    if b"\0" in begin:
        raise UserError(
            f"{path}:1: holds NUL bytes, as UTF-16 and binary files do; expected UTF-8 text: convert it, for example "
            "with iconv -f UTF-16LE"
        )
    return begin


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file, for example with "
        "iconv -f WINDOWS-1252 -t UTF-8, or remove the line"
    )


def refuse_surrogates(value: Any, where: str) -> None:
    r"""Refuse values from JSON with an escape of half a character, such as `\ud83d`, which no tokenizer accepts.

    Raises:
        UserError: there is one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: an unpaired surrogate (\\u{ord(error.object[error.start]):04x}), which is no character; "
            "correct the text or remove the row"
        ) from error
