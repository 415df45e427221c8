"""Copy a run's checkpoints to an object store, and resume from there when the machine and its disk are lost.

Each interval checkpoint uses the first of the prefixes `newest-0`, `newest-1`, … that the index does not name, so that
none is overwritten while it is named (see :mod:`electra_composer.checkpoints.remote_run`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from composer.utils import dist
from tqdm import tqdm

from electra_composer.atomic_files import UNFINISHED, move_into_place, remove, replace_link, with_prefix
from electra_composer.checkpoints.remote_files import fetch_files, restore_metrics, upload_files
from electra_composer.checkpoints.remote_run import SINGLE_FILE, RemoteIndex, RemoteRun, StoredCheckpoint
from electra_composer.checkpoints.resuming import find_corruption
from electra_composer.checkpoints.saving import checkpoint_batch
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError
from electra_composer.faults import raise_on_all_ranks
from electra_composer.storage.object_store import explain

log = logging.getLogger(__name__)


def fetch_newest(checkpoints: CheckpointConfig, run_name: str, link_name: str, check_only: bool = False) -> None:
    """Download the newest checkpoint from the object store if the run's folder lacks it.

    It is downloaded, with the run's other files, if it is newer than the folder's newest complete checkpoint. A corrupt
    copy is skipped for the one before it, with a warning. Every rank calls this and rank 0 does the work. Without
    `checkpoints.remote` nothing is done.

    Args:
        check_only: read the index of the store alone.

    Raises:
        UserError: On every rank: no answer from the store; it holds another run, or one that is neither to be resumed
            nor replaced; no complete checkpoint; no space on the local disk.
    """
    if checkpoints.remote is None:
        return
    with raise_on_all_ranks("checkpoints.remote"):
        if dist.get_global_rank() == 0:
            run = RemoteRun(checkpoints.remote)
            index = _index_to_resume(run, checkpoints, run_name)
            if index is not None and not check_only:
                _fetch_newest(run, index, os.path.join(checkpoints.folder, link_name))


def _index_to_resume(run: RemoteRun, checkpoints: CheckpointConfig, run_name: str) -> RemoteIndex | None:
    index = run.read()
    if index is None or not index.checkpoints or checkpoints.overwrite:
        return None
    if not checkpoints.resume:
        raise UserError(
            f"checkpoints.remote: {run.remote} holds the checkpoints of a run; set checkpoints.resume=true to continue "
            "it, checkpoints.overwrite=true to replace it, or another checkpoints.remote"
        )
    if index.run_name != run_name:
        raise UserError(
            f"checkpoints.remote: {run.remote} holds the run {index.run_name!r}, and this is {run_name!r}; set another "
            "checkpoints.remote, or checkpoints.overwrite=true to replace it"
        )
    return index


def _fetch_newest(run: RemoteRun, index: RemoteIndex, link: str) -> None:
    folder = os.path.dirname(link)
    local_batch = _newest_complete(link)
    reasons = []
    for stored in index.checkpoints:
        if local_batch is not None and local_batch >= stored.batch:
            break
        try:
            _fetch(run, stored, folder)
        except UserError as error:
            reasons.append(f"{stored.name} in {run.remote} cannot be used: {error}")
            continue
        for reason in reasons:
            log.warning(f"{reason}; resuming from {stored.name}")
        fetch_files(run, index, folder)
        replace_link(link, os.path.join(folder, stored.name))
        return
    if local_batch is None:
        raise UserError("checkpoints.remote: " + "; ".join(reasons))
    for reason in reasons:
        log.warning(f"{reason}; resuming from the folder's newest checkpoint, of batch {local_batch}")
    restore_metrics(run, index, folder)


def _newest_complete(link: str) -> int | None:
    """Return the batch of the checkpoint that `link` points to; None if there is none, or it is corrupt."""
    path = os.path.realpath(link)
    return checkpoint_batch(path) if os.path.lexists(link) and find_corruption(path) is None else None


def _fetch(run: RemoteRun, stored: StoredCheckpoint, folder: str) -> None:
    """Download a checkpoint into the run's folder.

    Raises:
        UserError: It is incomplete or corrupt.
    """
    path = os.path.join(folder, stored.name)
    unfinished = with_prefix(path, UNFINISHED)
    remove(unfinished)  # of a killed run, perhaps with the files of more ranks
    is_file = list(stored.files) == [SINGLE_FILE]
    total = sum(stored.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {run.remote}: {stored.name}") as bar:
        for name, size in stored.files.items():
            found = run.download(f"{stored.place}/{name}", unfinished if is_file else f"{unfinished}/{name}")
            if found != size:
                raise UserError(f"{name} has {found} bytes; expected the {size} that were uploaded")
            bar.update(size)
    reason = find_corruption(unfinished)
    if reason is not None:
        raise UserError(f"it is corrupt ({reason})")
    move_into_place(unfinished, path)


class RemoteCopy:
    """Uploads a run's checkpoints one at a time while training continues. Active on rank 0 only.

    A failed upload causes a warning, and the next checkpoint is tried. It is an error only at the end of the run.

    Args:
        checkpoints: `checkpoints` of the configuration, with `remote`.
        run_name: `run_name` of the configuration.

    Raises:
        UserError: The store does not answer, or cannot be written to.
    """

    def __init__(self, checkpoints: CheckpointConfig, run_name: str) -> None:
        assert checkpoints.remote is not None
        self.folder = checkpoints.folder
        self.keep = checkpoints.keep
        self.thread: threading.Thread | None = None
        self.failure: str | None = None  # of the last upload
        self._uploaded: dict[str, tuple[int, int]] = {}  # other files: name → mtime and size when uploaded
        with raise_on_all_ranks("checkpoints.remote"):
            if dist.get_global_rank() == 0:
                self.run = RemoteRun(checkpoints.remote)
                found = None if checkpoints.overwrite else self.run.read()
                self.index = found or RemoteIndex(run_name)
                self.run.claim(self.index)

    def catch_up(self, link: str) -> None:
        """Start to upload the folder's newest checkpoint, which `link` points to, if the store lacks it."""
        newest = _newest_complete(link)
        copied = [stored.batch for stored in self.index.checkpoints[:1]]
        if newest is not None and copied < [newest]:
            self.upload(os.path.realpath(link))

    def upload(self, path: str) -> None:
        """Start to upload a complete checkpoint; :meth:`wait` must have been called since the last one."""
        self.thread = threading.Thread(target=self._try, args=(path,), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Block until no upload is in progress, so that a checkpoint may be deleted."""
        if self.thread is None:
            return
        start = time.monotonic()
        self.thread.join()
        self.thread = None
        if (seconds := time.monotonic() - start) > 1:
            log.warning(
                f"checkpoints.remote: training waited {seconds:.1f} s for the upload of a checkpoint to "
                f"{self.run.remote}; set a longer checkpoints.interval to avoid it"
            )

    def finish(self) -> str | None:
        """Wait, upload the run's other files that have changed, and return what failed, if anything."""
        if self.thread is not None and self.thread.is_alive():
            print(f"copying the last checkpoint to {self.run.remote} …", file=sys.stderr, flush=True)
            self.thread.join()
        self.wait()
        if self.index.checkpoints:
            self._try(None)
        return self.failure

    def _try(self, path: str | None) -> None:
        try:
            self._upload(path)
            if path is not None:
                self.failure = None
        except Exception as error:  # each storage client has its own classes
            what = os.path.basename(path) if path is not None else "the run's newest files"
            self.failure = f"{what} could not be copied to {self.run.remote}: {explain(error, self.run.remote)}"
            log.warning(f"checkpoints.remote: {self.failure}")

    def _upload(self, path: str | None) -> None:
        checkpoints = self.index.checkpoints
        if path is not None:
            stored = self._store(path)
            # Newer ones are from before this run was resumed from an earlier checkpoint.
            others = [other for other in checkpoints if other.batch <= stored.batch and other.name != stored.name]
            checkpoints = self._kept([stored, *others])
        upload_files(self.run, self.folder, self._uploaded)
        self.index = RemoteIndex(
            self.index.run_name, checkpoints, {name: size for name, (_, size) in self._uploaded.items()}
        )
        self.run.write(self.index)

    def _store(self, path: str) -> StoredCheckpoint:
        name = os.path.basename(path)
        if name.startswith("milestone-") or self.keep < 0:
            place = name.removesuffix("-rank0.pt")
        else:
            # An earlier start may have kept more than this one, so the places taken may be any number.
            taken = {stored.place for stored in self.index.checkpoints}
            place = next(place for n in itertools.count() if (place := f"newest-{n}") not in taken)
        paths = {SINGLE_FILE: path}
        if os.path.isdir(path):
            paths = {file: os.path.join(path, file) for file in sorted(os.listdir(path))}
        for file, file_path in paths.items():
            self.run.upload(f"{place}/{file}", file_path)
        return StoredCheckpoint(name, place, {file: os.path.getsize(file_path) for file, file_path in paths.items()})

    def _kept(self, checkpoints: list[StoredCheckpoint]) -> list[StoredCheckpoint]:
        """Drop interval checkpoints beyond the number to keep."""
        intervals = [stored for stored in checkpoints if not stored.is_milestone]
        dropped = intervals[self.keep :] if self.keep >= 0 else []
        return [stored for stored in checkpoints if stored not in dropped]


@contextlib.contextmanager
def remote_copy(checkpoints: CheckpointConfig, run_name: str, link_name: str) -> Iterator[RemoteCopy | None]:
    """Yield the copy of a run, and complete it when the block ends. Without `checkpoints.remote`, yield None.

    All ranks must enter. A run that ends by a signal or an error keeps its exit status.

    Raises:
        UserError: As in :class:`RemoteCopy`; or at the end of a run, if the store lacks the newest checkpoint.
    """
    if checkpoints.remote is None:
        yield None
        return
    copy = RemoteCopy(checkpoints, run_name)
    if dist.get_global_rank() == 0 and not checkpoints.overwrite:
        copy.catch_up(os.path.join(checkpoints.folder, link_name))
    try:
        yield copy
    except BaseException as error:
        if dist.get_global_rank() == 0:
            copy.finish()
        if isinstance(error, SystemExit):  # on all ranks; the launcher ends the others when the first one exits
            dist.barrier()
        raise
    message = [copy.finish() if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(
            f"checkpoints.remote: the run is complete in {checkpoints.folder}, but its copy is not: {message[0]}; "
            "rerun the same command to copy it"
        )
