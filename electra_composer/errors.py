"""Entry points: errors that the user can fix as one line with exit status 2, and an exit that signals can end."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from electra_composer import signals
from electra_composer.ranks import end_by_sigterm, leave_to_first_rank
from electra_composer.signals import LAUNCHED, STOPPED


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line: what was wrong, what was expected and what to do.
    """


class LostRankError(UserError):
    """Another rank has failed, and its error or a signal is the cause."""


def report_user_errors(entry_point: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an entry point to print `error: …` and exit with 2 on a :class:`UserError`, without a traceback.

    Under a launcher, one of the ranks that meet the error prints it (see ranks.py). All other exceptions are bugs and
    keep their traceback, except while a signal ends the program, when the line about the signal is printed. When the
    entry point has returned or raised, SIGTERM and SIGINT end the process at once.
    """

    @functools.wraps(entry_point)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a locale may lack characters such as ü or …
        status = None
        signals.end_with(status, exits=False)
        try:
            if signals.received():  # between two entry points
                signals.finish()
            with _output_may_end():
                result = entry_point(*args, **kwargs)
            status = 0
            return result
        except BaseException as error:
            if signals.received():  # whatever the exception has become on its way
                signals.finish()
            if isinstance(error, SystemExit):
                status = error.code if isinstance(error.code, int) else None
                if status in STOPPED:
                    end_by_sigterm()  # the first rank says that the run was stopped
            if not isinstance(error, UserError):
                raise
            # Workaround (torch 2.7): an error of a DataLoader worker is raised again with its traceback as the message,
            # which ends in the original message; goes when torch keeps the message.
            message = str(error).rpartition("UserError: ")[2]
            leave_to_first_rank(one_line(message), is_cause=not isinstance(error, LostRankError))
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
            status = 2
            sys.exit(status)
        finally:
            signals.end_with(status)
            atexit.unregister(die_of_signals)
            atexit.register(die_of_signals)  # what is registered last runs first

    return wrapper


@contextlib.contextmanager
def _output_may_end() -> Iterator[None]:
    """End the program without a traceback when its output cannot be written any more, as in `… | head`.

    The exit status is that of a program killed by SIGPIPE in a shell, which Python ignores.

    Raises:
        UserError: stdout or stderr is a file on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        stream = next((stream for stream in (sys.stdout, sys.stderr) if not _can_write(stream)), None)
        if stream is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in its buffer would fail at exit
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise UserError(f"the output cannot be written: {error.strerror}") from error


def _can_write(stream: TextIO) -> bool:
    try:
        stream.write("\n")  # unlike a flush, it also tells where the stream has no buffer (PYTHONUNBUFFERED)
        stream.flush()
    except OSError:
        return False
    return True


# Workaround (composer 0.32): a handler that Composer installs at import turns SIGTERM and SIGINT into SystemExit, which
# an exit in progress only prints and which nothing raises while libraries shut down: a process that hangs there could
# not be ended by SIGTERM. Goes when Composer restores the handlers.
def die_of_signals() -> None:
    """Let SIGTERM and SIGINT end the process in the kernel, without Python, unless a program handles them.

    A rank of a launcher ignores them. The launcher sends SIGTERM to all ranks once one has failed: those that are about
    to exit keep their own status, and the launcher kills what has not ended after 30 seconds.
    """
    if threading.current_thread() is threading.main_thread() and (LAUNCHED or not signals.installed()):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if LAUNCHED else signal.SIG_DFL)


def one_line(message: object, limit: int | None = None) -> str:
    """Join the lines of a message, such as an exception of another library, and cut it to `limit` characters."""
    return " ".join(str(message).split())[:limit]


def nearest(name: str, valid: list[str], prefix: str = "") -> str:
    """Return a clause for an error message: the nearest valid name, or all valid names if none is close.

    `prefix` is put before each name in the clause, and not compared.
    """
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else f"valid are {', '.join(prefix + v for v in sorted(valid))}"
