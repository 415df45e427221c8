"""Ranks of a launcher: which of them tells the user about an error, so that it is told once.

Composer's launcher connects the terminal to the first rank of each machine. It keeps the output of the others in files,
which it prints for each rank that has failed, unless SIGTERM has ended it.
"""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import sys
import time
from typing import Any

# Finetuning sets RANK to 0 in every process, so it is read at import.
IS_FIRST = int(os.environ.get("LOCAL_RANK", 0)) == 0
RANK = int(os.environ.get("RANK", 0))

WAIT_SECONDS = 15.0  # for the launcher: the first rank may be this much slower to meet the same error
STORE_SECONDS = 2.0  # to reach the store of the process group
ERROR = "electra_composer/error"  # key in that store

_ends_by_sigterm = False


def end_by_sigterm() -> None:
    """Make the exit of this rank, if it is not the first of its machine, end in SIGTERM: the launcher then prints
    nothing about it."""
    global _ends_by_sigterm
    _ends_by_sigterm = not IS_FIRST


def leave_to_first_rank(message: str, is_cause: bool) -> None:
    """Wait in a rank that is not the first of its machine until the launcher ends it, since the first one has failed.

    The first rank fails because it meets the same error or, where the ranks train together, because this rank leaves:
    it is given the message for that case. Returns if the launcher has not ended this rank in time, which happens if the
    ranks work independently: the error is of this rank alone. Returns at once in the first rank.

    Args:
        message: the error of this rank.
        is_cause: False if the error only says that another rank has failed.
    """
    received = []
    if not IS_FIRST:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: received.append(number))
    if RANK > 0:
        _leave_process_group(f"rank {RANK}: {message}" if is_cause else None)
    end = time.monotonic() + WAIT_SECONDS
    while not IS_FIRST and not received and time.monotonic() < end:
        time.sleep(0.05)
    if received:
        end_by_sigterm()
        sys.exit(0)


def error_of_another_rank() -> str | None:
    """Return the error that another rank of the process group has left, as `rank 1: …`; None if there is none."""
    try:
        store = _connect()
        return store.get(ERROR).decode() if store.check([ERROR]) else None
    except (RuntimeError, KeyError):  # the store has ended, or there is none
        return None


def _leave_process_group(message: str | None) -> None:
    """Give a message to the other ranks of the process group, if there is one, and close the connections to them."""
    torch = sys.modules.get("torch")  # without it there is no group
    if torch is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    try:
        store = _connect()
        if message is not None and store.add(f"{ERROR}s", 1) == 1:  # the first one is the cause of the others
            store.set(ERROR, message)
            store.get(ERROR)  # it has arrived
        if torch.distributed.get_backend() == "gloo":  # NCCL would wait for the others here
            torch.distributed.destroy_process_group()
    except RuntimeError:  # rank 0, which has the store, has ended
        pass


def _connect() -> Any:
    """Return a new client of the store by which the ranks have found each other."""
    import torch.distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = datetime.timedelta(seconds=STORE_SECONDS)
    return torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _kill_at_exit() -> None:
    if _ends_by_sigterm:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


if not IS_FIRST:
    atexit.register(_kill_at_exit)  # what is registered first runs last
