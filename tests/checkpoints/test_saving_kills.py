"""Runs killed at any call that changes files: the newest checkpoint is complete, and the same command continues."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.core import Timestamp
from kill_points import interrupt_everywhere

from electra_composer.checkpoints import remote_run, resuming, saving
from electra_composer.checkpoints.remote import fetch_newest, remote_copy
from electra_composer.checkpoints.remote_run import INDEX, RemoteIndex
from electra_composer.checkpoints.resuming import find_corruption, repair_latest_link
from electra_composer.checkpoints.saving import IntervalSaver, checkpoint_batch, checkpoints_in
from electra_composer.config import CheckpointConfig

LATEST = "latest-rank0.pt"
RUN, REMOTE = "tiny", "s3://bucket/run"


def make_state(batch: int, sharded: bool) -> SimpleNamespace:
    """What the saver reads of a Composer State."""
    model = torch.nn.Linear(2, 1)
    return SimpleNamespace(
        run_name=RUN,
        timestamp=Timestamp(batch=batch),
        fsdp_sharded_state_dict_enabled=sharded,
        model=model,
        optimizers=[],
    )


def save_checkpoint(state: SimpleNamespace, filename: str) -> str:
    """Write weights as Composer does: one file, or a folder in a folder with the files of each rank."""
    weights = {"batch": torch.tensor(state.timestamp.batch.value)}
    if not state.fsdp_sharded_state_dict_enabled:
        with open(filename, "wb") as file:
            torch.save(weights, file)
        return filename
    folder = os.path.join(os.path.dirname(filename), "ep0")
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    return os.path.join(folder, ".metadata")


class FolderStore:
    """Composer's object store in a folder: an object appears in one step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        assert path.is_relative_to(self.folder.resolve()), name
        return path

    def get_uri(self, name: str) -> str:
        return f"{REMOTE}/{name}"

    def upload_object(self, name: str, path: str) -> None:
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        sent = self.folder.parent.parent / "sent"
        shutil.copy(path, sent)
        os.replace(sent, target)

    def download_object(self, name: str, path: str, overwrite: bool = False) -> None:
        shutil.copy(self._path(name), path)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(folder, last, …)`: start or resume a run of `last` batches that saves each, as pretrain.py does."""
    monkeypatch.setattr(saving.checkpoint, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(remote_run, "_object_store", lambda remote: FolderStore(tmp_path / "folder/store"))

    def start(folder, last, sharded=False, remote=None):
        config = CheckpointConfig(folder=str(folder / "run"), remote=remote, keep=2)
        os.makedirs(config.folder, exist_ok=True)
        fetch_newest(config, RUN, LATEST)
        repair_latest_link(config.folder, LATEST)
        link = os.path.join(config.folder, LATEST)
        first = checkpoint_batch(os.path.realpath(link)) if os.path.lexists(link) else 0
        with remote_copy(config, RUN, LATEST) as copy:
            saver = IntervalSaver(
                config.folder,
                "batch-",
                latest_filename=LATEST,
                num_checkpoints_to_keep=config.keep,
                save_interval="1ba",
                overwrite=True,
                copy=copy,
            )
            saver.fit_start(make_state(first, sharded), None)
            for batch in range(first + 1, last + 1):
                saver.save(make_state(batch, sharded), None)

    return start


def newest(folder: Path) -> int:
    """Return the batch of the checkpoint that a run would resume from, without changing the folder; 0 if none."""
    link = folder / "run" / LATEST
    if not os.path.lexists(link):
        return 0
    path = os.path.realpath(link)
    assert find_corruption(path) is None
    return checkpoint_batch(path)


def names(folder: Path) -> dict[str, object]:
    """Names and batches of what a run leaves; all checkpoints are complete."""
    found: dict[str, object] = {str(path.relative_to(folder)): None for path in folder.rglob("*")}
    for saved in checkpoints_in(str(folder / "run")):
        assert find_corruption(saved.path) is None
        if not os.path.isdir(saved.path):
            found[os.path.basename(saved.path)] = int(torch.load(saved.path)["batch"])
    return {**found, "newest": newest(folder)}


@pytest.mark.parametrize("sharded", [False, True], ids=["single file", "sharded"])
def test_a_killed_run_has_its_newest_checkpoint_and_leaves_nothing_else(train, tmp_path, sharded):
    def intact(folder):
        assert newest(folder) in (2, 3, 4)

    calls = interrupt_everywhere(
        tmp_path,
        lambda folder: train(folder, 4, sharded),
        prepare=lambda folder: train(folder, 2, sharded),
        tree=names,
        intact=intact,
    )
    assert any(call.startswith("before rename run/.unfinished-batch-3") for call in calls)


def test_a_killed_replacement_of_a_sharded_checkpoint_is_undone(train, tmp_path):
    """The link leads to a batch that is saved again, after resuming from the one before."""

    def prepare(folder):
        train(folder, 2, sharded=True)
        saving.replace_link(str(folder / "run" / LATEST), str(folder / "run/batch-1"))

    def intact(folder):
        repair_latest_link(str(folder / "run"), LATEST)
        assert newest(folder) in (1, 2)

    interrupt_everywhere(tmp_path, lambda folder: train(folder, 2, sharded=True), prepare, tree=names, intact=intact)


@pytest.mark.parametrize("sharded", [False, True], ids=["single file", "sharded"])
def test_a_killed_run_with_a_copy_in_a_store(train, tmp_path, sharded):
    """The disk was lost: the run is fetched first. What the store's index names is complete at every moment."""

    def prepare(folder):
        train(folder, 2, sharded, remote=REMOTE)
        lost = (folder / "run").resolve()
        assert lost.is_relative_to(tmp_path.resolve())
        shutil.rmtree(lost)

    def intact(folder):
        index = RemoteIndex.from_json((folder / "store" / INDEX).read_text())
        assert index.checkpoints[0].batch >= 2
        for stored in index.checkpoints:
            for name, size in stored.files.items():
                assert (folder / "store" / stored.place / name).stat().st_size == size

    def tree(folder):
        return {name: value for name, value in names(folder).items() if not name.startswith("store/newest-")}

    calls = interrupt_everywhere(
        tmp_path, lambda folder: train(folder, 3, sharded, REMOTE), prepare, tree=tree, intact=intact
    )
    assert "before replace store/latest.json" in calls


def test_a_corrupt_checkpoint_is_set_aside_once(train, tmp_path):
    """A kill between setting it aside and moving the link leads to the checkpoint before it as well."""

    def prepare(folder):
        train(folder, 2)
        (folder / "run/batch-2-rank0.pt").write_bytes(b"damaged")
        (folder / f"run/batch-2-rank0.pt{resuming.BROKEN}").mkdir()  # of an earlier time

    interrupt_everywhere(tmp_path, lambda folder: train(folder, 2), prepare, tree=names)
