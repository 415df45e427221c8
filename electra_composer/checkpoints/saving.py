"""Save checkpoints atomically: write under a temporary name, sync to disk, rename, then update the link to the newest.

Composer writes a checkpoint directly under its final name, and removes `latest-rank0.pt` before it links it again. A
run killed in between leaves a truncated file, or nothing to resume from. Here every name in the folder stands for a
complete checkpoint, and the old one is deleted only after the new one exists.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, format_name_with_dist, format_name_with_dist_and_time
from torch.distributed.checkpoint import CheckpointException

from electra_composer.atomic_files import UNFINISHED, clean, move_into_place, remove, replace_link, with_prefix
from electra_composer.checkpoints.safe_loading import cause_of, dcp_warnings_ignored
from electra_composer.errors import UserError, one_line
from electra_composer.faults import raise_on_all_ranks

KINDS = "(?:batch-|milestone-ba)"  # regular expression of the prefixes of checkpoint names


class SavedCheckpoint(NamedTuple):
    """A checkpoint in a run's folder: a file, or the folder of a sharded one."""

    batch: int
    path: str


def checkpoints_in(folder: str, kind: str = KINDS) -> list[SavedCheckpoint]:
    """List the complete checkpoints of a run's folder by their names, oldest first.

    Args:
        folder: The run's folder.
        kind: Regular expression of the name's prefix before the batch number.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        SavedCheckpoint(batch, os.path.join(folder, name))
        for name in names
        if (batch := checkpoint_batch(name, kind)) is not None
    )


def checkpoint_batch(path: str, kind: str = KINDS) -> int | None:
    """Parse the batch number in a checkpoint's name; None if it is not the name of a checkpoint."""
    match = re.fullmatch(rf"{kind}(\d+)(?:-rank0\.pt)?", os.path.basename(path))
    return int(match[1]) if match else None


class CheckpointCopy(Protocol):
    """Upload of checkpoints in the background (`checkpoints/remote.py`)."""

    def wait(self) -> None:
        """Block until no upload is in progress."""

    def upload(self, path: str) -> None:
        """Start to upload a complete checkpoint."""


# Workaround (composer 0.32): CheckpointSaver writes in place, so its private `_save_checkpoint` is overridden; goes
# when Composer renames complete checkpoints into place.
class AtomicCheckpointSaver(CheckpointSaver):
    """Composer's `CheckpointSaver` with atomic writes: a checkpoint is complete or absent.

    The name of a file is `<kind><batch>-rank0.pt`, that of a sharded checkpoint's folder `<kind><batch>`. Each is
    written beside its final path, synced to disk (`fsync`) and renamed. Then the link `latest-rank0.pt` is replaced in
    one step. Then checkpoints of this kind beyond `num_checkpoints_to_keep` are deleted, whichever process wrote them.

    Sharded checkpoints and runs on several nodes need a folder that all ranks share.

    Args:
        folder: The run's folder.
        kind: Prefix of the names.
        latest_filename: Symbolic link to the newest checkpoint, such as `latest-rank{rank}.pt`.
        replace_run: Delete another run's checkpoints of this kind when training starts, so that none is resumed from.
        copy: Uploads each complete checkpoint.
        arguments: Arguments of `CheckpointSaver`.

    Raises:
        UserError: A checkpoint is due and the disk has too little space, or cannot be written. Older checkpoints stay.
    """

    def __init__(
        self,
        folder: str,
        kind: str,
        latest_filename: str | None = None,
        replace_run: bool = False,
        copy: CheckpointCopy | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            folder=folder,
            filename=f"{kind}{{batch}}-rank{{rank}}.pt",
            remote_file_name=None,
            latest_filename=latest_filename,
            latest_remote_file_name=None,
            **arguments,
        )
        self.kind = kind
        self.replace_run = replace_run
        self.copy = copy

    def state_dict(self) -> dict[str, Any]:
        return {}  # the folder is the record of what was saved

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        folder = format_name_with_dist(self.folder, state.run_name)
        if dist.get_global_rank() == 0:
            clean(folder, self.kind)
            if self.replace_run:
                if self.latest_filename is not None:
                    remove(self.latest_filename.format(state))
                for saved in checkpoints_in(folder, re.escape(self.kind)):
                    remove(saved.path)
            self._remove_old(folder, state.timestamp.batch.value)  # a kill may have come before it
        dist.barrier()

    def save(self, state: State, logger: Logger) -> str:
        """Save now, unless this batch was saved already; return the path."""
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        return self._path(state)

    def _path(self, state: State) -> str:
        """Return the path of this batch's checkpoint, the same on every rank."""
        name = format_name_with_dist_and_time(f"{self.kind}{{batch}}", state.run_name, state.timestamp)
        ending = "" if state.fsdp_sharded_state_dict_enabled else "-rank0.pt"
        return os.path.join(format_name_with_dist(self.folder, state.run_name), name + ending)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        path = self._path(state)
        sharded = state.fsdp_sharded_state_dict_enabled
        unfinished = with_prefix(path, UNFINISHED)
        if self.copy is not None:
            self.copy.wait()  # the upload may be of a checkpoint that is deleted below
        _check_free_space(state, path)
        with _explain_write_errors(path, unfinished):
            # Composer puts a sharded checkpoint into a folder that it names itself, beside this file name.
            with dcp_warnings_ignored():
                file = os.path.join(unfinished, "shard") if sharded else unfinished
                written = checkpoint.save_checkpoint(state, file)
            dist.barrier()  # all ranks have written
            if dist.get_global_rank() == 0:
                assert written is not None
                move_into_place(os.path.dirname(written) if sharded else written, path)
                if sharded:
                    os.rmdir(unfinished)
                if self.latest_filename is not None:
                    replace_link(self.latest_filename.format(state), path)
                self._remove_old(os.path.dirname(path), state.timestamp.batch.value)
                if self.copy is not None:
                    self.copy.upload(path)
        dist.barrier()  # the checkpoint exists for all ranks
        self.last_checkpoint_batch = state.timestamp.batch

    def _remove_old(self, folder: str, newest: int) -> None:
        if self.num_checkpoints_to_keep < 0:
            return
        present = [saved for saved in checkpoints_in(folder, re.escape(self.kind)) if saved.batch <= newest]
        for saved in present[: -self.num_checkpoints_to_keep]:
            remove(saved.path)


class IntervalSaver(AtomicCheckpointSaver):
    """Saver of interval checkpoints; a separate class since Composer keys callback state by class name."""


class MilestoneSaver(AtomicCheckpointSaver):
    """Saver of milestones; a separate class since Composer keys callback state by class name."""


def _check_free_space(state: State, path: str) -> None:
    """Raise on every rank if the disk of `path`, as rank 0 sees it, has too little space for the checkpoint."""
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0:
            folder = os.path.dirname(path)
            needed, free = checkpoint_bytes(state), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"checkpoints.folder: {path} needs about {_megabytes(needed)}, and {_megabytes(free)} are free; it "
                    f"was not written, and {_describe_newest(folder)}. Free some space, and rerun the same command to "
                    "resume"
                )


def checkpoint_bytes(state: State) -> int:
    """Estimate the size of a checkpoint: weights and optimizer state, plus a small reserve for everything else."""
    tensors = [*state.model.parameters(), *state.model.buffers()]
    for optimizer in state.optimizers:
        tensors += [
            value for values in optimizer.state.values() for value in values.values() if hasattr(value, "numel")
        ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) * 101 // 100 + 2**16


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _describe_newest(folder: str) -> str:
    saved = checkpoints_in(folder)
    return f"the newest complete checkpoint is {saved[-1].path}" if saved else "there is no checkpoint before it"


@contextlib.contextmanager
def _explain_write_errors(path: str, unfinished: str) -> Iterator[None]:
    """Raise what prevents writing a checkpoint as a one-line error, and remove the unfinished file or folder."""
    try:
        yield
    # Workaround (torch 2.7): torch.save raises RuntimeError for a failed write, and torch.distributed.checkpoint an
    # exception that is no Exception; goes when both raise OSError.
    except (OSError, RuntimeError, CheckpointException) as error:
        if not os.path.exists(unfinished) and not isinstance(error, OSError):
            raise  # not a failed write of this rank
        with contextlib.suppress(OSError):
            remove(unfinished)
        raise UserError(
            f"checkpoints.folder: {path} could not be written: {one_line(cause_of(error), 300)}; "
            f"{_describe_newest(os.path.dirname(path))}. Free some space or fix the folder's permissions, and rerun "
            "the same command to resume"
        ) from error
