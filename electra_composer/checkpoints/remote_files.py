"""Files of a run other than checkpoints, in its folder and in the object store: configuration, tokenizer, metrics."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile

from tqdm import tqdm

from electra_composer.checkpoints.remote_run import FILES, RemoteIndex, RemoteRun
from electra_composer.checkpoints.saving import checkpoints_in
from electra_composer.errors import UserError

log = logging.getLogger(__name__)

NOT_COPIED = ("wandb",)  # folders of loggers with a server of their own
METRICS = (".jsonl", ".csv")  # endings of files to which rows are appended


def other_files(folder: str) -> list[str]:
    """List the files of a run's folder other than checkpoints, without hidden and unfinished ones."""
    checkpoints = {os.path.basename(saved.path) for saved in checkpoints_in(folder)}
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in checkpoints and name not in NOT_COPIED
        )
        for name in sorted(names):
            path = os.path.join(place, name)
            if not name.startswith(".") and name not in checkpoints and not os.path.islink(path):
                found.append(os.path.relpath(path, folder))
    return found


def upload_files(run: RemoteRun, folder: str, uploaded: dict[str, tuple[int, int]]) -> None:
    """Upload the files that have changed. Exceptions of the store's client pass through.

    Copies of them are uploaded: a run that resumes replaces its metrics file by a shorter one, and a store waits for
    all bytes that were announced.

    Args:
        uploaded: Name → modification time in nanoseconds and size, when it was uploaded; updated.
    """
    with tempfile.TemporaryDirectory() as copies:
        for name in other_files(folder):
            path, copy = os.path.join(folder, name), os.path.join(copies, "copy")
            try:
                status = os.stat(path)
                if uploaded.get(name) == (status.st_mtime_ns, status.st_size):
                    continue
                shutil.copyfile(path, copy)
            except FileNotFoundError:  # replaced since it was listed
                continue
            run.upload(f"{FILES}/{name}", copy)
            uploaded[name] = status.st_mtime_ns, os.path.getsize(copy)


def fetch_files(run: RemoteRun, index: RemoteIndex, folder: str) -> None:
    """Download all files that the index names."""
    with tqdm(total=sum(index.files.values()), unit="B", unit_scale=True, desc="its other files") as bar:
        for name in index.files:
            # May be longer than the index says: a metrics file is uploaded while it grows.
            bar.update(run.download(f"{FILES}/{name}", os.path.join(folder, name)))


def restore_metrics(run: RemoteRun, index: RemoteIndex, folder: str) -> None:
    """Download the metrics files that the folder lacks or has less of than the store, with a warning for each.

    A resumed run drops the rows from its first batch on, so rows that the folder never had do no harm.
    """
    for name, size in index.files.items():
        path = os.path.join(folder, name)
        found = os.path.getsize(path) if os.path.isfile(path) else 0
        if not name.endswith(METRICS) or found >= size:
            continue
        try:
            run.download(f"{FILES}/{name}", path)
        except UserError as error:
            log.warning(f"{path} has {found:,} of {size:,} bytes, and cannot be restored: {error}")
        else:
            log.warning(f"{path} has {found:,} of {size:,} bytes; restored from {run.remote}")
