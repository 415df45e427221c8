"""Writing a folder of shards: complete or absent, and existing folders are safe."""

from __future__ import annotations

import errno
import os

import pytest
from small_shards import make_rows, make_tokenizer, write_shards

from electra_composer.batches.shards import read_meta
from electra_composer.corpus.folder_writer import ShardFolder
from electra_composer.errors import UserError


def test_an_existing_folder_is_left_alone(shards, tmp_path):
    before = sorted(os.listdir(shards))
    with pytest.raises(UserError, match=r"exists already; choose another --out, or pass --overwrite"):
        ShardFolder(str(shards)).__enter__()
    assert sorted(os.listdir(shards)) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"not a folder of shards .* --overwrite does not replace it"):
        ShardFolder(str(tmp_path / "mine"), overwrite=True).__enter__()
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"new.partial exists, and is not of a conversion \(no plan.json\): move it"):
        ShardFolder(str(tmp_path / "new"), restart=True).__enter__()
    assert (tmp_path / "new.partial/mine.txt").read_text() == "mine"


def test_overwrite_replaces_only_by_what_is_whole(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    path = write_shards(tmp_path / "out", tokenizer)
    with pytest.raises(IndexError), ShardFolder(path, overwrite=True) as folder:
        folder.begin("uint16", ["train"]).write("train", make_rows(1)[1])
    assert read_meta(path).splits["train"].rows == 40
    write_shards(path, tokenizer, train=9, overwrite=True)
    assert read_meta(path).splits["train"].rows == 9
    assert sorted(os.listdir(tmp_path)) == ["out", "vocab.txt"]


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("no"), RuntimeError, "no"),
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "No space left on device; nothing was kept"),
    ],
)
def test_nothing_stays_of_what_was_broken_off(tmp_path, monkeypatch, failure, raised, message):
    tokenizer = make_tokenizer(tmp_path)

    def fail(*_):
        assert list(tmp_path.glob("out.partial/unfinished/*/train"))
        raise failure

    monkeypatch.setattr("streaming.MDSWriter.finish", fail)
    with pytest.raises(raised, match=message):
        write_shards(tmp_path / "out", tokenizer)
    assert os.listdir(tmp_path) == ["vocab.txt"]


def test_no_place_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"), ShardFolder(str(tmp_path / "file/out")):
        pass
