"""What killed runs leave behind of Streaming's shared memory: found by the next run, and removed.

Streaming keeps some small blocks per data set in `/dev/shm`, and lock files in the folder of temporary files, all under
a number. A process that is killed with all its children leaves them there, and one whose shards are in an object store
then makes Streaming refuse the same cache ("Reused local directory"). Streaming's `clean_stale_shared_memory` removes
whatever it finds, also of a job that is running beside this one. Here each data set has an owner's file that its
process keeps locked for as long as it lives, and only what had an owner that is gone is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from typing import TextIO

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN

SHARED_MEMORY = "/dev/shm"  # Linux; elsewhere nothing is found there, and nothing removed


def own(prefix: int) -> TextIO:
    """Mark the data set with this number as one that is in use, until the file is closed or the process ends."""
    file = open(_owner_path(prefix), "w", encoding="utf-8")  # noqa: SIM115 (open for as long as the data set is there)
    fcntl.flock(file, fcntl.LOCK_SH)  # several launchers on one machine are several nodes, of one number
    file.write(str(_inode(prefix)))
    file.flush()
    return file


def remove_stale() -> list[int]:
    """Remove what data sets of this user have left whose processes are gone; their numbers.

    One process at a time may call it, and while no data set gets its number.
    """
    pattern = re.compile(re.escape(os.path.basename(_owner_path(0))).replace("000000", r"(\d{6,})"))
    removed = []
    for name in os.listdir(tempfile.gettempdir()):
        match = pattern.fullmatch(name)
        if match and _remove_if_stale(int(match[1])):
            removed.append(int(match[1]))
    return removed


def _remove_if_stale(prefix: int) -> bool:
    path = _owner_path(prefix)
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if its owner, or a worker of it, is alive
        # Another program may have taken the number since: then the block is another one.
        if _inode(prefix) in (None, int(file.read() or -1)):
            names = [f"{prefix:06}_{name}" for name in SHM_TO_CLEAN]
            paths = [os.path.join(SHARED_MEMORY, name) for name in names]
            locks = [f"{prefix:06}_{name}" for name in (BARRIER_FILELOCK, CACHE_FILELOCK)]
            paths += [os.path.join(tempfile.gettempdir(), name) for name in locks]
            for left in paths:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(left)
        os.remove(path)
        return True
    return False


def _owner_path(prefix: int) -> str:
    return os.path.join(tempfile.gettempdir(), f"electra_composer_{os.getuid()}_{prefix:06}.owner")


def _inode(prefix: int) -> int | None:
    try:
        return os.stat(os.path.join(SHARED_MEMORY, f"{prefix:06}_{LOCALS}")).st_ino
    except OSError:
        return None
