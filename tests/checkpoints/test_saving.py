"""Checkpoints are complete or absent, the newest are kept, and a full disk loses none."""

from __future__ import annotations

import collections
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import programs
import pytest
import torch
from resumed_runs import run

from electra_composer.checkpoints import saving
from electra_composer.checkpoints.resuming import find_corruption
from electra_composer.checkpoints.saving import checkpoints_in, replace_link
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.pretrain import main

SHORT = ["trainer.max_duration=8ba", "trainer.eval_interval=8ba", "checkpoints.interval=2ba"]


@pytest.fixture
def pretrain(tiny_yaml, tmp_path):
    """Return `pretrain("key=value", …)`: a run of 8 batches in `tmp_path / "run"`, saved every 2 batches."""

    def start(*overrides: str):
        return main(load_config(str(tiny_yaml), [*SHORT, "checkpoints.milestones=[0.5]", *overrides], PretrainConfig))

    return start


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "-" in path.name)


def test_the_newest_are_kept_over_restarts_and_the_milestones_too(pretrain, tmp_path, tiny_yaml):
    assert run(str(tiny_yaml), tmp_path, *SHORT, "checkpoints.keep=2", "callbacks.crash.batch=5") == -9
    assert names(tmp_path / "run")[:2] == ["batch-2-rank0.pt", "batch-4-rank0.pt"]
    pretrain("checkpoints.keep=2")
    assert names(tmp_path / "run") == [
        "batch-6-rank0.pt",
        "batch-8-rank0.pt",
        "latest-rank0.pt",
        "milestone-ba1-rank0.pt",  # from the first start's milestones
        "milestone-ba2-rank0.pt",
        "milestone-ba4-rank0.pt",
    ]
    assert os.readlink(tmp_path / "run" / "latest-rank0.pt") == "batch-8-rank0.pt"
    assert all(find_corruption(saved.path) is None for saved in checkpoints_in(str(tmp_path / "run")))


def test_none_is_kept_of_a_run_that_is_replaced(pretrain, tmp_path):
    """Otherwise a corrupt checkpoint of the new run could fall back to one of the old run."""
    pretrain("checkpoints.keep=-1")
    pretrain(
        "checkpoints.overwrite=true", "checkpoints.interval=3ba", "trainer.max_duration=3ba", "schedule.warmup=1ba"
    )
    assert names(tmp_path / "run") == ["batch-3-rank0.pt", "latest-rank0.pt", "milestone-ba2-rank0.pt"]


@pytest.mark.parametrize("keep", [0, -2])
def test_keeping_none_is_refused(pretrain, keep):
    with pytest.raises(UserError, match=rf"checkpoints\.keep is {keep}; expected .* from 1 to .*, or -1 for all"):
        pretrain(f"checkpoints.keep={keep}")


DIES_WHILE_WRITING = """
import os, sys, torch
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main

torch.set_num_threads(1)
save, count = torch.save, 0

def half(content, file, **options):
    global count
    count += hasattr(file, "name")  # PyTorch itself saves to buffers now and then
    if count == 3:  # batch 6
        file.write(b"PK half of it")
        file.flush()
        os._exit(9)
    save(content, file, **options)

torch.save = half
main(load_config(sys.argv[1], sys.argv[2:], PretrainConfig))
"""


def test_a_kill_while_writing_leaves_the_one_before(pretrain, tmp_path, tiny_yaml):
    settings = [*SHORT, "checkpoints.milestones=[]", "checkpoints.keep=1"]
    done = programs.run([sys.executable, "-c", DIES_WHILE_WRITING, str(tiny_yaml), *settings], check=False)
    assert done.returncode == 9
    assert os.readlink(tmp_path / "run" / "latest-rank0.pt") == "batch-4-rank0.pt"
    assert find_corruption(str(tmp_path / "run" / "batch-4-rank0.pt")) is None
    assert names(tmp_path / "run") == [".unfinished-batch-6-rank0.pt", "batch-4-rank0.pt", "latest-rank0.pt"]
    assert pretrain("checkpoints.milestones=[]", "checkpoints.keep=1").state.timestamp.batch.value == 8
    assert names(tmp_path / "run") == ["batch-8-rank0.pt", "latest-rank0.pt"]


def test_the_link_is_there_at_every_moment(tmp_path, monkeypatch):
    """Also if the process dies between creating the new link and renaming it."""
    for number in (1, 2):
        (tmp_path / f"batch-{number}-rank0.pt").write_text(str(number))
    link = str(tmp_path / "latest-rank0.pt")
    replace_link(link, str(tmp_path / "batch-1-rank0.pt"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            replace_link(link, str(tmp_path / "batch-2-rank0.pt"))
    assert Path(link).read_text() == "1"
    replace_link(link, str(tmp_path / "batch-2-rank0.pt"))
    assert Path(link).read_text() == "2"
    assert names(tmp_path) == ["batch-1-rank0.pt", "batch-2-rank0.pt", "latest-rank0.pt"]


Usage = collections.namedtuple("Usage", "total used free")


def test_too_little_room_is_said_before_anything_is_written(pretrain, tmp_path, monkeypatch):
    pretrain("trainer.max_duration=4ba", "trainer.eval_interval=4ba")
    size = (tmp_path / "run" / "batch-4-rank0.pt").stat().st_size
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: Usage(10**9, 10**9, size // 2))
    with pytest.raises(UserError, match=r"batch-6-rank0.pt needs about 0\.\d MiB, and 0\.\d MiB are free") as caught:
        pretrain()
    assert "the newest complete checkpoint is" in str(caught.value)
    assert "batch-4-rank0.pt" in str(caught.value)
    assert names(tmp_path / "run") == ["batch-4-rank0.pt", "latest-rank0.pt", "milestone-ba2-rank0.pt"]
    monkeypatch.undo()
    assert pretrain().state.timestamp.batch.value == 8


def test_the_estimate_is_about_the_size(pretrain, tmp_path):
    trainer = pretrain()
    size = (tmp_path / "run" / "batch-8-rank0.pt").stat().st_size
    # Tokenizer, configuration and the records of the zip archive are not counted.
    assert 0.5 * size < saving.checkpoint_bytes(trainer.state) < 1.5 * size


def test_a_disk_that_runs_full_while_saving_keeps_the_one_before(pretrain, tmp_path, monkeypatch):
    pretrain("trainer.max_duration=4ba", "trainer.eval_interval=4ba")

    save = torch.save

    def full(content, file, **options):
        if not hasattr(file, "name"):  # PyTorch itself saves to buffers now and then
            return save(content, file, **options)
        file.write(b"PK half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"batch-6-rank0.pt could not be written: .*No space left on device"):
            pretrain()
    assert names(tmp_path / "run") == ["batch-4-rank0.pt", "latest-rank0.pt", "milestone-ba2-rank0.pt"]
    assert pretrain().state.timestamp.batch.value == 8


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB; skips without the permission to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.getuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the permission to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_small_disk(pretrain, small_disk, monkeypatch):
    """A full disk, filled before training; a quota; and a read-only disk."""
    pretrain(f"checkpoints.folder={small_disk}", "trainer.max_duration=2ba", "schedule.warmup=1ba")
    before = names(small_disk)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass
    with pytest.raises(UserError, match=r"No space left on device|are free") as caught:
        pretrain(f"checkpoints.folder={small_disk}")
    assert "rerun the same command" in str(caught.value)
    assert [name for name in names(small_disk) if name != "filler"] == before
    # As with a quota, which the free space does not show: there is space for a part of a checkpoint.
    os.truncate(filler, filler.stat().st_size - 200 * 1024)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "checkpoint_bytes", lambda state: 0)
        with pytest.raises(UserError, match=r"batch-4-rank0.pt could not be written"):
            pretrain(f"checkpoints.folder={small_disk}", "checkpoints.milestones=[]")
    assert [name for name in names(small_disk) if name != "filler"] == before
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"(?i)read-only file system"):
        pretrain(f"checkpoints.folder={small_disk}")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    trainer = pretrain(f"checkpoints.folder={small_disk}", "checkpoints.keep=1")
    assert trainer.state.timestamp.batch.value == 8


def test_an_object_store_is_no_folder(pretrain):
    with pytest.raises(UserError, match=r"checkpoints.folder=s3://bucket/run: .* of this machine.*checkpoints.remote"):
        pretrain("checkpoints.folder=s3://bucket/run")
