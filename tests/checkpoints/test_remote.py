"""A run whose disk is lost resumes from its copy in an object store (a local S3 server)."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import programs
import pytest
from comparison import assert_same_run
from remote_copies import REMOTE, contents, objects
from resumed_runs import run, signal_at
from tiny import BENCHMARKS

from electra_composer.checkpoints.remote import fetch_newest
from electra_composer.checkpoints.remote_files import restore_metrics
from electra_composer.checkpoints.remote_run import RemoteIndex, RemoteRun
from electra_composer.checkpoints.saving import checkpoints_in
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError

COPIED = [f"checkpoints.remote={REMOTE}", "checkpoints.interval=4ba", "checkpoints.milestones=[0.5]"]


def lose_disk(folder: Path) -> None:
    """Remove a run's folder, as on a new machine; the test's record of the run stays."""
    shutil.rmtree(folder / "run")


def test_a_run_whose_disks_are_lost_is_the_run_that_never_was(s3, tiny_yaml, tmp_path):
    settings = [*COPIED, "trainer.max_duration=24ba", "trainer.eval_interval=10ba", "trainer.log_interval=7ba"]
    assert run(str(tiny_yaml), tmp_path / "uninterrupted", *settings[1:]) == 0
    for interruption in (signal_at(5, signal.SIGTERM, 0), ["callbacks.crash.batch=14"]):
        assert run(str(tiny_yaml), tmp_path / "lost", *settings, *interruption) != 0
        lose_disk(tmp_path / "lost")
    assert run(str(tiny_yaml), tmp_path / "lost", *settings) == 0
    assert_same_run(tmp_path / "uninterrupted", tmp_path / "lost")
    # The third start resumed from the checkpoint of batch 12; earlier milestones are still in the store.
    assert [saved.batch for saved in checkpoints_in(str(tmp_path / "lost" / "run"))] == [24]
    kept = contents(s3)
    assert [stored.name for stored in kept.checkpoints] == ["batch-24-rank0.pt", "milestone-ba12-rank0.pt"]
    assert set(kept.files) == {"config.yaml", "history.jsonl", "metrics.jsonl", "tokenizer/tokenizer.json"} | {
        f"tokenizer/{path.name}" for path in (tmp_path / "lost/run/tokenizer").iterdir()
    }
    found = objects(s3)
    for stored in kept.checkpoints:
        assert all(found[f"{stored.place}/{name}"] == size for name, size in stored.files.items())
    assert found["files/metrics.jsonl"] == (tmp_path / "lost/run/metrics.jsonl").stat().st_size
    # One prefix more than checkpoints are kept; the index does not name it.
    assert {name.split("/")[0] for name in found} == {
        "latest.json",
        "files",
        "newest-0",
        "newest-1",
        "milestone-ba12",
    }
    assert found.keys() >= {"newest-0/checkpoint.pt", "newest-1/checkpoint.pt", "milestone-ba12/checkpoint.pt"}
    assert sum(name.startswith(("newest", "milestone")) for name in found) == 3


def test_google_cloud_storage(gcs, tiny_yaml, tmp_path):
    settings = ["checkpoints.remote=gs://corpus/my/run", *COPIED[1:], "trainer.max_duration=8ba"]
    assert run(str(tiny_yaml), tmp_path, *settings, "callbacks.crash.batch=6") == -9
    lose_disk(tmp_path)
    assert run(str(tiny_yaml), tmp_path, *settings) == 0
    lines = [json.loads(line)["batch"] for line in (tmp_path / "record/rank0.jsonl").read_text().splitlines()]
    assert lines == [*range(6), *range(4, 8)]
    latest = json.loads(gcs.blob("my/run/latest.json").download_as_bytes())
    assert [stored["name"] for stored in latest["checkpoints"]] == KEPT
    settings[0] = "checkpoints.remote=gs://no-such-bucket/run"
    with pytest.raises(UserError, match=r"checkpoints.remote: gs://no-such-bucket/run: "):
        run(str(tiny_yaml), tmp_path, *settings)


@pytest.mark.distributed
def test_two_processes(s3, tiny_yaml, tmp_path):
    """After SIGTERM to one rank both wait until the copy is complete. One process then resumes from it elsewhere."""
    sharded = "trainer.fsdp={state_dict_type: sharded}"
    script = BENCHMARKS / "recorded_run.py"
    (tmp_path / "record").mkdir()
    settings = [*COPIED, sharded, f"checkpoints.folder={tmp_path / 'run'}"]
    record = [f"callbacks.record.folder={tmp_path / 'record'}", *signal_at(6, signal.SIGTERM, 1)]
    done = programs.run(
        [str(Path(sys.executable).with_name("composer")), "-n", "2", str(script), str(tiny_yaml), *settings, *record],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parent.parent)},
        check=False,
    )
    assert done.returncode == 143, done.stdout[-2000:] + done.stderr[-4000:]
    newest = contents(s3).checkpoints[0]
    assert newest.batch in (6, 7)  # the signal arrives between two batches, or in the next one
    assert newest.files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    lose_disk(tmp_path)
    assert run(str(tiny_yaml), tmp_path, *COPIED, sharded) == 0
    assert contents(s3).checkpoints[0].batch == 16


@pytest.fixture
def copied(s3, tiny_yaml, tmp_path):
    """Return `copied(…)`, which starts or resumes a short run and returns the names of its copied checkpoints."""

    def start(*overrides: str) -> list[str]:
        assert run(str(tiny_yaml), tmp_path, *COPIED, "trainer.max_duration=8ba", *overrides) == 0
        return [stored.name for stored in contents(s3).checkpoints]

    return start


KEPT = ["batch-8-rank0.pt", "milestone-ba4-rank0.pt"]


def test_a_broken_newest_in_the_store_gives_way_to_the_one_before(copied, s3, tmp_path, caplog):
    assert copied() == KEPT
    place = contents(s3).checkpoints[0].place
    key = f"my/run/{place}/checkpoint.pt"
    intact = s3.get_object(Bucket="corpus", Key=key)["Body"].read()
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
    for damaged, reason in ((intact[:-10], "bytes; expected"), (flipped, "is corrupt"), (None, "no such file")):
        if damaged is None:
            s3.delete_object(Bucket="corpus", Key=key)
        else:
            s3.put_object(Bucket="corpus", Key=key, Body=damaged)
        shutil.rmtree(tmp_path / "run")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            fetch_newest(CheckpointConfig(folder=str(tmp_path / "run"), remote=REMOTE), "tiny", "latest-rank0.pt")
        (warning,) = (record.message for record in caplog.records)
        assert "batch-8-rank0.pt in s3://corpus/my/run cannot be used" in warning
        assert reason in warning
        assert "resuming from milestone-ba4-rank0.pt" in warning
        assert os.readlink(tmp_path / "run" / "latest-rank0.pt") == "milestone-ba4-rank0.pt"
    s3.delete_object(Bucket="corpus", Key="my/run/milestone-ba4/checkpoint.pt")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"batch-8.*cannot be used.*milestone-ba4.*cannot be used"):
        fetch_newest(CheckpointConfig(folder=str(tmp_path / "run"), remote=REMOTE), "tiny", "latest-rank0.pt")


def test_the_newer_of_folder_and_store_counts(copied, s3, tmp_path, caplog):
    assert copied() == KEPT
    saved = Path(shutil.copytree(tmp_path / "run", tmp_path / "of-batch-8", symlinks=True))
    copied("trainer.max_duration=12ba")
    shutil.rmtree(tmp_path / "run")
    saved.rename(tmp_path / "run")  # an older disk comes back; the store is newer
    before = len((tmp_path / "record/rank0.jsonl").read_text().splitlines())
    copied("trainer.max_duration=16ba")
    assert len((tmp_path / "record/rank0.jsonl").read_text().splitlines()) - before == 4
    # A store that missed checkpoints is older than the folder and catches up, also if the run is finished.
    old = RemoteIndex("tiny", [stored for stored in contents(s3).checkpoints if stored.batch < 16])
    RemoteRun(REMOTE).write(old)
    assert copied("trainer.max_duration=16ba")[0] == "batch-16-rank0.pt"
    assert len((tmp_path / "record/rank0.jsonl").read_text().splitlines()) - before == 4


def test_another_run_in_the_store(copied, s3, tmp_path, tiny_yaml):
    copied()
    shutil.rmtree(tmp_path / "run")
    for overrides, message in (
        (["checkpoints.resume=false"], r"s3://corpus/my/run holds the checkpoints of a run; set checkpoints.resume=tr"),
        (["run_name=other"], r"holds the run 'tiny', and this is 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            copied(*overrides)
        assert not (tmp_path / "run").exists()
    assert copied("run_name=other", "checkpoints.overwrite=true") == KEPT
    assert contents(s3).run_name == "other"
    lines = [json.loads(line) for line in (tmp_path / "record/rank0.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [*range(8), *range(8)]


@pytest.mark.parametrize(
    ("remote", "message"),
    [
        ("s3://no-such-bucket/run", r"checkpoints.remote: s3://no-such-bucket/run: .*the bucket"),
        ("runs/copy", r"checkpoints.remote: runs/copy: not the URL of an object store, such as s3://bucket/folder"),
        ("ftp://host/run", r"checkpoints.remote: ftp://host/run: There is no implementation"),
    ],
)
def test_a_place_that_takes_nothing_is_known_before_training(copied, tmp_path, remote, message):
    with pytest.raises(UserError, match=message):
        copied(f"checkpoints.remote={remote}")
    assert not (tmp_path / "record" / "rank0.jsonl").exists()


def test_nothing_to_copy_is_a_mistake(copied):
    with pytest.raises(UserError, match=r"checkpoints.remote=s3://corpus/my/run: there will be no checkpoints to copy"):
        copied("checkpoints.interval=null", "checkpoints.milestones=[]")


def test_a_store_that_is_away(copied, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"checkpoints.remote: .*the server does not answer"):
        copied()


def test_a_store_that_goes_away_for_a_while_is_no_matter(copied, s3, monkeypatch, caplog, tmp_path):
    upload, fails = RemoteRun.upload, {"batch-4-rank0.pt", "milestone-ba4-rank0.pt"}

    def failing(self, name, path):
        if os.path.basename(path) in fails:
            raise ConnectionError("gone")
        upload(self, name, path)

    monkeypatch.setattr(RemoteRun, "upload", failing)
    assert copied() == ["batch-8-rank0.pt"]
    assert any("batch-4-rank0.pt could not be copied" in record.message for record in caplog.records)
    fails.add("batch-12-rank0.pt")
    with pytest.raises(UserError, match=r"complete in .*run, but its copy is not: batch-12-rank0.pt could not be cop"):
        copied("trainer.max_duration=12ba")
    assert (tmp_path / "run" / "batch-12-rank0.pt").exists()
    fails.clear()
    assert copied("trainer.max_duration=12ba")[0] == "batch-12-rank0.pt"


def test_a_copy_that_begins_ends_moves_and_keeps_fewer(s3, tmp_path, tiny_yaml):
    """checkpoints.remote added, removed and changed, and keep lowered: the newest checkpoint is where it is to be."""

    def start(batches: int, remote: str | None, keep: int = 3) -> list[int]:
        settings = ["checkpoints.interval=1ba", "checkpoints.milestones=[]", f"checkpoints.keep={keep}"]
        settings += ["schedule.warmup=1ba", "trainer.eval_batches=1", f"trainer.max_duration={batches}ba"]
        settings += [] if remote is None else [f"checkpoints.remote={remote}"]
        assert run(str(tiny_yaml), tmp_path, *settings) == 0
        return [] if remote is None else [stored.batch for stored in RemoteRun(remote).read().checkpoints]

    assert start(2, None) == []
    assert start(4, REMOTE) == [4, 3, 2]
    assert start(5, "s3://corpus/other") == [5, 4]
    assert start(6, REMOTE, keep=1) == [6]  # the folder was newer than this copy
    assert [saved.batch for saved in checkpoints_in(str(tmp_path / "run"))] == [6]


def test_a_metrics_file_that_was_cut_is_restored(copied, s3, tmp_path, caplog):
    copied()
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:20])
    copied("trainer.max_duration=9ba")
    assert re.search(r"metrics.jsonl has [0-9,]+ of [0-9,]+ bytes; restored from s3://corpus/my/run", caplog.text)
    assert "are lost" not in caplog.text
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*range(10)]
    assert path.read_text().startswith("".join(lines[:8]))
    kept = path.read_text()
    for damage in (path.unlink, lambda: path.write_text(kept[:100])):
        damage()
        restore_metrics(RemoteRun(REMOTE), contents(s3), str(tmp_path / "run"))
        assert path.read_text() == kept


def test_a_disk_that_is_full_here(copied, tmp_path, monkeypatch):
    copied()
    shutil.rmtree(tmp_path / "run")

    def full(self, name, path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(RemoteRun, "download", full)
    with pytest.raises(UserError, match=r"checkpoints.remote: .*cannot be .*written here: No space left on device"):
        copied()
