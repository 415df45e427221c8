"""Training from an object store, against a real S3 server on this machine; and what it does when that fails."""

from __future__ import annotations

import http.server
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from streaming import LocalDataset, MDSWriter

from electra_composer.config import ShardsConfig
from electra_composer.errors import UserError
from electra_composer.shards import build_data_spec, read_meta

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

BUCKET = "corpus"


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint, monkeypatch):
    for name, value in {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


@pytest.fixture(scope="module")
def many_shards(shards, tmp_path_factory):
    """The shards of the small language again, in a dozen files."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    shutil.copytree(shards, folder)
    for split in ("train", "val"):
        rows = list(LocalDataset(local=str(shards), split=split))
        shutil.rmtree(folder / split)
        columns = {"input_ids": "ndarray:uint16", "segment_lengths": "ndarray:uint16"}
        with MDSWriter(columns=columns, out=str(folder / split), size_limit=1500, hashes=["xxh64"]) as writer:
            for row in rows:
                writer.write(row)
    assert len(list((folder / "train").glob("*.mds"))) > 10
    return folder


@pytest.fixture
def remote(client, many_shards):
    for path in sorted(many_shards.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"owt/{path.relative_to(many_shards)}")
    return f"s3://{BUCKET}/owt"


def loader_of(cache, remote, split="train", **changes):
    options = {"num_workers": 0, "download_attempts": 1, "download_timeout": 10.0, **changes}
    config = ShardsConfig(path=str(cache), max_seq_length=32, remote=remote, **options)
    return build_data_spec(config, split, 8, read_meta(str(cache), remote), seed=3).dataloader


def rows_of(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_rows_as_from_the_disk(remote, many_shards, tmp_path, workers):
    local = ShardsConfig(path=str(many_shards), max_seq_length=32, num_workers=workers)
    expected = rows_of(build_data_spec(local, "train", 8, read_meta(str(many_shards)), seed=3).dataloader)
    loader = loader_of(tmp_path / "cache", remote, num_workers=workers)
    assert rows_of(loader) == expected
    assert len(rows_of(loader)) == len(expected)  # the next epoch, from the cache
    assert len(list((tmp_path / "cache/train").glob("*.mds"))) == len(list((many_shards / "train").glob("*.mds")))


def test_no_more_is_kept_than_the_cache_may_hold(remote, many_shards, tmp_path):
    loader = loader_of(tmp_path / "cache", remote, cache_limit="12kb", predownload=8)
    seen, most = 0, 0
    for batch in loader:
        seen += len(batch["input_ids"])
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache/train").glob("*.mds")))
    assert seen == 8 * (read_meta(str(many_shards)).splits["train"].rows // 8)
    assert most <= 12 * 1024
    assert sum(path.stat().st_size for path in (many_shards / "train").glob("*.mds")) > 12 * 1024


def test_shards_are_fetched_no_further_ahead_than_said(remote, tmp_path):
    loader = loader_of(tmp_path / "cache", remote, predownload=1)
    next(iter(loader))
    time.sleep(0.5)
    few = len(list((tmp_path / "cache/train").glob("*.mds")))
    eager = loader_of(tmp_path / "eager", remote)
    next(iter(eager))
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "eager/train").glob("*.mds"))) <= few:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_shard_is_named(client, remote, tmp_path, workers):
    client.delete_object(Bucket=BUCKET, Key="owt/train/shard.00003.mds")
    start = time.monotonic()
    with pytest.raises(
        UserError if not workers else Exception, match=r"owt/train/shard\.000\d+\.mds: the shard cannot"
    ):
        rows_of(loader_of(tmp_path / "cache", remote, num_workers=workers))
    assert time.monotonic() - start < 30


def test_a_corrupt_shard_is_found_by_its_hash(client, remote, many_shards, tmp_path):
    data = bytearray((many_shards / "train/shard.00002.mds").read_bytes())
    data[-3] ^= 1
    client.put_object(Bucket=BUCKET, Key="owt/train/shard.00002.mds", Body=bytes(data))
    with pytest.raises(UserError, match=r"(?i)the shard cannot be fetched or unpacked: .*checksum"):
        rows_of(loader_of(tmp_path / "cache", remote))


@pytest.mark.parametrize("place", ["s3://no-such-bucket/owt", f"s3://{BUCKET}/nothing"])
def test_a_wrong_place_is_said(client, tmp_path, place):
    with pytest.raises(UserError, match=f"no shards could be fetched from {place}"):
        loader_of(tmp_path / "cache", place)
    assert not (tmp_path / "cache/meta.json").exists()


class Proxy:
    """Between a client and the server: may be slow, or closed for a time."""

    def __init__(self, target):
        outer = self
        self.delay, self.closed, self.refused = 0.0, False, 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                time.sleep(outer.delay)
                if outer.closed:
                    outer.refused += 1
                    self.send_error(503)
                    return
                request = urllib.request.Request(target + self.path, method=self.command, headers=dict(self.headers))
                try:
                    with urllib.request.urlopen(request) as answer:
                        status, headers, body = answer.status, answer.headers, answer.read()
                except urllib.error.HTTPError as error:
                    status, headers, body = error.code, error.headers, error.read()
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def proxy(endpoint, client, monkeypatch):
    proxy = Proxy(endpoint)
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.url)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


def test_a_slow_server_is_waited_for(proxy, remote, many_shards, tmp_path):
    proxy.delay = 0.1
    assert len(rows_of(loader_of(tmp_path / "cache", remote))) > 50


@pytest.mark.slow
def test_a_server_that_comes_back_is_asked_again(proxy, remote, tmp_path):
    loader = loader_of(tmp_path / "cache", remote, download_attempts=5, predownload=1)
    batches = iter(loader)
    first = next(batches)
    proxy.closed = True
    threading.Timer(2.0, lambda: setattr(proxy, "closed", False)).start()
    rest = list(batches)
    assert proxy.refused > 0
    expected = rows_of(loader_of(tmp_path / "other", remote))
    assert rows_of([first, *rest]) == expected


def test_a_server_that_stays_away_ends_the_run(proxy, remote, tmp_path):
    loader = loader_of(tmp_path / "cache", remote, predownload=1)
    batches = iter(loader)
    next(batches)
    proxy.closed = True
    with pytest.raises(UserError, match="the shard cannot be fetched"):
        list(batches)


def test_no_temporary_file_is_left(remote, tmp_path):
    rows_of(loader_of(tmp_path / "cache", remote))
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]
    assert Path(tmp_path / "cache/tokenizer").is_dir()
