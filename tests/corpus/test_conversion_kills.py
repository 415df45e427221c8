"""Conversions killed at any call that changes files: the same command finishes them, and says so if they were done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
from converter import assert_same_files
from kill_points import interrupt_everywhere, tree_of
from small_shards import make_tokenizer, write_shards
from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import CloudUploader, LocalUploader

from electra_composer.batches.shards import read_meta
from electra_composer.corpus import conversion, folder_writer, source_parts
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.part_conversion import convert_part
from electra_composer.corpus.selection import scan_part
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError


class OneProcess:
    """Engine that converts in the calling process, so that a kill also hits what workers do."""

    def __init__(self, workers):
        pass

    def scan(self, sources, parts):
        return map(partial(scan_part, sources), parts)

    def convert(self, context, jobs, bar):
        for job in jobs:
            record = convert_part(context, context.settings.tokenizer(), job, lambda size: None)
            yield {**record, "number": job.number}


@pytest.fixture
def options(tmp_path, monkeypatch):
    """`options(out, …)`: a conversion of two small files, one part each, in this process."""
    monkeypatch.setattr(conversion, "Processes", OneProcess)
    monkeypatch.setattr(source_parts, "MIN_PART", 700)
    texts = tmp_path / "texts"
    texts.mkdir()
    tokenizer = make_tokenizer(texts)
    for name in ("a", "b"):
        lines = [" ".join(f"w{(7 * i + j) % 200}" for j in range(5 + i % 9)) for i in range(12)]
        (texts / f"{name}.txt").write_text("\n\n".join(lines))
    tokenizer.save_pretrained(texts / "tokenizer")
    defaults = {"tokenizer": str(texts / "tokenizer"), "max_seq_length": 16, "val_fraction": 0.2, "progress": False}

    def make(out, files="*", **changes):
        return Conversion(Sources.of(str(texts / f"{files}.txt")), str(out), **{**defaults, **changes})

    return make


class FolderStore:
    """Object store in a folder: an object appears in one step, and none is renamed or removed.

    Args:
        folder: of the objects; `inside` is a folder around it, outside of which no local file may be.
    """

    def __init__(self, folder, inside):
        self.folder, self.inside = folder.resolve(), inside.resolve()
        assert self.folder.is_relative_to(self.inside)

    def path(self, url):
        assert url.startswith("s3://bucket/"), url
        path = self.folder / url.removeprefix("s3://")
        assert path.resolve().is_relative_to(self.folder / "bucket"), url
        return path

    def local(self, name):
        path = Path(name).resolve()
        assert path.is_relative_to(self.inside), name
        assert path != self.inside, name
        return path

    def uploader(self, out, keep_local=False, *arguments, **options):
        """Take the place of CloudUploader.get. MDSWriter removes the local folder when everything is uploaded."""
        if isinstance(out, str):
            assert ":" not in out
            return LocalUploader(str(self.local(out)), keep_local, *arguments, **options)
        local, remote, store = self.local(out[0]), out[1], self
        store.path(remote)

        class Uploader(LocalUploader):
            def upload_file(self, filename):
                target = store.path(f"{remote}/{filename}")
                target.parent.mkdir(parents=True, exist_ok=True)
                sent = store.inside / f"sent-{threading.get_ident()}"
                shutil.copy(local / filename, sent)
                os.replace(sent, target)
                self.clear_local(local=str(store.local(local / filename)))

        uploader = Uploader(str(local), keep_local, exist_ok=True)
        uploader.remote = remote
        return uploader

    def downloader(self, url):
        return self

    def download(self, remote, local, timeout):
        shutil.copy(self.path(remote), self.local(local))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Use a FolderStore in `tmp_path / "folder"` for `s3://`, and keep all local files in `tmp_path` too."""
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    scratch.mkdir()
    made = FolderStore(folder / "store", inside=tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(CloudUploader, "get", made.uploader)
    monkeypatch.setattr(CloudDownloader, "get", made.downloader)
    monkeypatch.setattr(folder_writer, "workspace_of", lambda remote: str(folder / "work"))
    return made


def test_a_killed_conversion_is_finished_by_the_same_command(options, tmp_path):
    changes = {"tokenizer": "train", "vocab_size": 60, "compression": "zstd", "val_fraction": 0.001}  # val is filled
    calls = interrupt_everywhere(tmp_path, lambda folder: convert(options(folder / "out", **changes)))
    assert "before rename out.partial/whole" in calls


def test_a_killed_overwrite_loses_neither_folder(options, tmp_path):
    def prepare(folder):
        write_shards(folder / "out", make_tokenizer(tmp_path), train=9)

    def intact(folder):
        found = [path for path in (folder / "out", folder / ".replaced-out") if path.exists()]
        assert any(read_meta(str(path)).splits["train"].rows for path in found)
        assert all((path / "meta.json").exists() for path in found if path.name == "out")

    interrupt_everywhere(
        tmp_path, lambda folder: convert(options(folder / "out", "a", overwrite=True)), prepare, intact=intact
    )


def test_a_killed_conversion_into_an_object_store(options, store, tmp_path):
    def tree(folder):  # records, which are for another machine to resume, may be missing after the end
        return {name: content for name, content in tree_of(folder).items() if "/records" not in name}

    calls = interrupt_everywhere(tmp_path, lambda folder: convert(options("s3://bucket/out", "a")), tree=tree)
    assert sum(call.startswith("before replace store/bucket/out") for call in calls) > 8


@pytest.fixture
def left_over(options, tmp_path, monkeypatch):
    """`left_over(out)`: a conversion that was killed when it had moved everything to `out`, before its clean-up."""

    def make(out, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(folder_writer.ShardFolder, "__exit__", lambda self, *_: self._lock.release())
            return convert(options(out, **changes))

    return make


def test_what_is_done_is_not_done_again(options, left_over, tmp_path, monkeypatch):
    first = left_over(tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match=r"exists already; choose another --out, or pass --overwrite"):
        convert(options(tmp_path / "out", seed=1))
    monkeypatch.setattr(OneProcess, "convert", None)  # must not be called
    second = convert(options(tmp_path / "out", overwrite=True))
    assert second.was_complete
    assert "is complete already" in str(second)
    assert (second.splits, second.sources, second.shard_bytes) == (first.splits, first.sources, first.shard_bytes)
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]
    assert convert(options(tmp_path / "out")).was_complete  # also later
    (tmp_path / "out/train/00000/shard.00000.mds").unlink()
    with pytest.raises(UserError, match=r"train/00000/shard.00000.mds is missing; pass --overwrite"):
        convert(options(tmp_path / "out"))
    (tmp_path / "out/plan.json").unlink()  # as of an earlier version
    with pytest.raises(UserError, match=r"exists already; choose another --out, or pass --overwrite"):
        convert(options(tmp_path / "out"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"restart": True}], ids=lambda changes: "".join(changes))
def test_a_left_over_workspace_of_a_removed_folder(options, left_over, tmp_path, changes, seed):
    left_over(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    summary = convert(options(tmp_path / "out", seed=seed, **changes))
    assert (summary.was_complete, summary.continued_tokens) == (False, 0)
    convert(options(tmp_path / "again", seed=seed))
    assert_same_files(tmp_path / "out", tmp_path / "again")
    assert sorted(os.listdir(tmp_path)) == ["again", "out", "texts"]


def test_a_left_over_workspace_and_other_options_that_overwrite(options, left_over, tmp_path):
    left_over(tmp_path / "out")
    assert convert(options(tmp_path / "out", seed=1, overwrite=True)).continued_tokens == 0
    assert read_meta(str(tmp_path / "out")).seed == 1
    assert not convert(options(tmp_path / "out", seed=1, overwrite=True)).was_complete  # --overwrite converts again


def test_a_left_over_workspace_of_a_folder_removed_from_the_store(options, left_over, store, tmp_path):
    left_over("s3://bucket/out")
    assert convert(options("s3://bucket/out", overwrite=True)).was_complete  # the end of the killed conversion
    left_over("s3://bucket/other")
    shutil.rmtree(store.path("s3://bucket/other"))
    assert convert(options("s3://bucket/other")).continued_tokens == 0
    assert tree_of(Path(store.path("s3://bucket/other"))) == tree_of(Path(store.path("s3://bucket/out")))


def test_records_of_another_plan_in_the_store_are_not_used(options, store, tmp_path, monkeypatch):
    """A restarted conversion that is interrupted and resumed on another machine."""

    def stops(self, context, jobs, bar):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(folder_writer.ShardFolder, "finish", None)
        with pytest.raises(TypeError):
            convert(options("s3://bucket/out"))
        patch.setattr(OneProcess, "convert", stops)
        with pytest.raises(InterruptedError):
            convert(options("s3://bucket/out", seed=1, restart=True))
    shutil.rmtree(tmp_path / "folder/work.partial", ignore_errors=True)
    assert convert(options("s3://bucket/out", seed=1)).continued_tokens == 0
    for record in Path(store.path("s3://bucket/out/records")).iterdir():
        assert json.loads(record.read_text())["plan"]
    convert(options(tmp_path / "local", seed=1))
    remote = tree_of(Path(store.path("s3://bucket/out")))
    assert all(remote[name] == content for name, content in tree_of(tmp_path / "local").items())


def test_a_folder_that_appears_during_the_conversion_is_not_replaced(options, tmp_path, monkeypatch):
    def convert_slowly(self, context, jobs, bar):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/mine.txt").write_text("mine")
        return converted(self, context, jobs, bar)

    converted = OneProcess.convert
    monkeypatch.setattr(OneProcess, "convert", convert_slowly)
    with pytest.raises(UserError, match=r"out has appeared during the conversion; move it away"):
        convert(options(tmp_path / "out"))
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
