"""Server process of programs.py: imports the heavy libraries once and forks a process for each program."""

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
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import programs

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


def serve(address: str) -> None:
    """Fork a monitor for each connection; the monitor forks the program and reports its process id and exit status."""
    # Programs share what they compile, also where the environment asks Python not to write it (into the checkout).
    sys.dont_write_bytecode = False
    for name in LIBRARIES:
        importlib.import_module(name)
    # Composer starts a process to find the processor's name, which takes a second, and caches it.
    importlib.import_module("composer.utils.collect_env").get_cpu_model()
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
        time.sleep(float(os.environ.get(programs.EXIT_SECONDS, 0)))
    finally:
        os._exit((code or 0) & 0xFF)


def _writer(fd: int, **options: Any) -> io.TextIOWrapper:
    encoding = os.environ.get("PYTHONIOENCODING")
    return io.TextIOWrapper(open(fd, "wb", closefd=False), encoding=encoding, **options)


def _say(message: Any) -> int:
    print(message, file=sys.stderr)
    return 1


def _run(command: list[str]) -> None:
    """Run the command line as Python would: `-c code`, `-m module`, or a script; `composer` is the launcher."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    program, *arguments = command
    if programs.WARM_CHILDREN in os.environ:
        subprocess.Popen = programs.Program  # type: ignore[misc]
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    if Path(program).name == "composer":
        from composer.cli import launcher

        sys.argv = command
        subprocess.Popen = programs.Program  # type: ignore[misc]  # for the ranks
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
    serve(sys.argv[1])
