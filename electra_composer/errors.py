"""Entry points: errors that the user can fix as one line with exit status 2, and an exit that signals can end."""

from __future__ import annotations

import atexit
import functools
import io
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from electra_composer.ranks import LAUNCHED, end_by_sigterm, follow_launcher, leave_to_first_rank


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: what was wrong, what was expected and what to do.
    """


class LostRankError(UserError):
    """Another rank has failed, and its error or a signal is the cause."""


def report_user_errors(entry_point: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an entry point to print `error: …` and exit with 2 on a :class:`UserError`, without a traceback.

    Under a launcher, one of the ranks that meet the error prints it (see ranks.py). All other exceptions are bugs and
    keep their traceback. When the entry point has returned or raised, SIGTERM and SIGINT end the process at once.
    """

    @functools.wraps(entry_point)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a locale may lack characters such as ü or …
        follow_launcher()
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            # Workaround (torch 2.7): an error of a DataLoader worker is raised again with its traceback as the message,
            # which ends in the original message; goes when torch keeps the message.
            message = str(error).rpartition("UserError: ")[2]
            leave_to_first_rank(one_line(message), is_cause=not isinstance(error, LostRankError))
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
            sys.exit(2)
        except SystemExit as stop:
            if stop.code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
                end_by_sigterm()  # the first rank says that the run was stopped
            raise
        finally:
            atexit.unregister(die_of_signals)
            atexit.register(die_of_signals)  # what is registered last runs first

    return wrapper


# Workaround (composer 0.32): a handler that Composer installs at import turns SIGTERM and SIGINT into SystemExit, which
# an exit in progress only prints and which nothing raises while libraries shut down: a process that hangs there could
# not be ended by SIGTERM. Goes when Composer restores the handlers.
def die_of_signals() -> None:
    """Let SIGTERM and SIGINT end the process in the kernel, without Python.

    Not in a rank of a launcher, which sends SIGTERM to all ranks once one has failed: those that are about to exit keep
    their own status, and the launcher kills what has not ended after 30 seconds.
    """
    if not LAUNCHED and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


def one_line(message: object, limit: int | None = None) -> str:
    """Join the lines of a message, such as an exception of another library, and cut it to `limit` characters."""
    return " ".join(str(message).split())[:limit]
