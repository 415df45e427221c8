"""Start Python programs from a process in which the heavy libraries are imported already.

Importing torch, Composer and transformers takes seconds of CPU time, and many tests start a program. Program and run
take the arguments of `subprocess.Popen` and `subprocess.run` and start the same command lines (`python script`,
`python -c`, `python -m`, `composer -n 2 script`), but the process is forked from a server that has imported those
libraries and nothing of electra_composer. Ranks that Composer's launcher starts are forked from the same server.

A program that must be a child of the test process, or must see its environment before Python or a library starts
(PYTHONHASHSEED, TRITON_INTERPRET), is started by `subprocess` instead. A forked process exits without tearing down the
interpreter and its libraries, which takes a real one a second or two: `EXIT_SECONDS` simulates that.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

ADDRESS = "ELECTRA_TESTS_PROGRAM_SERVER"  # environment variable with the path of the server's socket
SERVER = Path(__file__).with_name("program_server.py")
WARM_CHILDREN = "ELECTRA_TESTS_WARM_CHILDREN"  # environment variable: what the program starts is forked too
EXIT_SECONDS = "ELECTRA_TESTS_EXIT_SECONDS"  # environment variable: seconds between the end of the program and its exit
START_SECONDS = 180  # for the server's imports on a busy machine
START_OF_SESSION = 5  # index of `start_new_session` among the last arguments of `_execute_child`, Python 3.10 to 3.12

Popen = subprocess.Popen  # the original, where programs replace it

running: list[Program] = []
"""Programs started by this process that have not been waited for."""


class Program(subprocess.Popen):
    """A `subprocess.Popen` of a Python command line whose process is forked from the server."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any) -> None:  # fmt: skip
        self._status = _connect()
        request = {
            "command": [os.fspath(word) for word in args],
            "env": {**(os.environ if env is None else env), ADDRESS: os.environ[ADDRESS]},
            "cwd": os.fspath(cwd or os.getcwd()),
            "session": bool(rest[START_OF_SESSION]),
        }
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(self._status, [json.dumps(request).encode() + b"\n"], streams)
        self.pid = int(_read_line(self._status))
        self._child_created = True
        for ours, theirs in ((p2cwrite, p2cread), (c2pread, c2pwrite), (errread, errwrite)):
            if theirs != -1 and ours != -1:
                os.close(theirs)
        devnull = getattr(self, "_devnull", None)
        if devnull is not None:
            os.close(devnull)
        running.append(self)

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._read_status()
        return self.returncode

    def _read_status(self) -> None:
        self.returncode = int(_read_line(self._status) or -signal.SIGKILL)
        self._status.close()
        if self in running:
            running.remove(self)


def run(
    command: Sequence[Any],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **kwargs: Any,
) -> subprocess.CompletedProcess:
    """Same as `subprocess.run`, with a :class:`Program`."""
    if capture_output:
        kwargs |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Program(list(command), **kwargs) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = connection.recv(1)
        if not piece:
            break
        line += piece
    return line.strip()


def start_server() -> None:
    """Start the server for this process and its children, without waiting for its imports."""
    if ADDRESS in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="programs-")
    address = os.path.join(folder, "socket")
    server = Popen([sys.executable, str(SERVER), address], stdin=subprocess.DEVNULL)
    os.environ[ADDRESS] = address
    owner = os.getpid()

    def end() -> None:
        if os.getpid() == owner:
            server.kill()
            server.wait()
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)


def _connect() -> socket.socket:
    start_server()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connection.connect(os.environ[ADDRESS])
            return connection
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError("the program server of the tests did not start") from error
            time.sleep(0.05)


def kill_running() -> list[Any]:
    """Kill the programs that this process has started and not waited for, with their children; their commands."""
    left = [program.args for program in running]
    for program in list(running):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(program.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        program.kill()
        program.wait()
    return left
