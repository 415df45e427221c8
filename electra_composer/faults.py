"""Turn environment failures (full disk, dead worker, lost rank) into one-line errors."""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from collections.abc import Iterator

from composer.utils import dist

from electra_composer.errors import LostRankError, UserError, one_line
from electra_composer.ranks import error_of_another_rank

RESUME_HINT = "rerun the same command to resume from the last checkpoint"

# Workaround (torch 2.7): gloo and NCCL report a lost peer as a RuntimeError, recognizable by its text only (checked for
# torch 2.7 to 2.11); goes when torch has an error class for it.
LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
)


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
    """Raise failures of the environment as a :class:`UserError` with the cause and what to do.

    All other exceptions pass through unchanged.
    """
    try:
        yield
    except (UserError, SystemExit, KeyboardInterrupt):
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        kind = LostRankError if _is_lost_rank(error) else UserError
        raise kind(message if RESUME_HINT in message else f"{message}; {RESUME_HINT}") from error


@contextlib.contextmanager
def raise_on_all_ranks(key: str) -> Iterator[None]:
    """Raise a `UserError` or `OSError` of rank 0 inside the block as a `UserError` on every rank.

    Args:
        key: Configuration key, named in the message of an `OSError`.
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


def explain(error: BaseException) -> str | None:
    """Describe a failure of the environment; None for any other error."""
    text = one_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename or 'a file of the run'} could not be written: {os.strerror(error.errno)}; free some space"
        )
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{error.filename or 'a file of the run'}: {os.strerror(error.errno)}; fix the folder's permissions"
    # Workaround (torch 2.7): the death of a DataLoader worker is a RuntimeError, recognizable by its text only; goes
    # when torch has an error class for it.
    if text.startswith("DataLoader worker") and ("killed by signal" in text or "exited unexpectedly" in text):
        return (
            f"a data loader worker died: {text}. If it was killed, memory may have run out: try a smaller "
            "data.num_workers"
        )
    if isinstance(error, OSError | EOFError) and _comes_from_resource_sharer(error):
        return (
            "a data loader worker died while transferring a batch. If it was killed, memory may have run out: try a "
            "smaller data.num_workers"
        )
    if type(error).__module__.startswith("wandb."):
        return (
            f"loggers.wandb: Weights & Biases could not be started: {text[:200]}; set WANDB_MODE=offline in the "
            "environment to keep the logs in the run's folder (upload them later by wandb sync), or remove the logger"
        )
    if _is_lost_rank(error):
        return error_of_another_rank() or (
            f"rank {dist.get_global_rank()} lost the connection to another rank, whose own error or signal is the "
            f"cause ({text[:200]})"
        )
    return None


def _is_lost_rank(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(message in one_line(error) for message in LOST_PEER_MESSAGES)


def _comes_from_resource_sharer(error: BaseException) -> bool:
    """Whether an error was raised while fetching what a worker shares, over a socket that dies with the worker."""
    return any("resource_sharer" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
