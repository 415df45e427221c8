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

from electra_composer.atomic_files import remove, replace_link, restore
from electra_composer.checkpoints.safe_loading import METADATA, read_metadata
from electra_composer.checkpoints.saving import checkpoints_in
from electra_composer.errors import UserError, one_line
from electra_composer.faults import raise_on_all_ranks

log = logging.getLogger(__name__)

LOCK = ".lock"  # in a run's folder, locked by rank 0 of the run that trains in it
BROKEN = ".broken"  # suffix of an unreadable checkpoint


@contextlib.contextmanager
def exclusive_lock(folder: str) -> Iterator[None]:
    """Keep other runs out of a run's folder as long as this process lives.

    A scheduler may restart a run while its old processes still save. The lock belongs to the process: it ends with it
    in any case, and loader workers that outlive it for a moment do not hold it.

    Raises:
        UserError: On every rank: another run holds the lock.
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
                f"checkpoints.folder={folder}: another process trains in this folder; wait until it ends, or set "
                "another folder"
            ) from None
        if error.errno != errno.ENOLCK:  # a file system without locks
            raise


def _remove_if_unused(folder: str) -> None:
    """Remove the folder of a run that failed before it wrote anything."""
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [LOCK]:
            os.remove(os.path.join(folder, LOCK))
            os.rmdir(folder)


def repair_latest_link(folder: str, link_name: str) -> None:
    """Make the link to a run's newest checkpoint point to a complete one.

    A corrupt checkpoint is renamed to `….broken` and the link moved to the newest complete one before it, with a
    warning that names both. Without a link, nothing is done. Every rank calls this and rank 0 does the work. It reads
    the complete checkpoint, about a second per gigabyte.

    Raises:
        UserError: On every rank: the checkpoint is corrupt, and no complete one is before it.
    """
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0:
            _repair(os.path.join(folder, link_name))


def _repair(link: str) -> None:
    if not os.path.lexists(link):
        return
    path = os.path.realpath(link)
    restore(path)
    reason = find_corruption(path)
    if reason is None:
        return
    batches = {saved.path: saved.batch for saved in checkpoints_in(os.path.dirname(path))}
    before = [other for other, batch in batches.items() if other != path and batch <= batches.get(path, batch)]
    for candidate in reversed(before):
        if find_corruption(candidate) is None:
            if os.path.exists(path):
                remove(path + BROKEN)
                os.rename(path, path + BROKEN)
            replace_link(link, candidate)
            log.warning(
                f"{path} is not a complete checkpoint ({reason}); resuming from the one before it, {candidate}. The "
                f"corrupt one is kept as {os.path.basename(path)}{BROKEN}"
            )
            return
    raise UserError(
        f"{link}: {path} is not a readable checkpoint ({reason}), and there is no complete one before it; copy one "
        "there, set checkpoints.overwrite=true to start over, or set another checkpoints.folder"
    )


def find_corruption(path: str) -> str | None:
    """Describe what is wrong with a checkpoint's file or folder; None if all bytes are there and match their checksums.

    Only the metadata of a sharded checkpoint is unpickled, safely.
    """
    try:
        if os.path.isdir(path):
            return _find_corruption_of_sharded(path)
        with zipfile.ZipFile(path) as archive:  # the format of torch.save
            damaged = archive.testzip()
            return None if damaged is None else f"{damaged} in it is damaged"
    except FileNotFoundError:
        return "it does not exist"
    except Exception as error:  # zipfile and pickle raise many classes for arbitrary bytes
        return f"truncated, or another kind of file: {one_line(error, 200)}"


def _find_corruption_of_sharded(path: str) -> str | None:
    if not os.path.isfile(os.path.join(path, METADATA)):
        return f"it has no {METADATA}"
    for storage in (read_metadata(path).storage_data or {}).values():
        name = os.path.basename(storage.relative_path)
        with open(os.path.join(path, name), "rb") as file:
            file.seek(storage.offset)
            piece = file.read(storage.length)
        if len(piece) < storage.length:
            return f"{name} is truncated"
        with zipfile.ZipFile(BytesIO(piece)) as archive:
            if archive.testzip() is not None:
                return f"{name} is damaged"
    return None
