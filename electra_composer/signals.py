"""End a program by SIGINT (Ctrl-C) or SIGTERM with one line and status 130 or 143, from its first statement on.

Imports take seconds, so :func:`install` comes before them. A signal then ends the process at once, without unwinding:
libraries catch exceptions that reach their imports, and print advice. Once there is something to clean up, such as
unfinished files, :func:`unwind` makes a signal raise :class:`Stopped` instead. While a run trains,
:mod:`electra_composer.training.interrupts` has handlers of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType

# Workaround (composer 0.32): `initialize_dist` sets LOCAL_RANK in a process without a launcher too, so it is read at
# import; goes when Composer leaves the environment as it is.
LAUNCHED = "LOCAL_RANK" in os.environ

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = [128 + number for number in SIGNALS]  # exit status of a program that one of them has ended
BLOCKED_SECONDS = 2.0  # until a signal that the main thread does not handle, because it waits in C code, ends it anyway


class Stopped(SystemExit):
    """Ends the program with 128 + the number of a signal, after `finally` and `with` blocks have cleaned up."""


class _Program:
    """State of the signals of this process.

    Attributes:
        received: the first signal; None: none so far.
        outcome: what was kept of the work, for the line about the signal.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.is_main_rank = os.environ.get("RANK", "0") == "0"  # glue.py changes RANK later
        self.unwinds = False
        self.exits = False
        self.received: signal.Signals | None = None
        self.outcome = ""
        self.status: int | None = None  # see end_with
        self.seen = 0  # signals
        self._printing = threading.RLock()
        self.said = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread."""
        if self.received is None:
            self.received = signal.Signals(number)
            if self.exits:
                return  # exit handlers release shared memory; the line is printed after them
            if self.unwinds:
                raise Stopped(128 + number)
            self.end_at_once(number)
        elif number == signal.SIGINT:
            self.end_at_once(number)

    def watch(self, pipe: int) -> None:
        """Handle, in a thread, signals that arrive while the main thread waits in C code.

        Such code is `torch.distributed` waiting for other ranks, or the training of a vocabulary.
        """
        while True:
            number = os.read(pipe, 1)[0]
            if signal.getsignal(number) != self.handle:
                continue
            self.seen += 1
            if self.unwinds or self.exits:
                time.sleep(BLOCKED_SECONDS)
            if not self.unwinds or self.received is None or (self.seen > 1 and number == signal.SIGINT):
                self.end_at_once(number)

    def say(self) -> None:
        """Print the line about the signal, once and on rank 0."""
        with self._printing:
            if self.is_main_rank and self.received is not None and not self.said:
                self.said = True
                line = f"stopped by {self.received.name}{self.outcome and f': {self.outcome}'}\n"
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(2, line.encode(errors="backslashreplace"))

    def end_at_once(self, number: int) -> None:
        """End this process and its children without cleaning up."""
        self.received = self.received or signal.Signals(number)
        with contextlib.suppress(Exception):  # not imported yet, or in part
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
        self.leave()

    def leave(self) -> None:
        """End this process if a signal was received.

        Composer's launcher prints all output of a rank above 0, unless it was killed.
        """
        if os.getpid() == self.pid and self.received is not None:
            self.say()
            if not self.is_main_rank:
                os.kill(self.pid, signal.SIGKILL)
            os._exit(128 + self.received)

    def exit(self) -> None:
        """End this process after the exit handlers of all libraries.

        What is left is to tear down the interpreter and its libraries, which takes a second or two, in which a signal
        would not be handled.
        """
        self.leave()
        if os.getpid() == self.pid and self.status is not None and not LAUNCHED:
            with contextlib.suppress(OSError, ValueError):  # left to Python, which reports it
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()
                os._exit(self.status)


_program: _Program | None = None


def install() -> None:
    """Handle SIGINT and SIGTERM in this process, from now on and until the end of the program.

    Processes that it forks get the default handlers, so that they print no lines of their own.
    """
    global _program
    _program = program = _Program()
    for number in SIGNALS:
        signal.signal(number, program.handle)
    _keep_from_composer(program)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=program.watch, args=(reader,), daemon=True, name="signals").start()
    os.register_at_fork(after_in_child=_reset_in_child)
    _report_no_consequences(program)
    atexit.register(program.exit)  # what is registered first runs last


def _keep_from_composer(program: _Program) -> None:
    # Workaround (composer 0.32): its import replaces the handlers by its own, which raise SystemExit in the middle of
    # other imports; goes when it leaves the handlers alone.
    install_handler = signal.signal

    def keep(number: int, handler: object) -> object:
        if getattr(handler, "__module__", None) == "composer.core.engine":
            return signal.getsignal(number)
        return install_handler(number, handler)  # type: ignore[arg-type]

    signal.signal = keep  # type: ignore[assignment]


def _report_no_consequences(program: _Program) -> None:
    """Repeat a signal whose :class:`Stopped` Python has ignored, as it does in finalizers and weakref callbacks.

    While a signal ends the program, other errors there and in threads are its consequences, and not printed.
    """
    report, report_in_thread = sys.unraisablehook, threading.excepthook

    def ignored(unraisable: sys.UnraisableHookArgs) -> None:
        number = program.received
        if number is None:
            report(unraisable)
        elif isinstance(unraisable.exc_value, Stopped):
            program.received, program.seen = None, 0
            timer = threading.Timer(0.01, os.kill, (program.pid, number))  # after the end of this hook
            timer.daemon = True
            timer.start()

    def ended(arguments: threading.ExceptHookArgs) -> None:
        if program.received is None:
            report_in_thread(arguments)

    sys.unraisablehook, threading.excepthook = ignored, ended


def _reset_in_child() -> None:
    global _program
    program, _program = _program, None
    if program is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) == program.handle:
                signal.signal(number, signal.SIG_DFL)


def unwind() -> None:
    """From now on, let a signal raise :class:`Stopped`, so that what was begun is cleaned up.

    A second SIGINT ends the process at once.
    """
    if _program is not None:
        _program.unwinds = True


def end_with(status: int | None, exits: bool = True) -> None:
    """Set the status with which this program ends if no signal does; None: Python's.

    Args:
        exits: whether it exits now. A signal then ends it after the exit handlers, or after :data:`BLOCKED_SECONDS`.
    """
    if _program is not None:
        _program.status, _program.unwinds, _program.exits = status, False, exits


def installed() -> bool:
    """Return whether this process handles signals here."""
    return _program is not None


def received() -> bool:
    """Return whether a signal is ending this program."""
    return _program is not None and _program.received is not None


def tell(outcome: str) -> None:
    """Set what the line about the signal says was kept."""
    if _program is not None:
        _program.outcome = outcome


def leave_line_to_child() -> None:
    """Print no line about the signal: a child that got it too has printed one."""
    if _program is not None:
        _program.said = True


def finish() -> None:
    """Print the line about the signal that ends this program, after cleaning up, and raise :class:`Stopped`."""
    assert _program is not None
    assert _program.received is not None
    _program.say()
    raise Stopped(128 + _program.received)
