"""Object stores as a place to write to, by Streaming's uploaders and downloaders."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.parse

from streaming.base.storage.download import CloudDownloader
from streaming.base.storage.upload import UPLOADERS, CloudUploader

from electra_composer.errors import UserError


def is_remote(out: str) -> bool:
    """Whether a path is a URL of an object store.

    Raises:
        UserError: of a kind that Streaming does not upload to.
    """
    scheme = urllib.parse.urlparse(out).scheme
    if "://" in out and scheme not in UPLOADERS:
        raise UserError(f"{out}: shards can be written to {', '.join(f'{name}://' for name in UPLOADERS if name)} …")
    return "://" in out


def remote_has(remote: str, name: str, local: str | None = None) -> bool:
    """Whether a file is in an object store; if `local` is a folder, it is fetched to its place in there.

    Raises:
        UserError: the bucket is not there, or may not be used.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(local or scratch, name)
        try:
            CloudUploader.get((scratch, remote), exist_ok=True)  # asks for the bucket
        except Exception as error:  # every storage client has errors of its own
            raise UserError(f"{remote}: cannot be written to: {' '.join(str(error).split())}") from error
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            CloudDownloader.direct_download(f"{remote}/{name}", path)
        except Exception:  # not there, each client in its own words
            return False
        return True


def workspace_of(remote: str) -> str:
    digest = hashlib.sha256(remote.encode()).hexdigest()[:12]
    return os.path.join(tempfile.gettempdir(), f"electra_composer-{digest}")


def upload(local: str, remote: str, *names: str) -> None:
    """Upload files of a folder under their names, and keep them here.

    Raises:
        UserError: the remote does not take them.
    """
    try:
        uploader = CloudUploader.get((local, remote), keep_local=True, exist_ok=True)
        for name in names:
            uploader.upload_file(name)
    except Exception as error:  # every storage client has errors of its own
        raise UserError(f"{remote}: cannot be written to: {' '.join(str(error).split())}") from error
