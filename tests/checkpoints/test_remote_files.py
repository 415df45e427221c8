"""Objects of a copied run: checkpoints, the index, and the other files, without a run."""

from __future__ import annotations

import json
import random

import pytest
from remote_copies import REMOTE, contents, objects

from electra_composer.checkpoints import remote_files
from electra_composer.checkpoints.remote import RemoteCopy, fetch_newest
from electra_composer.checkpoints.remote_files import other_files, upload_files
from electra_composer.checkpoints.remote_run import RemoteIndex, RemoteRun, StoredCheckpoint
from electra_composer.config import CheckpointConfig
from electra_composer.errors import UserError


def test_another_number_of_checkpoints_to_keep_at_each_start(s3, tmp_path):
    """Lowered, raised, and all: every upload succeeds, and none replaces an object that the index names."""
    batch, milestones, dice = 0, [], random.Random(0)
    for keep in (4, 1, 3, -1, 2, 1, 5, -1, 3):
        copy = RemoteCopy(CheckpointConfig(folder=str(tmp_path), remote=REMOTE, keep=keep), "tiny")
        intervals = [stored for stored in contents(s3).checkpoints if not stored.is_milestone]
        for _ in range(dice.randint(1, 5)):
            batch += 1
            is_milestone = dice.random() < 0.2
            path = tmp_path / f"{'milestone-ba' if is_milestone else 'batch-'}{batch}-rank0.pt"
            path.write_bytes(dice.randbytes(dice.randint(1, 99)))
            copy.upload(str(path))
            copy.wait()
            assert copy.failure is None
            stored = contents(s3).checkpoints
            assert stored[0].name == path.name
            milestones += [path.name] if is_milestone else []
            assert sorted(milestones) == sorted(each.name for each in stored if each.is_milestone)
            for each in stored:
                body = s3.get_object(Bucket="corpus", Key=f"my/run/{each.place}/checkpoint.pt")["Body"].read()
                assert body == (tmp_path / each.name).read_bytes()
        found = [each for each in stored if not each.is_milestone]
        assert keep < 0 or len(found) <= max(keep, len(intervals))


def test_files_that_change_while_they_are_uploaded(s3, tmp_path, monkeypatch):
    """As at a start: the metrics file is replaced by a shorter one, and another file is gone since it was listed."""
    metrics, upload = tmp_path / "metrics.jsonl", RemoteRun.upload
    metrics.write_text("x" * 1000)

    def replaced(self, name, path):
        metrics.write_text("short")
        upload(self, name, path)

    monkeypatch.setattr(RemoteRun, "upload", replaced)
    monkeypatch.setattr(remote_files, "other_files", lambda folder: ["gone", "metrics.jsonl"])
    uploaded: dict[str, tuple[int, int]] = {}
    upload_files(RemoteRun(REMOTE), str(tmp_path), uploaded)
    assert objects(s3) == {"files/metrics.jsonl": 1000}
    assert {name: size for name, (_, size) in uploaded.items()} == {"metrics.jsonl": 1000}
    upload_files(RemoteRun(REMOTE), str(tmp_path), uploaded)
    assert objects(s3) == {"files/metrics.jsonl": 5}


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": [{"name": "../batch-4-rank0.pt", "place": "newest-0", "files": {"x": 1}}]},
        {"checkpoints": [{"name": "batch-4-rank0.pt", "place": "..", "files": {"x": 1}}]},
        {"checkpoints": [{"name": "latest-rank0.pt", "place": "newest-0", "files": {"x": 1}}]},
        {"checkpoints": [{"name": "batch-4", "place": "newest-0", "files": {"../../x": 1}}]},
        {"files": {"/etc/passwd": 1}},
        {"files": {"../x": 1}},
        {"format_version": 2},
        {"checkpoints": 3},
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(s3, tmp_path, change):
    good = json.loads(
        RemoteIndex("tiny", [StoredCheckpoint("batch-4-rank0.pt", "newest-0", {"batch-4-rank0.pt": 1})]).to_json()
    )
    RemoteIndex.from_json(json.dumps(good))
    s3.put_object(Bucket="corpus", Key="my/run/latest.json", Body=json.dumps(good | change).encode())
    with pytest.raises(UserError, match=r"my/run/latest.json was not written by pretrain.py"):
        fetch_newest(CheckpointConfig(folder=str(tmp_path / "run"), remote=REMOTE), "tiny", "latest-rank0.pt")
    assert not (tmp_path / "run").exists()


def test_what_goes_with_the_checkpoints(tmp_path):
    for name in (
        "config.yaml",
        "trouble/batch-3/batch.pt",
        ".lock",
        "wandb/log",
        "batch-4-rank0.pt",
        "batch-8/.metadata",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "latest-rank0.pt").symlink_to("batch-4-rank0.pt")
    assert other_files(str(tmp_path)) == ["config.yaml", "trouble/batch-3/batch.pt"]
