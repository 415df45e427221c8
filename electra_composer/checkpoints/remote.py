"""A run's checkpoints in an object store as well: it goes on where its machine, and its disk, do not come back.

Interval checkpoints take the places `newest-0`, `newest-1`, … there in turn, one more than are kept, so that none is
written over while it is named (see :mod:`electra_composer.checkpoints.remote_run`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

from composer.utils import dist
from tqdm import tqdm

from electra_composer.checkpoints.remote_run import FILES, WHOLE, Contents, RemoteRun, Stored
from electra_composer.checkpoints.resuming import why_broken
from electra_composer.checkpoints.saving import UNFINISHED, aside, checkpoint_batch, checkpoints_in, point, put_in_place
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError
from electra_composer.faults import raise_on_all_ranks
from electra_composer.storage.object_store import explain

log = logging.getLogger(__name__)

NOT_OURS = ("wandb",)  # folders with a server of their own


def fetch_newest(checkpoints: CheckpointConfig, run_name: str, link_name: str) -> None:
    """See to it that the run's folder has the newest checkpoint of its copy in the object store.

    It is fetched, with the run's other files, if it is newer than the folder's own newest, or if that one is broken; a
    broken copy gives way to the one before it, with a warning. Every process of the run calls this, and the first does
    it. Nothing is done where `checkpoints.remote` is null.

    Raises:
        UserError: on every process: the store does not answer or holds another run; a run that is neither to be
            continued nor replaced; no whole checkpoint; no room here.
    """
    if checkpoints.remote is None:
        return
    with raise_on_all_ranks("checkpoints.remote"):
        if dist.get_global_rank() == 0:
            _fetch_newest(checkpoints, run_name, os.path.join(checkpoints.folder, link_name))


def _fetch_newest(checkpoints: CheckpointConfig, run_name: str, link: str) -> None:
    assert checkpoints.remote is not None
    run = RemoteRun(checkpoints.remote)
    contents = run.read()
    if contents is None or not contents.checkpoints or checkpoints.overwrite:
        return
    if not checkpoints.resume:
        raise UserError(
            f"checkpoints.remote: {run.remote} holds the checkpoints of a run; set checkpoints.resume=true to continue "
            "it, checkpoints.overwrite=true to replace it, or another checkpoints.remote"
        )
    if contents.run_name != run_name:
        raise UserError(
            f"checkpoints.remote: {run.remote} holds the run {contents.run_name!r}, and this is {run_name!r}; give "
            "another place, or checkpoints.overwrite=true to replace it"
        )
    here = _newest_whole(link)
    reasons = []
    for stored in contents.checkpoints:
        if here is not None and here >= stored.batch:
            break
        try:
            _fetch(run, stored, os.path.dirname(link))
        except UserError as error:
            reasons.append(f"{stored.name} in {run.remote} cannot be used: {error}")
            continue
        for reason in reasons:
            log.warning(f"{reason}; the run goes on from {stored.name}")
        _fetch_files(run, contents, os.path.dirname(link))
        point(link, os.path.join(os.path.dirname(link), stored.name))
        return
    if here is None:
        raise UserError("checkpoints.remote: " + "; ".join(reasons))
    for reason in reasons:
        log.warning(f"{reason}; the run goes on from the folder's own newest, of batch {here}")


def _newest_whole(link: str) -> int | None:
    """The batch of the checkpoint that a link leads to, if it is whole."""
    path = os.path.realpath(link)
    return checkpoint_batch(path) if os.path.lexists(link) and why_broken(path) is None else None


def _fetch(run: RemoteRun, stored: Stored, folder: str) -> None:
    """Fetch a checkpoint to its place in the folder.

    Raises:
        UserError: it is not whole.
    """
    path = os.path.join(folder, stored.name)
    unfinished = aside(path, UNFINISHED)
    is_file = list(stored.files) == [WHOLE]
    total = sum(stored.files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"fetching {run.remote}: {stored.name}") as bar:
        for name, size in stored.files.items():
            found = run.download(f"{stored.place}/{name}", unfinished if is_file else f"{unfinished}/{name}")
            if found != size:
                raise UserError(f"{name} has {found} bytes, where {size} were uploaded")
            bar.update(size)
    reason = why_broken(unfinished)
    if reason is not None:
        raise UserError(f"it is not whole ({reason})")
    put_in_place(unfinished, path)


def _fetch_files(run: RemoteRun, contents: Contents, folder: str) -> None:
    with tqdm(total=sum(contents.files.values()), unit="B", unit_scale=True, desc="its other files") as bar:
        for name in contents.files:
            # It may be longer than when it was named: a metrics file is uploaded while it grows.
            bar.update(run.download(f"{FILES}/{name}", os.path.join(folder, name)))


class RemoteCopy:
    """Uploads a run's checkpoints while it trains on, one at a time. It does nothing but on the first process.

    A checkpoint that cannot be uploaded is warned of, and the next is tried; only at the end of the run is it an error.

    Args:
        checkpoints: of the configuration, with `remote`.
        run_name: of the configuration.

    Raises:
        UserError: the store does not answer, or does not take anything.
    """

    def __init__(self, checkpoints: CheckpointConfig, run_name: str) -> None:
        assert checkpoints.remote is not None
        self.folder = checkpoints.folder
        self.keep = checkpoints.keep
        self.thread: threading.Thread | None = None
        self.failure: str | None = None  # of the newest upload
        self._uploaded: dict[str, tuple[int, int]] = {}  # other files: name → time and size when they were uploaded
        with raise_on_all_ranks("checkpoints.remote"):
            if dist.get_global_rank() == 0:
                self.run = RemoteRun(checkpoints.remote)
                found = None if checkpoints.overwrite else self.run.read()
                self.contents = found or Contents(run_name)
                self.run.claim(self.contents)

    def catch_up(self, link: str) -> None:
        """Begin to upload the folder's newest checkpoint, to which a link leads, if the copy lacks it."""
        newest = _newest_whole(link)
        copied = [stored.batch for stored in self.contents.checkpoints[:1]]
        if newest is not None and copied < [newest]:
            self.upload(os.path.realpath(link))

    def upload(self, path: str) -> None:
        """Begin to upload a checkpoint that is in its place; `wait` must have been called since the last one."""
        self.thread = threading.Thread(target=self._try, args=(path,), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until nothing is being uploaded: a checkpoint may be deleted from then on."""
        if self.thread is None:
            return
        start = time.monotonic()
        self.thread.join()
        self.thread = None
        if (seconds := time.monotonic() - start) > 1:
            log.warning(
                f"checkpoints.remote: training waited {seconds:.1f} s for {self.run.remote} to take a checkpoint; "
                "a longer checkpoints.interval avoids it"
            )

    def finish(self) -> str | None:
        """Wait, upload what has changed since in the run's other files, and say what has failed, if anything."""
        if self.thread is not None and self.thread.is_alive():
            print(f"copying the last checkpoint to {self.run.remote} …", file=sys.stderr, flush=True)
            self.thread.join()
        self.wait()
        if self.contents.checkpoints:
            self._try(None)
        return self.failure

    def _try(self, path: str | None) -> None:
        try:
            self._upload(path)
            if path is not None:
                self.failure = None
        except Exception as error:  # every storage client has errors of its own
            what = os.path.basename(path) if path is not None else "the run's newest files"
            self.failure = f"{what} could not be copied to {self.run.remote}: {explain(error, self.run.remote)}"
            log.warning(f"checkpoints.remote: {self.failure}")

    def _upload(self, path: str | None) -> None:
        checkpoints = self.contents.checkpoints
        if path is not None:
            stored = self._store(path)
            # What is newer is of another time: the run went on from before it.
            others = [other for other in checkpoints if other.batch <= stored.batch and other.name != stored.name]
            checkpoints = self._kept([stored, *others])
        self._upload_files()
        self.contents = Contents(
            self.contents.run_name, checkpoints, {name: size for name, (_, size) in self._uploaded.items()}
        )
        self.run.write(self.contents)

    def _store(self, path: str) -> Stored:
        name = os.path.basename(path)
        if name.startswith("milestone-") or self.keep < 0:
            place = name.removesuffix("-rank0.pt")
        else:
            taken = {stored.place for stored in self.contents.checkpoints}
            place = next(place for n in range(self.keep + 1) if (place := f"newest-{n}") not in taken)
        paths = {WHOLE: path}
        if os.path.isdir(path):
            paths = {file: os.path.join(path, file) for file in sorted(os.listdir(path))}
        for file, file_path in paths.items():
            self.run.upload(f"{place}/{file}", file_path)
        return Stored(name, place, {file: os.path.getsize(file_path) for file, file_path in paths.items()})

    def _kept(self, checkpoints: list[Stored]) -> list[Stored]:
        """Without the interval checkpoints that are more than are to be kept."""
        intervals = [stored for stored in checkpoints if not stored.is_milestone]
        dropped = intervals[self.keep :] if self.keep >= 0 else []
        return [stored for stored in checkpoints if stored not in dropped]

    def _upload_files(self) -> None:
        for name in other_files(self.folder):
            path = os.path.join(self.folder, name)
            status = os.stat(path)
            state = (status.st_mtime_ns, status.st_size)
            if self._uploaded.get(name) != state:
                self.run.upload(f"{FILES}/{name}", path)
                self._uploaded[name] = state


def other_files(folder: str) -> list[str]:
    """Names of what a run's folder holds beside checkpoints; hidden and unfinished files are not among them."""
    checkpoints = {os.path.basename(saved.path) for saved in checkpoints_in(folder)}
    found = []
    for place, folders, names in os.walk(folder):
        inner = os.path.relpath(place, folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in checkpoints and name not in NOT_OURS
        )
        for name in sorted(names):
            path = os.path.join(place, name)
            if not name.startswith(".") and name not in checkpoints and not os.path.islink(path):
                found.append(os.path.normpath(os.path.join(inner, name)))
    return found


@contextlib.contextmanager
def remote_copy(checkpoints: CheckpointConfig, run_name: str, link_name: str) -> Iterator[RemoteCopy | None]:
    """The copy of a run, complete when the block ends; None if there is to be none. All processes enter it.

    A run that ends by a signal or an error keeps its exit status.

    Raises:
        UserError: see :class:`RemoteCopy`; or at the end of a run, when its copy lacks the newest checkpoint.
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
        if isinstance(error, SystemExit):  # of all processes; a launcher ends the others when the first one is done
            dist.barrier()
        raise
    message = [copy.finish() if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(
            f"checkpoints.remote: the run is complete in {checkpoints.folder}, but its copy is not: {message[0]}; the "
            "same command tries again"
        )
