"""Run a script of the tests as on a machine of its own: with a shared memory that no other process has.

    python tests/on_a_node.py [SCRIPT ARGUMENTS …]

Streaming shares state between the ranks of a node in `/dev/shm`. Two nodes on one machine would share it too.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # from Linux's sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # from mount.h


def leave_shared_memory() -> None:
    """Give this process, with a single thread, a `/dev/shm` of its own.

    Raises:
        OSError: not Linux, or user namespaces are not allowed.
    """
    user, group = os.getuid(), os.getgid()
    call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    for name, text in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


def call(name: str, *arguments: object) -> None:
    if not sys.platform.startswith("linux"):
        raise OSError(f"{name} is a call of Linux")
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    leave_shared_memory()
    if len(sys.argv) > 1:
        del sys.argv[0]
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
