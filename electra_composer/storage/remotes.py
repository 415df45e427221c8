"""Write to object stores with Streaming's uploaders."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import urllib.parse

from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import UPLOADERS, CloudUploader

from electra_composer.errors import UserError
from electra_composer.storage.object_store import download_atomically, explain, is_not_there

# Workaround (streaming 0.13): an uploader warns if its local folder has files, which it always has here; goes when
# exist_ok=True silences the warning.
logging.getLogger("streaming.base.storage.upload").addFilter(
    lambda record: "exists and not empty" not in record.getMessage()
)

SECONDS = 60.0  # download timeout for a file of a conversion


def is_remote(out: str) -> bool:
    """Return whether a path is a URL of an object store.

    Raises:
        UserError: Streaming cannot upload to this kind of store.
    """
    scheme = urllib.parse.urlparse(out).scheme
    if "://" in out and scheme not in UPLOADERS:
        schemes = ", ".join(f"{name}://" for name in UPLOADERS if name)
        raise UserError(f"{out}: cannot write to {scheme}://; expected a folder or one of {schemes}")
    return "://" in out


def workspace_of(remote: str) -> str:
    """Return the local folder for the files of a conversion into an object store, always the same for one URL."""
    digest = hashlib.sha256(remote.encode()).hexdigest()[:12]
    return os.path.join(tempfile.gettempdir(), f"electra_composer-{os.getuid()}-{digest}")


# Workaround (streaming 0.13): uploaders take Azure blobs as `azure://container/…`, downloaders take the same blobs as
# `azure://account/container/…`; goes when both take one URL.
def readable(remote: str) -> str:
    """Return the URL under which Streaming's downloaders find what its uploaders wrote to `remote`."""
    scheme, _, rest = remote.partition("://")
    if scheme != "azure":
        return remote
    return f"azure://{os.environ.get('AZURE_ACCOUNT_NAME', 'account')}/{rest}"


class RemoteFolder:
    """A folder in an object store.

    Raises:
        UserError: the bucket does not exist or access is refused; or the client library is not installed.
    """

    def __init__(self, remote: str) -> None:
        self._remote = remote
        with tempfile.TemporaryDirectory() as scratch:
            upload(scratch, remote)  # no files; checks that the bucket exists
        self._readable = readable(remote)
        self._downloader = CloudDownloader.get(self._readable)

    def has(self, name: str) -> bool:
        with tempfile.TemporaryDirectory() as scratch:
            return self.fetch(name, scratch)

    def fetch(self, name: str, folder: str) -> bool:
        """Fetch a file into a local folder under its name; return whether it exists.

        Raises:
            UserError: the store could not be read.
        """
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            download_atomically(self._downloader, f"{self._readable}/{name}", path, SECONDS)
        except Exception as error:  # each storage client raises its own types
            if is_not_there(error):
                return False
            raise UserError(f"{self._remote}/{name}: {explain(error, self._remote)}") from error
        return True


def upload(local: str, remote: str, *names: str) -> None:
    """Upload files of a folder under their names, and keep the local files.

    Raises:
        UserError: the upload failed.
    """
    try:
        uploader = CloudUploader.get((local, remote), keep_local=True, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # each storage client raises its own types
        raise UserError(f"{remote}: cannot be written to: {explain(error, remote)}") from error
