"""Command-line arguments: numbers within a range, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from electra_composer import signals
from electra_composer.errors import UserError, report_user_errors
from electra_composer.ranges import Range, keys

NAME = "ELECTRA_COMMAND"
"""Environment variable in which the command `electra` gives a program its name, such as `electra export`."""

RESULTS_HELP = "results.json of finetuning it (glue.py, finetune.py), for the model card; may be repeated"


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that reports errors as a :class:`UserError` instead of printing its usage.

    The usage names the program as it was called: by its path, or as `electra export`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.prog.startswith("electra"):
            self.prog = os.environ.pop(NAME, self.prog)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_early(parse: Callable[[list[str]], Any]) -> None:
    """Parse the command line before imports that take seconds: `--help` and errors end the program here."""
    report_user_errors(parse)(sys.argv[1:])
    signals.end_with(None, exits=False)  # the program goes on


def number(allowed: Range, kind: type = int, words: tuple[str, ...] = ()) -> Callable[[str], Any]:
    """Return the `type` of an argument that is a number within a range.

    Args:
        kind: `int` or `float`.
        words: allowed in place of a number.
    """

    def convert(text: str) -> Any:
        if text in words:
            return text
        if allowed.suffixes and allowed.contains(text):
            from streaming.base.util import bytes_to_int  # imported here, because Streaming takes seconds

            return bytes_to_int(text)
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not allowed.contains(value):
            shown = text if len(text) <= 40 else f"{text[:30]}…"
            raise argparse.ArgumentTypeError(
                f"is {shown!r}; expected {', or '.join([allowed.describe(kind is int), *words])}"
            )
        return value

    return convert


def number_of(schema: Any, field: str) -> Callable[[str], Any]:
    """Return the `type` of an argument for a field of a dataclass, with the field's range and words."""
    key = next(key for key in keys(schema) if key.path == field)
    assert isinstance(key.range, Range)
    return number(key.range, key.kind, key.words)
