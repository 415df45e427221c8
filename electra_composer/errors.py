"""Errors that are the user's to mend: one clear line, a non-zero exit, no traceback."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """Something the person at the keyboard can mend.

    The message is one line that says what was wrong, what was expected and what to do.
    """


def report_user_errors(entry_point: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command line print `error: …` and exit with 2 on a :class:`UserError`, instead of a traceback.

    Every other exception keeps its traceback: it is ours to mend.
    """

    @functools.wraps(entry_point)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a locale without ü or … is no reason to stop
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            # torch wraps what a loader's worker raises: the message is then its traceback, which ends in ours.
            message = str(error).rpartition("UserError: ")[2]
            print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper
