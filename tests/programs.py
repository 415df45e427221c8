"""Start Python programs from a process in which the heavy libraries are imported already.

Importing torch, Composer and transformers takes seconds of CPU time, and many tests start a program. Program and run
take the arguments of `subprocess.Popen` and `subprocess.run` and start the same command lines (`python script`,
`python -c`, `python -m`, `composer -n 2 script`), but the process is forked from a server that has imported those
libraries and nothing of electra_composer. Ranks that Composer's launcher starts are forked from the same server.

A program that must be a child of the test process, or must see its environment before Python or torch starts (locale,
PYTHONHASHSEED, TRITON_INTERPRET), is started by `subprocess` instead.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

LIBRARIES = (
    "omegaconf",
    "transformers.models.electra.modeling_electra",
    "transformers.models.electra.tokenization_electra_fast",
    "composer",
    "streaming",
    "transformers",
    "torchmetrics",
    "pyarrow.parquet",
    "composer.cli.launcher",
)
ADDRESS = "ELECTRA_TESTS_PROGRAM_SERVER"  # environment variable with the path of the server's socket
WARM_CHILDREN = "ELECTRA_TESTS_WARM_CHILDREN"  # environment variable: what the program starts is forked too
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
    server = Popen([sys.executable, __file__, address], stdin=subprocess.DEVNULL)
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


# --- the server


def serve(address: str) -> None:
    """Fork a monitor for each connection; the monitor forks the program and reports its process id and exit status."""
    # Programs share what they compile, also where the environment asks Python not to write it (into the checkout).
    sys.dont_write_bytecode = False
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.pycache_prefix = os.path.dirname(address)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # monitors leave no zombies
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                try:
                    listener.close()
                    _monitor(connection)
                finally:
                    os._exit(1)
            connection.close()


def _monitor(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, fds = b"", []
    while not message.endswith(b"\n"):
        piece, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_LEN(3 * array.array("i").itemsize))
        for _level, _kind, data in ancillary:
            fds += array.array("i", data[: len(data) // 4 * 4]).tolist()
        message += piece
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(message), fds)
    for fd in fds:
        os.close(fd)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # if nobody waits for it
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Turn this process into the program: streams, environment, folder, then its code; never returns."""
    if request["session"]:
        os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
    for fd in fds:
        if fd > 2:
            os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _writer(1, write_through="PYTHONUNBUFFERED" in os.environ)
    sys.stderr = sys.__stderr__ = _writer(2, line_buffering=True, errors="backslashreplace")
    code: int | None = 0
    try:
        _run(request["command"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) or error.code is None else _say(error.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit((code or 0) & 0xFF)


def _writer(fd: int, **options: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(open(fd, "wb", closefd=False), **options)


def _say(message: Any) -> int:
    print(message, file=sys.stderr)
    return 1


def _run(command: list[str]) -> None:
    """Run the command line as Python would: `-c code`, `-m module`, or a script; `composer` is the launcher."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    program, *arguments = command
    if WARM_CHILDREN in os.environ:
        subprocess.Popen = Program  # type: ignore[misc]
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    if Path(program).name == "composer":
        from composer.cli import launcher

        sys.argv = command
        subprocess.Popen = Program  # type: ignore[misc]  # for the ranks
        sys.exit(launcher.main())
    while arguments and arguments[0] == "-u":
        del arguments[0]
    kind = arguments[0]
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = arguments[1:], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    # The program's own module, so that what a forked launcher starts finds the same class.
    import programs

    programs.serve(sys.argv[1])
