"""Object stores as a place to write to, by Streaming's uploaders and downloaders."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import urllib.parse

from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import UPLOADERS, CloudUploader

from electra_composer.errors import UserError
from electra_composer.storage.object_store import download_whole, explain, is_not_there

# Its uploaders are given folders that have files in them, on purpose; it warns of each.
logging.getLogger("streaming.base.storage.upload").addFilter(
    lambda record: "exists and not empty" not in record.getMessage()
)

SECONDS = 60.0  # for a file of a conversion to come


def is_remote(out: str) -> bool:
    """Whether a path is a URL of an object store.

    Raises:
        UserError: of a kind that Streaming does not upload to.
    """
    scheme = urllib.parse.urlparse(out).scheme
    if "://" in out and scheme not in UPLOADERS:
        raise UserError(f"{out}: shards can be written to {', '.join(f'{name}://' for name in UPLOADERS if name)} …")
    return "://" in out


def workspace_of(remote: str) -> str:
    """Where files of a conversion into an object store are kept while it runs, always the same for the same store."""
    digest = hashlib.sha256(remote.encode()).hexdigest()[:12]
    return os.path.join(tempfile.gettempdir(), f"electra_composer-{os.getuid()}-{digest}")


def readable(remote: str) -> str:
    """The URL by which Streaming's downloaders read what its uploaders wrote under another.

    They are the same but for Azure's blobs: `azure://container/…` is written, `azure://account/container/…` is read.
    """
    scheme, _, rest = remote.partition("://")
    if scheme != "azure":
        return remote
    return f"azure://{os.environ.get('AZURE_ACCOUNT_NAME', 'account')}/{rest}"


class RemoteFolder:
    """A folder in an object store.

    Raises:
        UserError: the bucket is not there, or may not be used; the client library of this kind is missing.
    """

    def __init__(self, remote: str) -> None:
        self._remote = remote
        with tempfile.TemporaryDirectory() as scratch:
            _uploader(scratch, remote)  # asks for the bucket
        self._readable = readable(remote)
        self._downloader = CloudDownloader.get(self._readable)

    def has(self, name: str) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            return self.fetch(name, scratch)

    def fetch(self, name: str, folder: str) -> bool:
        """Fetch a file to its place in a local folder; whether it was there.

        Raises:
            UserError: whether it is there could not be found out.
        """
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            download_whole(self._downloader, f"{self._readable}/{name}", path, SECONDS)
        except Exception as error:  # every storage client has errors of its own
            if is_not_there(error):
                return False
            raise UserError(f"{self._remote}/{name}: {explain(error, self._remote)}") from error
        return True


def upload(local: str, remote: str, *names: str) -> None:
    """Upload files of a folder under their names, and keep them here.

    Raises:
        UserError: the remote does not take them.
    """
    uploader = _uploader(local, remote)
    try:
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # every storage client has errors of its own
        raise _not_writable(remote, error) from error


def _uploader(local: str, remote: str) -> CloudUploader:
    try:
        return CloudUploader.get((local, remote), keep_local=True, exist_ok=True)
    except Exception as error:  # every storage client has errors of its own
        raise _not_writable(remote, error) from error


def _not_writable(remote: str, error: Exception) -> UserError:
    return UserError(f"{remote}: cannot be written to: {explain(error, remote)}")
