"""Write files and folders atomically: under its name each is complete, even if the process is killed at any moment.

A file or folder is written beside its place, synced to disk (`fsync`) and renamed. Names during this time:

    .unfinished-<name>   being written
    .replaced-<name>     the former folder between two renames, since no rename replaces a folder
    .removed-<name>      a folder that is being deleted

What a killed process leaves under these names is used or removed by the next writer of `<name>`. Files are readable for
whom the umask lets read, whichever library wrote them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from typing import BinaryIO

UNFINISHED, REPLACED, REMOVED = PREFIXES = (".unfinished-", ".replaced-", ".removed-")


def with_prefix(path: str, prefix: str) -> str:
    """Put `prefix` before the last component of `path`."""
    return os.path.join(os.path.dirname(path), prefix + os.path.basename(path))


@contextlib.contextmanager
def replaced_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to write, which gets the name `path` when the block ends; an error leaves the former file.

    Its folder is created. Other processes that write the same file wait. A device or a pipe is written directly.

    Raises:
        OSError: the file cannot be written.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    unfinished = with_prefix(path, UNFINISHED)
    with locked(unfinished, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            os.ftruncate(descriptor, 0)
            with os.fdopen(descriptor, "w+b", closefd=False) as file:
                yield file
            os.fsync(descriptor)  # otherwise a power failure could leave an empty file under the final name
            os.replace(unfinished, path)
        except BaseException:
            if _is_at(descriptor, unfinished):
                os.remove(unfinished)
            raise


def write_file(path: str, content: bytes | str) -> None:
    """Write a file as :func:`replaced_file` does; text is encoded as UTF-8."""
    with replaced_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replaced_folder(path: str, replace: bool = True) -> Iterator[str]:
    """Yield the path of an empty folder, which is moved to `path` when the block ends; an error leaves the former one.

    Args:
        path: of the folder. Other processes that write a folder beside it wait.
        replace: replace a folder that exists.

    Raises:
        FileExistsError: `path` exists, and either `replace` is off or it is no folder.
        OSError: the folder cannot be written.
    """
    path = os.path.realpath(path)
    unfinished = with_prefix(path, UNFINISHED)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(os.path.dirname(path)):
        restore(path)
        if os.path.lexists(path) and not (replace and os.path.isdir(path)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        try:
            remove(unfinished)
            os.mkdir(unfinished)
            yield unfinished
            _apply_umask(unfinished)
            move_into_place(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(unfinished)
            raise


def move_into_place(unfinished: str, path: str) -> None:
    """Sync a written file or folder to disk and rename it to `path`, replacing what is there."""
    for folder, _, names in os.walk(unfinished):
        for name in names:
            sync(os.path.join(folder, name))
    sync(unfinished)
    replaced = with_prefix(path, REPLACED)
    if os.path.isdir(path):  # no rename replaces a folder
        remove(replaced)
        os.rename(path, replaced)
    try:
        os.rename(unfinished, path)
        sync(os.path.dirname(path))
    finally:
        restore(path)


def replace_link(link: str, path: str) -> None:
    """Make `link` a symbolic link to `path` in one step, so that the link exists at every moment."""
    unfinished = with_prefix(link, UNFINISHED)
    remove(unfinished)
    os.symlink(os.path.relpath(path, os.path.dirname(link)), unfinished)
    os.replace(unfinished, link)
    sync(os.path.dirname(link))


def remove(path: str) -> None:
    """Remove a file, a link or a folder if it exists. A folder is renamed first, so that no part of it keeps its name.

    Raises:
        OSError: it cannot be removed or renamed.
    """
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        return
    if not os.path.basename(path).startswith((UNFINISHED, REMOVED)):
        removed = with_prefix(_without_prefix(path), REMOVED)
        remove(removed)
        os.rename(path, removed)
        path = removed
    assert os.path.basename(path).startswith((UNFINISHED, REMOVED)), path  # a name that only this module gives
    shutil.rmtree(path, ignore_errors=True)  # what remains is removed by the next writer


def restore(path: str) -> None:
    """Return a folder to its name that a killed process was replacing, and remove what it had replaced or removed.

    No other process may be writing to `path`.
    """
    replaced = with_prefix(path, REPLACED)
    if os.path.isdir(replaced) and not os.path.lexists(path):
        os.rename(replaced, path)
    remove(replaced)
    remove(with_prefix(path, REMOVED))


def clean(folder: str, start: str) -> None:
    """Restore or remove what killed processes have left in a folder of files whose names begin with `start`.

    No other process may be writing these.
    """
    for name in sorted(os.listdir(folder)):
        if name.startswith(tuple(prefix + start for prefix in PREFIXES)):
            path = _without_prefix(os.path.join(folder, name))
            restore(path)
            remove(with_prefix(path, UNFINISHED))


def sync(path: str) -> None:
    """Write a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_prefix(path: str) -> str:
    folder, name = os.path.split(path)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return os.path.join(folder, name)


@contextlib.contextmanager
def locked(path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Yield a descriptor of a file or folder while no other process or thread has it locked by this function.

    Args:
        flags: of `os.open`.
    """
    while True:
        descriptor = os.open(path, flags, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # the process that had it locked has renamed it
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # which unlocks; so does the end of the process


def _is_at(descriptor: int, path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


def _apply_umask(folder: str) -> None:
    """Give files the permissions that the folder got from the umask; safetensors makes them for their owner only."""
    mode = os.stat(folder).st_mode & 0o666
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if stat.S_IMODE(os.stat(path).st_mode) != mode:
                os.chmod(path, mode)
