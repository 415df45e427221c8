"""Interrupt an operation at every call with which it changes files, repeat it, and compare the results.

The calls are those of Python: os.rename, os.mkdir, open, os.write, … in a folder, by whatever library. The folder is
copied before each of them, and after those that create or write a file: the copy is what SIGKILL would leave at that
moment, when no `finally` runs and buffers are lost. The operation is then repeated on each copy. All this happens in
forked processes.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed

CALLS = ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "truncate", "ftruncate")
WITH_TARGET = ("rename", "replace", "link", "symlink")
CREATE = os.O_CREAT | os.O_TRUNC

Tree = dict[str, Any]
copy = shutil.copytree


class Recorder:
    """Copies a folder to numbered folders at each call that changes it, until the process ends.

    Args:
        copies: folder for the copies and for `<number>.txt`, which names the call.
    """

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = str(folder), copies
        self.count = 0
        self.copying = False
        self.lock = threading.RLock()  # a thread must not change what another one copies
        for name in (*CALLS, "write", "open"):
            self._wrap(os, name)
        self._wrap(io, "open")
        builtins.open = io.open

    def _wrap(self, module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = self._changed(module, name, arguments, options)
            if path is None:
                return function(*arguments, **options)
            with self.lock:
                if self.copying:
                    return function(*arguments, **options)
                self._copy(f"before {name} {path}")
                if name == "write":
                    done = function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    self._copy(f"in {name} {path}")
                    return done + function(arguments[0], arguments[1][done:])
                result = function(*arguments, **options)
                if name == "open":
                    self._copy(f"after {name} {path}")
                return result

        setattr(module, name, call)

    def _changed(self, module: Any, name: str, arguments: Any, options: Any) -> str | None:
        """Return the path in the folder that a call changes; None if there is none."""
        paths = [*arguments[:1]] or [options.get("path", options.get("file"))]
        mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
        if name == "open" and not (mode & CREATE if module is os else set("wax+") & set(mode)):
            return None
        if name in WITH_TARGET:
            paths.append(arguments[1])
        for path in (_absolute(path, options.get("dir_fd")) for path in paths):
            if path == self.folder or path.startswith(f"{self.folder}/"):
                return os.path.relpath(path, self.folder)
        return None

    def _copy(self, call: str) -> None:
        self.copying = True
        copy(self.folder, self.copies / str(self.count), symlinks=True)
        (self.copies / f"{self.count}.txt").write_text(call)
        self.count += 1
        self.copying = False


def _absolute(path: Any, folder: int | None = None) -> str:
    """Return the absolute path of what a call names: a path, a descriptor, or a path in an open folder."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    path = os.fsdecode(path)
    return os.path.abspath(path if folder is None else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path))


def _refuse_outside(tmp_path: Path) -> None:
    """Make this process unable to remove or rename anything that is not in `tmp_path`, from Python."""

    def check(event: str, arguments: Any) -> None:
        if event in ("os.remove", "os.rmdir", "shutil.rmtree"):
            found = [(arguments[0], arguments[1])]
        elif event == "os.rename":
            found = [(arguments[0], arguments[2]), (arguments[1], arguments[3])]
        else:
            return
        for path, folder in found:
            real = os.path.realpath(_absolute(path, None if folder in (-1, None) else folder))
            assert real.startswith(f"{tmp_path.resolve()}/"), f"{event} outside the test's folder: {real}"

    sys.addaudithook(check)
    tempfile.tempdir = str(tmp_path / "scratch")
    os.makedirs(tempfile.tempdir, exist_ok=True)


def in_child(tmp_path: Path, work: Callable[[], object]) -> None:
    """Run a function in a forked process; raise an AssertionError with its traceback if it fails.

    The process cannot remove what is not in `tmp_path`.
    """
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            _refuse_outside(tmp_path)
            # The threads of a process group that an earlier test has initialised are not in this process.
            torch.distributed.is_initialized = lambda: False
            os.fsync = lambda descriptor: None  # makes no difference without a power failure
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                work()
        except BaseException:
            os.write(write, traceback.format_exc().encode()[-50_000:])
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        report = file.read().decode()
    os.waitpid(process, 0)
    assert not report, report


def interrupt_everywhere(
    tmp_path: Path,
    operate: Callable[[Path], object],
    prepare: Callable[[Path], object] = lambda folder: None,
    tree: Callable[[Path], Tree] | None = None,
    intact: Callable[[Path], object] = lambda folder: None,
) -> list[str]:
    """Interrupt `operate(folder)` everywhere; repeated, it must leave what it leaves without an interruption.

    Args:
        operate: the operation; `folder` is always the same path.
        prepare: fills the folder before the operation.
        tree: returns what to compare afterwards; by default all names, bytes and links.
        intact: raises if something of value is lost in an interrupted folder.

    Returns:
        The calls at which it was interrupted.
    """
    tree = tree or tree_of
    folder, copies = tmp_path / "folder", tmp_path / "copies"
    folder.mkdir()
    copies.mkdir()
    prepare(folder)

    def record() -> None:
        Recorder(folder, copies)
        operate(folder)

    in_child(tmp_path, record)
    expected = tree(folder)
    calls = [(copies / f"{number}.txt").read_text() for number in range(len(list(copies.glob("*.txt"))))]

    def repeat() -> None:
        operate(folder)  # of what is complete
        compare("repeated")
        seen = []
        for number, call in enumerate(calls):
            shutil.rmtree(folder)
            (copies / str(number)).rename(folder)
            left = tree_of(folder)
            if left in seen:
                continue
            seen.append(left)
            try:
                intact(folder)
                operate(folder)
                compare("interrupted and repeated")
            except BaseException as error:
                raise AssertionError(f"interrupted {call} (call {number}), which left {sorted(left)}") from error

    def compare(what: str) -> None:
        found = tree(folder)
        assert found.keys() == expected.keys(), f"{what}: {sorted(found)}, not {sorted(expected)}"
        assert found == expected, f"{what}: {[name for name in expected if found[name] != expected[name]]} differ"

    in_child(tmp_path, repeat)
    return calls


def tree_of(folder: Path) -> Tree:
    """Return everything in a folder, hidden names included: path → bytes, target of a link, or None for a folder."""
    found: Tree = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return found
