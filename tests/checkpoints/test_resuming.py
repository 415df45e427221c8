"""A corrupt newest checkpoint is skipped for the one before it, with a warning about both."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
import torch.distributed.checkpoint as dcp

from electra_composer.checkpoints.resuming import find_corruption, repair_latest_link
from electra_composer.checkpoints.safe_loading import SafeLoadPlanner
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.pretrain import main

LATEST = "latest-rank0.pt"


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """A folder with three checkpoints and a link to the newest."""
    for batch in (2, 10, 9):
        torch.save({"batch": batch, "weights": torch.arange(1000.0)}, tmp_path / f"batch-{batch}-rank0.pt")
    os.symlink("batch-10-rank0.pt", tmp_path / LATEST)
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    path.write_text("something else")


@pytest.mark.parametrize("damage", [cut, flip, replace, Path.unlink], ids=["cut", "bit", "other", "gone"])
def test_a_broken_newest_gives_way(run_folder, caplog, damage):
    damage(run_folder / "batch-10-rank0.pt")
    with caplog.at_level(logging.WARNING):
        repair_latest_link(str(run_folder), LATEST)
    assert os.readlink(run_folder / LATEST) == "batch-9-rank0.pt"
    (record,) = caplog.records
    gone = damage is Path.unlink
    assert f"batch-10-rank0.pt is {'missing' if gone else 'not a complete checkpoint ('}" in record.message
    assert "resuming from the newest complete one before it, " in record.message
    assert "batch-9-rank0.pt" in record.message
    assert ("kept as batch-10-rank0.pt.broken" in record.message) == (not gone)
    assert (run_folder / "batch-10-rank0.pt.broken").exists() == (not gone)
    caplog.clear()
    repair_latest_link(str(run_folder), LATEST)
    assert not caplog.records
    assert torch.load(run_folder / LATEST)["batch"] == 9


def test_the_next_broken_one_is_passed_over_too(run_folder):
    for batch in (10, 9):
        cut(run_folder / f"batch-{batch}-rank0.pt")
    repair_latest_link(str(run_folder), LATEST)
    assert os.readlink(run_folder / LATEST) == "batch-2-rank0.pt"


def test_a_newer_one_of_another_time_is_not_taken(run_folder):
    """Checkpoints newer than the link's are from before an earlier fallback; the run will write them again."""
    os.remove(run_folder / LATEST)
    os.symlink("batch-9-rank0.pt", run_folder / LATEST)
    cut(run_folder / "batch-9-rank0.pt")
    repair_latest_link(str(run_folder), LATEST)
    assert os.readlink(run_folder / LATEST) == "batch-2-rank0.pt"


def test_a_folder_without_its_link(run_folder, caplog):
    """As after a copy that leaves out links: the newest complete checkpoint is taken, with a warning."""
    os.remove(run_folder / LATEST)
    cut(run_folder / "batch-10-rank0.pt")
    repair_latest_link(str(run_folder), LATEST)
    assert os.readlink(run_folder / LATEST) == "batch-9-rank0.pt"
    assert f"{LATEST} is missing; resuming from the newest complete one" in caplog.text


def test_none_is_whole(run_folder):
    for path in run_folder.glob("batch-*"):
        cut(path)
    with pytest.raises(
        UserError, match=r"batch-10-rank0.pt is not a complete .*no complete checkpoint before .*overwr"
    ):
        repair_latest_link(str(run_folder), LATEST)
    assert os.readlink(run_folder / LATEST) == "batch-10-rank0.pt"
    assert not list(run_folder.glob("*.broken"))


def test_nothing_to_resume_from(tmp_path):
    repair_latest_link(str(tmp_path / "nowhere"), LATEST)
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def sharded_folder(tmp_path) -> Path:
    for batch in (4, 8):
        folder = tmp_path / f"batch-{batch}"
        dcp.save({"weights": torch.arange(1000.0), "batch": batch}, checkpoint_id=folder, no_dist=True)
    os.symlink("batch-8", tmp_path / LATEST)
    return tmp_path


def test_a_sharded_checkpoint(sharded_folder):
    newest = sharded_folder / "batch-8"
    (shard,) = newest.glob("*.distcp")
    intact = shard.read_bytes()
    assert find_corruption(str(newest)) is None
    for damage, reason in ((cut, "truncated"), (flip, "damaged"), (Path.unlink, ".distcp does not exist")):
        damage(shard)
        assert reason in find_corruption(str(newest)), damage
        shard.write_bytes(intact)
    (newest / ".metadata").unlink()
    assert "without its .metadata" in find_corruption(str(newest))
    repair_latest_link(str(sharded_folder), LATEST)
    assert os.readlink(sharded_folder / LATEST) == "batch-4"


def test_a_kill_between_the_two_moves_that_replace_a_folder(sharded_folder):
    os.rename(sharded_folder / "batch-8", sharded_folder / ".replaced-batch-8")
    repair_latest_link(str(sharded_folder), LATEST)
    assert os.readlink(sharded_folder / LATEST) == "batch-8"
    assert find_corruption(str(sharded_folder / "batch-8")) is None


def test_what_a_callback_has_not_saved_stays_as_it_is(sharded_folder, tmp_path):
    """torch's own planner fails; missing weights are an error with ours too."""
    saved = {"state": {"model": {"w": torch.ones(3)}, "callbacks": {"One": {"a": 1}}}}
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    state = {"state": {"model": {"w": torch.zeros(3)}, "callbacks": {"One": {"a": 0, "b": 5}, "Two": {"c": 7}}}}
    dcp.load(state, checkpoint_id=tmp_path / "saved", planner=SafeLoadPlanner(), no_dist=True)
    assert state["state"]["callbacks"] == {"One": {"a": 1, "b": 5}, "Two": {"c": 7}}
    assert state["state"]["model"]["w"].sum() == 3
    state["state"]["model"]["v"] = torch.zeros(3)
    with pytest.raises(dcp.api.CheckpointException, match=r"the checkpoint has no state\.model\.v"):
        dcp.load(state, checkpoint_id=tmp_path / "saved", planner=SafeLoadPlanner(), no_dist=True)


def test_the_run_goes_on_from_the_one_before_and_ends_the_same(tiny_yaml, tmp_path, caplog):
    def pretrain(*overrides: str):
        settings = ["trainer.max_duration=12ba", "trainer.eval_interval=12ba", "checkpoints.keep=2", *overrides]
        return main(load_config(str(tiny_yaml), settings, PretrainConfig)).state.model.state_dict()

    expected = pretrain()
    run = tmp_path / "run"
    for name in ("batch-12-rank0.pt", "milestone-ba12-rank0.pt"):
        if (run / name).exists():
            flip(run / name)
    with caplog.at_level(logging.WARNING):
        continued = pretrain()
    assert "resuming from the newest complete one before it" in caplog.text
    assert all(torch.equal(expected[name], continued[name]) for name in expected)


HOLDS = """
import sys, time
from electra_composer.checkpoints.resuming import exclusive_lock

with exclusive_lock(sys.argv[1]):
    print("there", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder(tiny_yaml, tmp_path):
    """The second run is refused while the first is alive, and starts once it is killed."""
    config = load_config(str(tiny_yaml), ["trainer.max_duration=2ba", "schedule.warmup=1ba"], PretrainConfig)
    command = [sys.executable, "-c", HOLDS, config.checkpoints.folder]
    with programs.Program(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "there\n"
            with pytest.raises(UserError, match="another process trains in this folder"):
                main(config)
            assert os.listdir(config.checkpoints.folder) == [".lock"]
        finally:
            other.kill()
    assert main(config).state.timestamp.batch.value == 2
