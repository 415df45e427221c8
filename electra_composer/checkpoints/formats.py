"""Convert checkpoints between a single file and a folder of shards, for runs that use the other format.

A run on one process, with DDP, or with FSDP and `state_dict_type: full` saves a single file. FSDP with `sharded` saves
a folder with one file per rank. Composer loads either only into a run of the same format, on any number of ranks.
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

from electra_composer.checkpoints.safe_loading import (
    cause_of,
    dcp_warnings_ignored,
    read_file,
    safe_composer_loading,
)
from electra_composer.checkpoints.sharded import is_sharded, read_all
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError, one_line


@contextlib.contextmanager
def trainer_load_arguments(
    checkpoints: CheckpointConfig, latest: str, load_path: str | None, sharded: bool
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of Composer's `Trainer` that load a checkpoint, and make it load safely inside the block.

    The run's own newest checkpoint is passed as `load_path` too: Composer's autoresume finds none in the other format,
    and none for a run that saves no more checkpoints. A checkpoint in the other format than the run's is converted
    first.

    Args:
        checkpoints: `checkpoints` of the configuration.
        latest: Link to the run's newest checkpoint, which may not exist.
        load_path: Checkpoint to start from if it does not.
        sharded: Whether the run saves sharded checkpoints.

    Raises:
        UserError: The checkpoint cannot be loaded, or by unsafe loading only.
    """
    resumes = checkpoints.resume and not checkpoints.overwrite
    own = os.path.realpath(latest) if resumes and os.path.exists(latest) else None
    path = own or load_path
    with safe_composer_loading(), _no_state_is_no_warning(), contextlib.ExitStack() as copies:
        if path is not None:
            path = copies.enter_context(in_format(path, sharded))
        try:
            yield {
                "autoresume": False,
                "load_path": path,
                "load_weights_only": own is None and checkpoints.load_weights_only,
                "load_strict_model_weights": True,
            }
        except CheckpointException as error:
            cause = cause_of(error)
            raise UserError(
                f"{own or load_path}: the sharded checkpoint cannot be loaded: {type(cause).__name__}: "
                f"{one_line(cause, 300)}"
            ) from error


# Workaround (composer 0.32): State warns of every callback and logger that a checkpoint has no state of, although a run
# may have new ones at each start; goes when it does not.
@contextlib.contextmanager
def _no_state_is_no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is not in the state_dict. Its state will not be restored")
        yield


@contextlib.contextmanager
def in_format(path: str, sharded: bool) -> Iterator[str]:
    """Yield `path`, or a temporary copy in the other format that exists inside the block. All ranks must enter.

    Local rank 0 of each node writes the copy to the folder for temporary files.

    Args:
        path: A checkpoint in either format.
        sharded: Wanted format: a folder of shards, or a single file.

    Raises:
        UserError: On all ranks, if one cannot read the checkpoint safely or has no space for the copy.
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
        dist.barrier()  # no rank reads it any more


def _convert(path: str, copy: str) -> str | None:
    """Write a checkpoint in the other format; return the error message, if any."""
    try:
        if is_sharded(path):
            torch.save(read_all(path), copy)
        else:
            with dcp_warnings_ignored():
                dcp.save(read_file(path), storage_writer=dcp.FileSystemWriter(copy), no_dist=True)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        return f"{path}: cannot be converted in {os.path.dirname(copy)} ({error}); set TMPDIR to a larger disk"
    return None
