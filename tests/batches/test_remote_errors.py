"""Object stores that are misconfigured or do not answer are reported in one line that says what to check."""

from __future__ import annotations

import socket
import time
import urllib.request

import pytest
from batch_loaders import BUCKET, loader_of

from electra_composer.batches.shards import read_data
from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError


def complaint(seconds, make, *arguments, **options):
    """Return the message of the UserError that `make` raises within `seconds`."""
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        make(*arguments, **options)
    assert time.monotonic() - start < seconds
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("place", ["s3://no-such-bucket/owt", f"s3://{BUCKET}/nothing"])
def test_a_wrong_place_is_said(s3, tmp_path, place):
    said = complaint(20, loader_of, tmp_path / "cache", place)
    assert f"no shards could be fetched from {place}" in said
    assert "the bucket or the folder is wrong" in said
    assert not (tmp_path / "cache/meta.json").exists()


def demand_credentials(s3_endpoint, after):
    """Make moto check credentials after it has answered `after` more calls without."""
    request = urllib.request.Request(
        f"{s3_endpoint}/moto-api/reset-auth", data=after, method="POST", headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()


@pytest.fixture
def guarded(s3_endpoint, remote):
    """The remote shards, on a server that rejects the credentials of the tests."""
    demand_credentials(s3_endpoint, b"0")
    yield remote
    demand_credentials(s3_endpoint, b"inf")


def test_wrong_credentials_are_said(guarded, tmp_path):
    said = complaint(20, loader_of, tmp_path / "cache", guarded)
    assert "the server refuses access" in said
    assert "AWS_ACCESS_KEY_ID" in said


def test_credentials_that_no_longer_hold_are_said_at_a_shard(s3_endpoint, remote, tmp_path):
    loader = loader_of(tmp_path / "cache", remote, predownload=1, download_attempts=3)
    batches = iter(loader)
    next(batches)
    demand_credentials(s3_endpoint, b"0")
    try:
        said = complaint(60, list, batches)
    finally:
        demand_credentials(s3_endpoint, b"inf")
    assert "the server refuses access" in said
    assert "shard.000" in said


def test_no_credentials_are_said(remote, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = complaint(20, loader_of, tmp_path / "cache", remote)
    assert "no credentials were found" in said
    assert "AWS_ACCESS_KEY_ID" in said


def test_a_server_that_is_not_there_is_said(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    said = complaint(30, loader_of, tmp_path / "cache", "s3://corpus/owt")
    assert "the server does not answer" in said
    assert "S3_ENDPOINT_URL" in said


def test_a_server_that_says_nothing_is_given_up(s3, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
        config = ShardsConfig(path=str(tmp_path / "c"), max_seq_length=32, remote="s3://a/b", download_timeout=1.0)
        assert "no answer within 1 s" in complaint(15, read_data, config)


def test_a_split_that_was_not_copied_is_said(s3, remote, tmp_path):
    s3.delete_object(Bucket=BUCKET, Key="owt/train/index.json")
    said = complaint(30, loader_of, tmp_path / "cache", remote)
    assert "the shards of split 'train' cannot be opened: there is no such file" in said


def test_a_cache_that_is_the_remote_itself(many_shards):
    config = ShardsConfig(path=str(many_shards), max_seq_length=32, remote=f"{many_shards}/")
    with pytest.raises(UserError, match="is its cache, and must be another folder"):
        read_data(config)
