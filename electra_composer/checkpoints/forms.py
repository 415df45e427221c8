"""A checkpoint of one form, one file or a folder of shards, for a run that keeps its own in the other.

A run of one process or of DDP, and one of FSDP with `state_dict_type: full`, keeps all in one file; FSDP with `sharded`
keeps a folder with a file per process. Composer loads each into a run of the same kind, on any number of processes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from composer.utils import dist
from torch.distributed.checkpoint.api import CheckpointException

from electra_composer.checkpoints.safe_loading import composer_loads_safely, read_file
from electra_composer.checkpoints.sharded import is_sharded, read_whole
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError


@contextlib.contextmanager
def loading(
    checkpoints: CheckpointConfig, latest: str, load_path: str | None, sharded: bool
) -> Iterator[dict[str, Any]]:
    """Composer's arguments that say what a run starts from, for the time in which its `Trainer` loads that: safely.

    A checkpoint of the other form than the run's is written anew in the run's form first; where it is the run's own
    newest, it is given as one to load, since Composer looks for its own form alone.

    Args:
        checkpoints: of the configuration.
        latest: the link to the run's own newest checkpoint, whether it is there or not.
        load_path: what the run starts from if it is not.
        sharded: the form of the run's checkpoints.

    Raises:
        UserError: what is to be loaded cannot be, or only unsafely.
    """
    resumes = checkpoints.resume and not checkpoints.overwrite
    own = os.path.realpath(latest) if resumes and os.path.exists(latest) else None
    arguments: dict[str, Any] = {
        "autoresume": resumes and bool(checkpoints.interval or checkpoints.milestones),
        "load_path": load_path,
        "load_weights_only": checkpoints.load_weights_only,
    }
    if own is not None and is_sharded(own) != sharded:
        arguments = {"autoresume": False, "load_path": own, "load_weights_only": False}
    with composer_loads_safely(), contextlib.ExitStack() as copies:
        if arguments["load_path"] is not None and (own is None or not arguments["autoresume"]):
            arguments["load_path"] = copies.enter_context(in_form(arguments["load_path"], sharded))
        try:
            yield arguments
        except CheckpointException as error:  # no Exception, and its text the tracebacks of all processes
            reason = next(iter(error.failures.values()))[0]
            raise UserError(
                f"{own or load_path}: the sharded checkpoint cannot be loaded: {type(reason).__name__}: "
                f"{' '.join(str(reason).split())[:300]}"
            ) from error


@contextlib.contextmanager
def in_form(path: str, sharded: bool) -> Iterator[str]:
    """`path`, or a temporary copy of it in the other form, for as long as the block lasts. All processes enter it.

    The first process of a node makes the copy, in the folder for temporary files.

    Args:
        path: a checkpoint of either form.
        sharded: the form that is wanted: a folder of shards, or one file.

    Raises:
        UserError: on all processes, if one of them cannot read it safely, or has no room for the copy.
    """
    if is_sharded(path) == sharded:
        yield path
        return
    leads = dist.get_local_rank() == 0
    with tempfile.TemporaryDirectory() if leads else contextlib.nullcontext("") as folder:
        copy = os.path.join(folder, "copy")
        error = _convert(path, copy) if leads else None
        copies, errors = zip(*dist.all_gather_object((copy, error)), strict=True)
        for message in errors:
            if message is not None:
                raise UserError(message)
        yield copies[dist.get_global_rank() - dist.get_local_rank()]
        dist.barrier()  # nobody reads it any more


def _convert(path: str, copy: str) -> str | None:
    """Write a checkpoint of the other form, and return what went wrong."""
    try:
        if is_sharded(path):
            torch.save(read_whole(path), copy)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is what we want
                dcp.save(read_file(path), storage_writer=dcp.FileSystemWriter(copy), no_dist=True)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        return f"{path}: it cannot be written anew to {os.path.dirname(copy)} ({error}); set TMPDIR to a larger disk"
    return None
