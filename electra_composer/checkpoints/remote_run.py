"""Copy of a run's folder in an object store.

An object store cannot rename, and deleting needs more permissions than writing. Files are therefore uploaded first;
then a single object, `latest.json`, names them with their sizes, so that everything it names is complete. Composer's
object stores do the transfers.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from composer.utils import ObjectStore, maybe_create_object_store_from_uri

from electra_composer.checkpoints.saving import checkpoint_batch
from electra_composer.errors import UserError
from electra_composer.storage.object_store import answer, explain
from electra_composer.storage.shard_folder import is_inside

T = TypeVar("T")

INDEX = "latest.json"
SINGLE_FILE = "checkpoint.pt"  # object name of a checkpoint that is a single file
FILES = "files"  # prefix of the run's other files: configuration, metrics, records of numerical trouble
TIMEOUT = 60.0  # seconds for the store's first answer


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in the store.

    Attributes:
        name: Name of the file or folder in the run's folder.
        place: Prefix of the object names.
        files: Object names below the prefix → bytes: the files of a sharded checkpoint, or `checkpoint.pt`.
    """

    name: str
    place: str
    files: dict[str, int]

    @property
    def batch(self) -> int:
        batch = checkpoint_batch(self.name)
        assert batch is not None
        return batch

    @property
    def is_milestone(self) -> bool:
        return self.name.startswith("milestone-")


@dataclass(frozen=True)
class RemoteIndex:
    """Content of `latest.json`: the run's name, its checkpoints, newest first, and its other files (name → bytes)."""

    run_name: str
    checkpoints: list[StoredCheckpoint] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format_version": 1, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RemoteIndex:
        """Parse and check.

        Raises:
            KeyError, TypeError, ValueError: Not written by `to_json`, or with names that lead out of a folder.
        """
        values = json.loads(text)
        if values["format_version"] != 1:
            raise ValueError(f"format_version is {values['format_version']}; this program reads 1")
        index = cls(
            str(values["run_name"]),
            [StoredCheckpoint(**stored) for stored in values["checkpoints"]],
            {name: int(size) for name, size in values["files"].items()},
        )
        for stored in index.checkpoints:
            for name in (stored.name, stored.place):
                if not is_inside(name) or os.path.basename(name) != name:
                    raise ValueError(f"{name!r} is not a plain name")
            if checkpoint_batch(stored.name) is None:
                raise ValueError(f"{stored.name!r} is not the name of a checkpoint")
        for name in [*index.files, *(name for stored in index.checkpoints for name in stored.files)]:
            if not is_inside(name):
                raise ValueError(f"{name!r} leads out of the folder")
        return index


class RemoteRun:
    """A run's folder in an object store, read and written by rank 0.

    Args:
        remote: `s3://bucket/folder`, or another URI that Composer has an object store for.

    Raises:
        UserError: Unknown kind of store, missing package of its client, or no credentials.
    """

    def __init__(self, remote: str) -> None:
        self.remote = remote.rstrip("/")
        self._store = self._answer(lambda: _object_store(self.remote))
        self._prefix = _object_prefix(self._store, self.remote)

    def read(self) -> RemoteIndex | None:
        """Read the index; None if there is none yet.

        Raises:
            UserError: No answer, access denied, no such bucket, or an invalid `latest.json`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, INDEX)
            try:
                self._answer(lambda: self._store.download_object(self._prefix + INDEX, path))
            except UserError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return None
                raise
            try:
                with open(path, encoding="utf-8") as file:
                    return RemoteIndex.from_json(file.read())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"checkpoints.remote: {self.remote}/{INDEX} was not written by pretrain.py "
                    f"({type(error).__name__}: {error}); set another checkpoints.remote"
                ) from error

    def write(self, index: RemoteIndex) -> None:
        """Replace the index. Exceptions of the store's client pass through."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, INDEX)
            with open(path, "w", encoding="utf-8") as file:
                file.write(index.to_json())
            self.upload(INDEX, path)

    def claim(self, index: RemoteIndex) -> None:
        """Write the index before training, to detect a store that cannot be written to.

        Raises:
            UserError: It cannot.
        """
        self._answer(lambda: self.write(index))

    def upload(self, name: str, path: str) -> None:
        """Upload a file. Exceptions of the store's client pass through."""
        self._store.upload_object(self._prefix + name, path)

    def download(self, name: str, path: str) -> int:
        """Download an object to a file and return its size in bytes.

        Raises:
            UserError: No such object, access denied, or another error of the store.
            OSError: The file cannot be written.
        """
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            self._store.download_object(self._prefix + name, path, overwrite=True)
        except Exception as error:  # each storage client has its own classes
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # of the local disk
            raise UserError(f"checkpoints.remote: {self.remote}: {explain(error, self.remote)}") from error
        return os.path.getsize(path)

    def _answer(self, ask: Callable[[], T]) -> T:
        try:
            return answer(self.remote, TIMEOUT, ask)
        except UserError as error:
            raise UserError(f"checkpoints.remote: {error}") from error.__cause__


def _object_store(remote: str) -> ObjectStore:
    store = maybe_create_object_store_from_uri(remote)
    if store is None:
        raise ValueError("not the URL of an object store, such as s3://bucket/folder")
    return store


# Workaround (composer 0.32): S3ObjectStore puts the URI's folder before object names, other stores may not; goes when
# all of them do the same.
def _object_prefix(store: ObjectStore, remote: str) -> str:
    """Return what must stand before the names of a folder's objects."""
    if store.get_uri(INDEX) == f"{remote}/{INDEX}":
        return ""
    return remote.partition("://")[2].partition("/")[2] + "/"
