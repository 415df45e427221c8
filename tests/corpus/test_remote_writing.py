"""Conversion into an object store, tested with a local S3 server and a local Google Cloud Storage server."""

from __future__ import annotations

import random
import shutil

import pytest
from converter import jsonl, write_vocabulary

from electra_composer.batches.shards import build_data_spec, read_meta
from electra_composer.config import ShardsConfig
from electra_composer.corpus import source_parts
from electra_composer.corpus.conversion import Conversion, convert
from electra_composer.corpus.engines import Processes
from electra_composer.corpus.sources import Sources
from electra_composer.errors import UserError
from electra_composer.storage.remotes import readable, workspace_of

OUT = "s3://corpus/owt"
WORDS = [f"word{i}" for i in range(100)]


@pytest.fixture
def options(tmp_path, monkeypatch):
    """`options(out)` returns a conversion of a small corpus in four parts."""
    monkeypatch.setattr(source_parts, "MIN_PART", 45_000)
    monkeypatch.setattr("electra_composer.storage.remotes.tempfile.tempdir", str(tmp_path))
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + "." for _ in range(900)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    vocabulary = write_vocabulary(tmp_path, *WORDS)

    def make(out, **changes):
        changes = {"val_fraction": 0.05, "max_seq_length": 32, "overflow": "carry", "progress": False, **changes}
        return Conversion(Sources.of(str(tmp_path / "a.jsonl")), out, vocabulary, **changes)

    return make


def objects(s3):
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="corpus", Prefix="owt/")
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return {key.removeprefix("owt/"): s3.get_object(Bucket="corpus", Key=key)["Body"].read() for key in keys}


def check_same_as_local(s3, options, folder):
    """Assert that the uploaded files are those of a local conversion, byte for byte, apart from records."""
    convert(options(str(folder)))
    found = {name: data for name, data in objects(s3).items() if not name.startswith("records/")}
    # MDSWriter uploads an index for each part.
    parts = {name for name in found if name.count("/") == 2 and name.endswith("index.json")}
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.keys() - parts == expected.keys()
    assert all(found[name] == expected[name] for name in expected)


def test_the_same_shards_as_in_a_folder_and_the_trainer_reads_them(s3, options, tmp_path):
    summary = convert(options(OUT, workers=2))
    check_same_as_local(s3, options, tmp_path / "local")
    assert not list(tmp_path.glob("electra_composer-*"))  # the workspace is removed
    assert summary.shard_bytes >= sum(len(data) for name, data in objects(s3).items() if name.endswith(".mds"))
    rows = []
    for remote, path in ((OUT, tmp_path / "cache"), (None, tmp_path / "local")):
        config = ShardsConfig(path=str(path), max_seq_length=32, remote=remote, num_workers=0)
        loader = build_data_spec(config, "train", 8, read_meta(str(path), remote), seed=0).dataloader
        rows.append([row for batch in loader for row in batch["input_ids"].tolist()])
    assert rows[0] == rows[1]
    with pytest.raises(UserError, match="exists already; choose another --out, or remove it first"):
        convert(options(OUT, overwrite=True))


@pytest.mark.parametrize("machine", ["the same", "another"])
def test_an_interrupted_one_goes_on_even_on_another_machine(s3, options, tmp_path, monkeypatch, machine):
    run = Processes.convert

    def stop_after_one(self, plan, jobs, bar):
        yield from run(self, plan, jobs[:1], bar)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            convert(options(OUT))
    assert "meta.json" not in objects(s3)
    assert "train/index.json" not in objects(s3)
    with pytest.raises(UserError, match="no shards could be fetched"):
        read_meta(str(tmp_path / "cache"), OUT)
    if machine == "another":
        shutil.rmtree(f"{workspace_of(OUT)}.partial")
    summary = convert(options(OUT))
    assert 0.1 < summary.continued_tokens / summary.total.tokens < 0.5
    check_same_as_local(s3, options, tmp_path / "local")


def test_other_options_do_not_go_on_in_the_store_either(s3, options, monkeypatch):
    def stop(self, plan, jobs, bar):
        yield from ()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Processes, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(options(OUT))
    with pytest.raises(UserError, match="seed: 0 before, 1 now"):
        convert(options(OUT, seed=1))
    assert convert(options(OUT, seed=1, restart=True)).total.documents == 900


def test_azure_is_read_under_another_url(monkeypatch):
    """Streaming's uploader expects the container as host, its downloader as first folder."""
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", "account")
    assert readable("azure://container/owt") == "azure://account/container/owt"
    assert readable("azure-dl://container/owt") == "azure-dl://container/owt"
    assert readable(OUT) == OUT


def test_google_cloud_storage(gcs, options, tmp_path):
    """Another of Streaming's uploaders: write and read."""
    convert(options("gs://corpus/owt", workers=2))
    convert(options(str(tmp_path / "local")))
    found = {blob.name.removeprefix("owt/"): blob.download_as_bytes() for blob in gcs.list_blobs(prefix="owt/")}
    expected = {
        str(path.relative_to(tmp_path / "local")): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    assert found.keys() >= expected.keys()
    assert all(found[name] == expected[name] for name in expected)
    config = ShardsConfig(path=str(tmp_path / "cache"), max_seq_length=32, remote="gs://corpus/owt", num_workers=0)
    loader = build_data_spec(config, "train", 8, read_meta(config.path, config.remote), seed=0).dataloader
    assert sum(len(batch["input_ids"]) for batch in loader) > 100
    with pytest.raises(UserError, match=r"gs://no-such-bucket/owt: cannot be written to: .*the bucket"):
        convert(options("gs://no-such-bucket/owt"))


def test_a_store_that_fails_is_not_an_empty_one(s3, options, monkeypatch):
    """Otherwise an existing conversion would be overwritten."""
    convert(options(OUT))

    def fails(self, remote, local, timeout):
        raise ConnectionError("reset")

    monkeypatch.setattr("streaming.base.storage.download.S3Downloader._download_file_impl", fails)
    with pytest.raises(UserError, match=r"s3://corpus/owt/meta.json: the server does not answer \(reset\)"):
        convert(options(OUT))


def test_wrong_bucket_and_wrong_scheme(s3, options):
    with pytest.raises(UserError, match=r"s3://no-such-bucket/owt: cannot be written to: .*the bucket"):
        convert(options("s3://no-such-bucket/owt"))
    with pytest.raises(UserError, match=r"cannot write to ftp://; expected .* s3://, gs://"):
        convert(options("ftp://host/owt"))


def test_a_store_that_fails_in_the_middle(s3, options, monkeypatch):
    from electra_composer.corpus.part_writer import PartWriter

    finish = PartWriter.finish

    def without_bucket(self, record):
        if self._number == 2:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
            for writer in self._writers.values():
                writer.cloud_writer.remote = "s3://no-such-bucket/owt"
        return finish(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "finish", without_bucket)
        with pytest.raises(UserError, match=r"s3://corpus/owt: a shard could not be uploaded"):
            convert(options(OUT))
    assert "meta.json" not in objects(s3)
    assert convert(options(OUT)).continued_tokens > 0
