"""Errors that the user can fix: one line on stderr and exit status 2 instead of a traceback."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: what was wrong, what was expected and what to do.
    """


def report_user_errors(entry_point: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an entry point to print `error: …` and exit with 2 on a :class:`UserError`, without a traceback.

    All other exceptions are bugs and keep their traceback.
    """

    @functools.wraps(entry_point)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a locale may lack characters such as ü or …
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            # Workaround (torch 2.7): an error of a DataLoader worker is raised again with its traceback as the message,
            # which ends in the original message; goes when torch keeps the message.
            message = str(error).rpartition("UserError: ")[2]
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper


def one_line(message: object, limit: int | None = None) -> str:
    """Join the lines of a message, such as an exception of another library, and cut it to `limit` characters."""
    return " ".join(str(message).split())[:limit]
