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

import torch
import torch.distributed.checkpoint as dcp
from composer.utils import dist

from electra_composer.errors import UserError
from electra_composer.safe_loading import read_file
from electra_composer.sharded_checkpoint import is_sharded, read_whole


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
