"""Downloads from object stores, and explanations of their errors."""

from __future__ import annotations

import os

import pytest

from electra_composer.storage.object_store import download_atomically, explain


class WritesInPlace:
    """Writes under the final name, as Streaming's GCSDownloader does."""

    def __init__(self, *pieces):
        self.pieces, self.seen = pieces, []

    def download(self, remote, local, timeout):
        with open(local, "xb", buffering=0) as file:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                file.write(piece)
                self.seen.append(os.path.exists(remote))


def test_a_download_has_its_name_when_it_is_whole(tmp_path):
    path = str(tmp_path / "shard")
    with pytest.raises(ConnectionError):
        download_atomically(WritesInPlace(b"half", ConnectionError()), path, path, 1.0)
    assert os.listdir(tmp_path) == []
    (tmp_path / f"shard.{os.getpid()}.unfinished").write_text("of a process that was killed")
    downloader = WritesInPlace(b"half", b" and half")
    download_atomically(downloader, path, path, 1.0)
    assert downloader.seen == [False, False]
    assert os.listdir(tmp_path) == ["shard"]
    assert (tmp_path / "shard").read_bytes() == b"half and half"
    download_atomically(WritesInPlace(b"other"), path, path, 1.0)  # it exists already
    assert (tmp_path / "shard").read_bytes() == b"half and half"


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (type("DefaultCredentialsError", (Exception,), {})("long text"), "no credentials were found"),
        (type("Forbidden", (Exception,), {"code": 403})("no"), "the server refuses access"),
        (type("HttpResponseError", (Exception,), {"status_code": 404})("no"), "there is no such file"),
        (ModuleNotFoundError("No module named 'oci'"), "install that package to read from gs://"),
        (ValueError("something\n else"), "something else"),
    ],
)
def test_errors_of_other_stores(error, meaning):
    assert meaning in explain(error, "gs://bucket/owt")
