"""Turn environment failures (full disk, dead worker, lost rank) into one-line errors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator

from composer.utils import dist

from electra_composer.disk import system_error
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


# Package of an experiment tracker → its logger, and how to do without its server.
TRACKERS = {
    "comet_ml": (
        "comet: Comet",
        "set loggers.comet.exp_kwargs.offline_directory to keep the logs in a folder (upload them later by comet "
        "upload), or COMET_API_KEY in the environment",
    ),
    "mlflow": ("mlflow: MLflow", "set loggers.mlflow.tracking_uri to a server that can be reached, or to a folder"),
    "neptune": (
        "neptune: Neptune",
        "set loggers.neptune.mode=offline to keep the logs in .neptune (upload them later by neptune sync), or "
        "NEPTUNE_API_TOKEN in the environment",
    ),
    "wandb": (
        "wandb: Weights & Biases",
        "set WANDB_MODE=offline in the environment to keep the logs in the run's folder (upload them later by wandb "
        "sync)",
    ),
}


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


def check_can_write(key: str, path: str, is_folder: bool = False) -> None:
    """Check that a file or folder at `path` can be created, or written if it exists; nothing is left behind.

    Args:
        key: Configuration key, named in messages.

    Raises:
        UserError: Another kind of file is there, or its folder cannot be written to.
    """
    if os.path.lexists(path) and not (os.path.isdir(path) if is_folder else os.path.isfile(path)):
        raise UserError(f"{key} {path}: exists, but is not a {'folder' if is_folder else 'regular file'}; set another")
    folder = os.path.abspath(path if is_folder else os.path.dirname(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if os.path.isfile(path):
            with open(path, "a", encoding="utf-8"):
                pass
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # its name may be too long
    except (OSError, ValueError) as error:  # ValueError: a zero byte in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{key} {path[:200]}: cannot be written in {folder}: {reason}; set another, or fix its permissions"
        ) from error


def explain(error: BaseException) -> str | None:
    """Describe a failure of the environment; None for any other error."""
    text = one_line(error)
    code = system_error(error)
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        name = getattr(error, "filename", None) or "a file of the run"
        return f"{name} could not be written: {os.strerror(code)}; free some space"
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
    package = type(error).__module__.split(".")[0]
    if package in TRACKERS:
        logger, hint = TRACKERS[package]
        text = one_line(re.sub(r"\x1b\[\d*m|-{3,}", " ", str(error)))  # colours and rules of Neptune's messages
        return f"loggers.{logger} could not be started: {text[:200]}; {hint}, or remove the logger"
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
