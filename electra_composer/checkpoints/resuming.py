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

from electra_composer.atomic_files import REPLACED, remove, replace_link, restore, with_prefix
from electra_composer.checkpoints.file_kinds import describe_path
from electra_composer.checkpoints.safe_loading import METADATA, describe_objects, read_metadata
from electra_composer.checkpoints.saving import checkpoint_batch, checkpoints_in
from electra_composer.errors import UserError
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


def check_unlocked(folder: str) -> None:
    """Refuse a folder in which another run trains, without creating or keeping anything.

    Raises:
        UserError: On every rank: another run holds the lock.
    """
    path = os.path.join(folder, LOCK)
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0 and os.path.exists(path):
            with open(path, "a", encoding="utf-8") as file:
                _lock(file, folder)


def is_locked(folder: str) -> bool:
    """Whether another process trains in a run's folder. Must not be called in that process: it would lose its lock."""
    try:
        with open(os.path.join(folder, LOCK), "r+", encoding="utf-8") as file:
            _lock(file, folder)
    except UserError:
        return True
    except OSError:  # no lock, or no right to write
        return False
    return False


def repair_latest_link(folder: str, link_name: str, check_only: bool = False) -> str | None:
    """Make the link to a run's newest checkpoint point to a complete one.

    A corrupt checkpoint is renamed to `….broken`, and the link moved to the newest complete one before it, with a
    warning that names both; also if the checkpoint is missing. A folder with checkpoints and no link gets one. Without
    checkpoints nothing is done. Every rank calls this and rank 0 does the work. It reads the complete checkpoint, about
    a second per gigabyte.

    Args:
        check_only: change and print nothing.

    Returns:
        The complete checkpoint; None without a link.

    Raises:
        UserError: On every rank: the checkpoint is corrupt, and no complete one is before it.
    """
    found: list[str | None] = [None]
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0:
            found = [_repair(os.path.join(folder, link_name), check_only)]
    dist.broadcast_object_list(found)
    return found[0]


def _repair(link: str, check_only: bool) -> str | None:
    path, others = os.path.realpath(link), checkpoints_in(os.path.dirname(link))
    if os.path.lexists(link):
        replaced = with_prefix(path, REPLACED)
        if not check_only:
            restore(path)
        elif not os.path.exists(path) and os.path.isdir(replaced):  # killed before its replacement got the name
            path = replaced
        reason = find_corruption(path)
        if reason is None:
            return path
        batch = checkpoint_batch(path)
        others = [each for each in others if each.path != path and (batch is None or each.batch <= batch)]
        is_there = os.path.exists(path)
        fault = f"{path} is not a complete checkpoint ({reason})" if is_there else f"{path} is missing"
    elif others:  # the folder was copied without its links
        is_there, fault = False, f"{link} is missing"
    else:
        return None
    candidate = next((each.path for each in reversed(others) if find_corruption(each.path) is None), None)
    if candidate is None:
        raise UserError(
            f"{fault}, and there is no complete checkpoint before it; copy one there, set checkpoints.overwrite=true "
            "to start over, or set another checkpoints.folder"
        )
    if check_only:
        return candidate
    before = " before it" if os.path.lexists(link) else ""
    kept = f"; the corrupt one is kept as {os.path.basename(path)}{BROKEN}" if is_there else ""
    if is_there:
        remove(path + BROKEN)
        os.rename(path, path + BROKEN)
    replace_link(link, candidate)
    log.warning(f"{fault}; resuming from the newest complete one{before}, {candidate}{kept}")
    return candidate


def find_corruption(path: str) -> str | None:
    """Describe what is wrong with a checkpoint's file or folder; None if all bytes are there and match their checksums.

    Only the metadata of a sharded checkpoint is unpickled, safely.
    """
    if not os.path.exists(path):
        return "it does not exist"
    try:
        if os.path.isdir(path):
            return _find_corruption_of_sharded(path)
        with zipfile.ZipFile(path) as archive:  # the format of torch.save
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return describe_path(path)
            damaged = archive.testzip()
            return None if damaged is None else f"{damaged} in it is damaged"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} does not exist"
    except Exception as error:  # zipfile and pickle raise many classes for arbitrary bytes
        return describe_objects(error) or describe_path(path)


def _find_corruption_of_sharded(path: str) -> str | None:
    if not os.path.isfile(os.path.join(path, METADATA)):
        return describe_path(path)
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
