"""What goes wrong around a run, in one line each: full disks, dead workers, dead processes."""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from collections.abc import Iterator

from composer.utils import dist

from electra_composer.errors import UserError

GOES_ON = "the same command goes on from the last checkpoint"

# What gloo and NCCL say where the other end is gone (torch 2.7 to 2.11).
PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
)


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Raise what the surroundings did to a run as a :class:`UserError` that says what it was and what to do.

    Everything else passes through as it is.
    """
    try:
        yield
    except (UserError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        raise UserError(f"{message}; {GOES_ON}") from error


@contextlib.contextmanager
def raise_on_all_ranks(key: str) -> Iterator[None]:
    """What goes wrong with what the first process does in the block becomes a `UserError` on every process.

    Args:
        key: of the configuration, named where a file is the matter.
    """
    message: list[str | None] = [None]
    try:
        yield
    except UserError as error:
        message = [str(error)]
    except OSError as error:
        message = [f"{key}: {error.filename or 'a file'} cannot be read or written here: {error.strerror or error}"]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])


def _while_handed_over(error: BaseException) -> bool:
    """Whether an error comes from fetching what a loader's worker shares, whose socket is gone with the worker."""
    return any("resource_sharer" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def explain(error: BaseException) -> str | None:
    """What an error of the surroundings means; None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename or 'a file of the run'} could not be written: {os.strerror(error.errno)}; free some space"
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename or 'a file of the run'}: {os.strerror(error.errno)}; mend the folder's permissions"
    if text.startswith("DataLoader worker") and ("killed by signal" in text or "exited unexpectedly" in text):
        return (
            f"a process that loads data has died: {text}. If it was killed, memory may have run out: try a smaller "
            "data.num_workers"
        )
    if isinstance(error, OSError | EOFError) and _while_handed_over(error):
        return (
            "a process that loads data has died while it handed a batch over. If it was killed, memory may have run "
            "out: try a smaller data.num_workers"
        )
    if type(error).__module__.startswith("wandb."):
        return (
            f"loggers.wandb: Weights & Biases could not be started: {text[:200]}; set WANDB_MODE=offline in the "
            "environment to keep what is logged in the run's folder (wandb sync sends it later), or drop the logger"
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in PEER_IS_GONE):
        return (
            f"rank {dist.get_global_rank()} has lost another process of the run, whose own error, or the signal that "
            f"killed it, says why ({text[:200]})"
        )
    return None
