"""Find the newest complete checkpoint to resume from.

Checkpoints written by :mod:`electra_composer.checkpoints.saving` are complete. A disk that lost data after `fsync`, an
interrupted copy, or a file of another program may not be: the run then resumes from the newest complete checkpoint
before it, with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import IO

from composer.utils import dist

from electra_composer.checkpoints.safe_loading import CONTENTS, read_contents
from electra_composer.checkpoints.saving import REPLACED, aside, checkpoints_in, point
from electra_composer.errors import UserError
from electra_composer.faults import raise_on_all_ranks

log = logging.getLogger(__name__)

LOCK = ".lock"  # in a run's folder, locked by the first process of the run that trains in it
BROKEN = ".broken"  # ending of a checkpoint that cannot be read


@contextlib.contextmanager
def exclusive_lock(folder: str) -> Iterator[None]:
    """Keep a second run out of a run's folder, for as long as this one lives.

    A scheduler may start a run again while its processes still save. The lock is the process's own: it goes with it,
    however it ends, and loader workers that outlive it for a moment do not keep it.

    Raises:
        UserError: on every process: another one is at work there.
    """
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks("checkpoints.folder"):
            if dist.get_global_rank() == 0:
                os.makedirs(folder, exist_ok=True)
                file = stack.enter_context(open(os.path.join(folder, LOCK), "a", encoding="utf-8"))
                _lock(file, folder)
        try:
            yield
        finally:
            if dist.get_global_rank() == 0:
                _remove_if_unused(folder)


def _lock(file: IO[str], folder: str) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"checkpoints.folder={folder}: another process trains in this folder; wait for its end, or give "
                "another folder"
            ) from None
        if error.errno != errno.ENOLCK:  # a file system without locks
            raise


def _remove_if_unused(folder: str) -> None:
    """A run that could not begin leaves nothing, its folder included."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.remove(os.path.join(folder, LOCK))
            os.rmdir(folder)


def repair_latest_link(folder: str, link_name: str) -> None:
    """See to it that the link to a run's newest checkpoint leads to a whole one.

    A broken one is kept under another name, `….broken`, and the link moved to the newest whole one before it, with a
    warning that names both. Where there is no link, there is nothing to do. Every process of the run calls it, and the
    first does it: reading a checkpoint through takes about a second per gigabyte.

    Raises:
        UserError: on every process: a broken checkpoint, and no whole one before it.
    """
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0:
            _mend(os.path.join(folder, link_name))


def _mend(link: str) -> None:
    if not os.path.lexists(link):
        return
    path = os.path.realpath(link)
    if not os.path.exists(path) and os.path.isdir(aside(path, REPLACED)):  # killed between two moves of saving.py
        os.rename(aside(path, REPLACED), path)
    reason = why_broken(path)
    if reason is None:
        return
    batches = {saved.path: saved.batch for saved in checkpoints_in(os.path.dirname(path))}
    before = [other for other, batch in batches.items() if other != path and batch <= batches.get(path, batch)]
    for candidate in reversed(before):
        if why_broken(candidate) is None:
            if os.path.exists(path):
                os.rename(path, path + BROKEN)
            point(link, candidate)
            log.warning(
                f"{path} is not a whole checkpoint ({reason}); the run goes on from the one before it, {candidate}. "
                f"The broken one is kept as {os.path.basename(path)}{BROKEN}"
            )
            return
    raise UserError(
        f"{link}: {path} is not a readable checkpoint ({reason}), and there is no whole one before it; copy one there, "
        "or set checkpoints.overwrite=true to start anew, or another checkpoints.folder"
    )


def why_broken(path: str) -> str | None:
    """What is wrong with a checkpoint's file or folder; None if every byte is there and has its checksum.

    Nothing in it is unpickled, but for a folder's table of contents, safely.
    """
    try:
        if os.path.isdir(path):
            return _why_folder_broken(path)
        with zipfile.ZipFile(path) as archive:  # what torch.save writes
            damaged = archive.testzip()
            return None if damaged is None else f"{damaged} in it is damaged"
    except FileNotFoundError:
        return "it is gone"
    except Exception as error:  # whatever the reader stumbles over in foreign bytes: there is no end of its kinds
        return f"cut short, or another kind of file: {' '.join(str(error).split())[:200]}"


def _why_folder_broken(path: str) -> str | None:
    if not os.path.isfile(os.path.join(path, CONTENTS)):
        return f"it has no {CONTENTS}"
    contents = read_contents(path)
    for place in (contents.storage_data or {}).values():
        name = os.path.join(path, os.path.basename(place.relative_path))
        with open(name, "rb") as file:
            file.seek(place.offset)
            piece = file.read(place.length)
        if len(piece) < place.length:
            return f"{os.path.basename(name)} is cut short"
        with zipfile.ZipFile(BytesIO(piece)) as archive:
            if archive.testzip() is not None:
                return f"{os.path.basename(name)} is damaged"
    return None
