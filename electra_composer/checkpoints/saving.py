"""Checkpoints that are whole or not there: written aside, brought to the disk, renamed, and only then pointed to.

Composer writes a checkpoint straight under its final name, and takes `latest-rank0.pt` away before it links it anew: a
run that is killed in between leaves a file that is cut short, or none to resume from. Here a name in the folder always
stands for a whole checkpoint, and the old one goes only when the new one is there.
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

from electra_composer.errors import UserError
from electra_composer.faults import raise_on_all_ranks

UNFINISHED = ".unfinished-"  # before the name of what is being written
KINDS = "(?:batch-|milestone-ba)"  # how the names of checkpoints begin: a regular expression
REPLACED = ".replaced-"  # before the name of a folder that makes room for its successor


class SavedCheckpoint(NamedTuple):
    """A checkpoint in a run's folder: a file, or the folder of a sharded one."""

    batch: int
    path: str


def checkpoints_in(folder: str, kind: str = KINDS) -> list[SavedCheckpoint]:
    """The checkpoints of a run's folder by their names, oldest first; those that are being written are not among them.

    Args:
        folder: of the run.
        kind: how their names begin, up to the number of the batch: a regular expression.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(
        SavedCheckpoint(batch, os.path.join(folder, name))
        for name in names
        if (batch := checkpoint_batch(name, kind)) is not None
    )


def checkpoint_batch(path: str, kind: str = KINDS) -> int | None:
    """The number of the batch in a checkpoint's name; None: it is not the name of one."""
    match = re.fullmatch(rf"{kind}(\d+)(?:-rank0\.pt)?", os.path.basename(path))
    return int(match[1]) if match else None


def aside(path: str, prefix: str) -> str:
    """Another name in the same folder, which stands for something unfinished or replaced."""
    return os.path.join(os.path.dirname(path), prefix + os.path.basename(path))


class CheckpointCopy(Protocol):
    """Uploads checkpoints in the background (`checkpoints/remote.py`)."""

    def wait(self) -> None:
        """Block until no upload is in progress."""

    def upload(self, path: str) -> None:
        """Start to upload a complete checkpoint."""


class AtomicCheckpointSaver(CheckpointSaver):
    """Composer's `CheckpointSaver`, whose checkpoints appear whole or not at all.

    A file is `<kind><batch>-rank0.pt`, the folder of a sharded checkpoint `<kind><batch>`. Each is written beside its
    place under a name of its own, brought to the disk (`fsync`) and renamed; then `latest-rank0.pt` is moved to it in
    one step; then what is more than `num_checkpoints_to_keep` of this kind is deleted, whichever process wrote it.

    Sharded checkpoints, and runs on several nodes, need a folder that all processes share.

    Args:
        folder: of the run.
        kind: how the names begin.
        latest_filename: a symbolic link that is to point to the newest, such as `latest-rank{rank}.pt`.
        replace_run: delete another run's checkpoints of this kind when training starts: none may be resumed from later.
        copy: uploads each checkpoint that is in its place.
        arguments: Composer's.

    Raises:
        UserError: when a checkpoint is due and the disk has no room for it, or cannot be written. Those that are there
            stay.
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
            # Composer insists on one to resume from; it is used with remote folders alone.
            latest_remote_file_name=latest_filename,
            **arguments,
        )
        self.saved_checkpoints: list[str] = []
        self.kind = kind
        self.replace_run = replace_run
        self.copy = copy

    def state_dict(self) -> dict[str, Any]:
        return {}  # what there is, the folder says

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        folder = format_name_with_dist(self.folder, state.run_name)
        if dist.get_global_rank() == 0:
            for name in os.listdir(folder):
                if name.startswith((UNFINISHED + self.kind, REPLACED + self.kind)):
                    _remove(os.path.join(folder, name))
            if self.replace_run:
                if self.latest_filename is not None:
                    _remove(self.latest_filename.format(state))
                for saved in checkpoints_in(folder, re.escape(self.kind)):
                    _remove(saved.path)
        dist.barrier()

    def save(self, state: State, logger: Logger) -> str:
        """Save now, unless this batch's checkpoint is there; its path."""
        if self.last_checkpoint_batch != state.timestamp.batch:
            self._save_checkpoint(state, logger)
        return self._path(state)

    def _path(self, state: State) -> str:
        """Where the checkpoint of this batch goes: the same on every rank."""
        name = format_name_with_dist_and_time(f"{self.kind}{{batch}}", state.run_name, state.timestamp)
        ending = "" if state.fsdp_sharded_state_dict_enabled else "-rank0.pt"
        return os.path.join(format_name_with_dist(self.folder, state.run_name), name + ending)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        path = self._path(state)
        sharded = state.fsdp_sharded_state_dict_enabled
        unfinished = aside(path, UNFINISHED)
        if self.copy is not None:
            self.copy.wait()  # it may be of one that is deleted now
        _refuse_full_disk(state, path)
        with _write_errors_named(path, unfinished):
            # A sharded checkpoint goes into a folder that Composer names, beside this file name.
            written = checkpoint.save_checkpoint(state, os.path.join(unfinished, "shard") if sharded else unfinished)
            dist.barrier()  # Composer looks for what each rank has written
            if dist.get_global_rank() == 0:
                assert written is not None
                put_in_place(os.path.dirname(written) if sharded else written, path)
                if sharded:
                    os.rmdir(unfinished)
                if self.latest_filename is not None:
                    point(self.latest_filename.format(state), path)
                self.saved_checkpoints.append(path)
                self._remove_old(os.path.dirname(path), state.timestamp.batch.value)
                if self.copy is not None:
                    self.copy.upload(path)
        dist.barrier()  # whoever goes on sees it
        self.last_checkpoint_batch = state.timestamp.batch

    def _remove_old(self, folder: str, newest: int) -> None:
        if self.num_checkpoints_to_keep < 0:
            return
        present = [saved for saved in checkpoints_in(folder, re.escape(self.kind)) if saved.batch <= newest]
        for saved in present[: -self.num_checkpoints_to_keep]:
            _remove(saved.path)
        self.saved_checkpoints = [path for path in self.saved_checkpoints if os.path.exists(path)]


class IntervalSaver(AtomicCheckpointSaver):
    """Under a name of its own: checkpoints keep the state of callbacks by class name."""


class MilestoneSaver(AtomicCheckpointSaver):
    """Likewise."""


def _refuse_full_disk(state: State, path: str) -> None:
    """Raise on every rank when the disk of `path` has no room for the checkpoint, as the first rank sees it."""
    with raise_on_all_ranks("checkpoints.folder"):
        if dist.get_global_rank() == 0:
            folder = os.path.dirname(path)
            needed, free = checkpoint_bytes(state), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"checkpoints.folder: {path} needs about {_megabytes(needed)}, and {_megabytes(free)} are free; it "
                    f"was not written, and {_last_good(folder)}. Free some space; the same command goes on from there"
                )


def checkpoint_bytes(state: State) -> int:
    """About how large a checkpoint is: weights and the optimizer's state, and a little for all the rest."""
    tensors = [*state.model.parameters(), *state.model.buffers()]
    for optimizer in state.optimizers:
        tensors += [
            value for values in optimizer.state.values() for value in values.values() if hasattr(value, "numel")
        ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) * 101 // 100 + 2**16


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _last_good(folder: str) -> str:
    saved = checkpoints_in(folder)
    return f"the last good one is {saved[-1].path}" if saved else "there is none before it"


@contextlib.contextmanager
def _write_errors_named(path: str, unfinished: str) -> Iterator[None]:
    """What the system says of a checkpoint that cannot be written, as one line; what was begun is removed."""
    try:
        yield
    # torch.save has a RuntimeError for a write that fails, torch.distributed.checkpoint one of its own for all ranks.
    except (OSError, RuntimeError, CheckpointException) as error:
        if not os.path.exists(unfinished) and not isinstance(error, OSError):
            raise  # of another process, or of another kind
        with contextlib.suppress(OSError):
            _remove(unfinished)
        reasons = (
            [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        )
        raise UserError(
            f"checkpoints.folder: {path} could not be written: {' '.join(str(reasons[0]).split())[:300]}; "
            f"{_last_good(os.path.dirname(path))}. Free some space or mend the folder; the same command goes on from "
            "there"
        ) from error


def put_in_place(unfinished: str, path: str) -> None:
    """Give what is written, a file or a folder, its name, once it is on the disk."""
    for folder, _, names in os.walk(unfinished):
        for name in names:
            _sync(os.path.join(folder, name))
    _sync(unfinished)
    if os.path.isdir(path):  # a folder cannot be replaced in one move; see `resuming.py` for a kill between these two
        _remove(aside(path, REPLACED))
        os.rename(path, aside(path, REPLACED))
    os.rename(unfinished, path)
    _sync(os.path.dirname(path))
    _remove(aside(path, REPLACED))


def point(link: str, path: str) -> None:
    """Make `link` a symbolic link to `path`, from one moment to the next."""
    unfinished = aside(link, UNFINISHED)
    _remove(unfinished)
    os.symlink(os.path.relpath(path, os.path.dirname(link)), unfinished)
    os.replace(unfinished, link)
    _sync(os.path.dirname(link))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
