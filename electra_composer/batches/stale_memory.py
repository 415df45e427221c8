"""Remove shared memory and lock files that killed runs left behind.

Streaming keeps a few small blocks per dataset in `/dev/shm` and lock files in the temporary folder, all named by a
number. Here each dataset also has an owner file, which its process keeps locked while it lives; only files whose owner
has exited are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from typing import TextIO

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN

# Workaround (streaming 0.13): a process killed with all its children leaves its blocks and lock files behind; with a
# remote, Streaming then refuses the same cache ("Reused local directory"). `clean_stale_shared_memory` removes all
# blocks, those of running jobs too. Goes when Streaming tracks the owners of its blocks.
SHARED_MEMORY = "/dev/shm"  # Linux; elsewhere no blocks are found or removed


def mark_in_use(prefix: int) -> TextIO:
    """Mark the dataset with this number as in use until the returned file is closed or the process exits."""
    file = open(_owner_path(prefix), "w", encoding="utf-8")  # noqa: SIM115 (stays open as long as the dataset exists)
    fcntl.flock(file, fcntl.LOCK_SH)  # shared: several launchers on one machine are several nodes with one number
    file.write(str(_inode(prefix)))
    file.flush()
    return file


def remove_stale_memory() -> None:
    """Remove blocks and lock files of this user's datasets whose processes have exited.

    Call it from one process at a time, while no dataset picks its number.
    """
    pattern = re.compile(re.escape(os.path.basename(_owner_path(0))).replace("000000", r"(\d{6,})"))
    for match in filter(None, map(pattern.fullmatch, os.listdir(tempfile.gettempdir()))):
        prefix = int(match[1])
        with contextlib.suppress(OSError), open(_owner_path(prefix), encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the owner or one of its workers is alive
            # Another program may have reused the number; the block then has another inode.
            if _inode(prefix) in (None, int(file.read() or -1)):
                paths = [os.path.join(SHARED_MEMORY, f"{prefix:06}_{name}") for name in SHM_TO_CLEAN]
                locks = (BARRIER_FILELOCK, CACHE_FILELOCK)
                paths += [os.path.join(tempfile.gettempdir(), f"{prefix:06}_{name}") for name in locks]
                for left in paths:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(left)
            os.remove(file.name)


def _owner_path(prefix: int) -> str:
    return os.path.join(tempfile.gettempdir(), f"electra_composer_{os.getuid()}_{prefix:06}.owner")


def _inode(prefix: int) -> int | None:
    try:
        return os.stat(os.path.join(SHARED_MEMORY, f"{prefix:06}_{LOCALS}")).st_ino
    except OSError:
        return None
