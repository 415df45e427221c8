"""A run's folder in an object store: what is named there is whole.

Nothing can be renamed in an object store, and deleting needs rights that writing does not. So files are uploaded first,
and then `latest.json`, a single object, names them with their sizes. Composer's own object stores do the work.
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

POINTER = "latest.json"
WHOLE = "checkpoint.pt"  # the object of a checkpoint that is one file
FILES = "files"  # before what a run's folder has beside checkpoints: configuration, metrics, records of trouble
SECONDS = 60.0  # for the store's first answer


@dataclass(frozen=True)
class Stored:
    """A checkpoint in the store.

    Attributes:
        name: of the file or folder in the run's folder.
        place: before the names of its objects.
        files: names of its objects there → bytes: those of the files in its folder, or `checkpoint.pt`.
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
class Contents:
    """`latest.json`: a run, its checkpoints from the newest on, and its other files (name → bytes)."""

    run_name: str
    checkpoints: list[Stored] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format_version": 1, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Contents:
        """Raises KeyError, TypeError or ValueError on what `to_json` would not write, or names outside of a folder."""
        values = json.loads(text)
        if values["format_version"] != 1:
            raise ValueError(f"format_version is {values['format_version']}; this program reads 1")
        contents = cls(
            str(values["run_name"]),
            [Stored(**stored) for stored in values["checkpoints"]],
            {name: int(size) for name, size in values["files"].items()},
        )
        for stored in contents.checkpoints:
            for name in (stored.name, stored.place):
                if not is_inside(name) or os.path.basename(name) != name:
                    raise ValueError(f"{name!r} is no plain name")
            if checkpoint_batch(stored.name) is None:
                raise ValueError(f"{stored.name!r} is no name of a checkpoint")
        for name in [*contents.files, *(name for stored in contents.checkpoints for name in stored.files)]:
            if not is_inside(name):
                raise ValueError(f"{name!r} leads out of the folder")
        return contents


class RemoteRun:
    """A run's folder in an object store. The first process of the run reads and writes it.

    Args:
        remote: `s3://bucket/folder`, or what else Composer has an object store for.

    Raises:
        UserError: no such kind of store, its client's package is missing, no credentials.
    """

    def __init__(self, remote: str) -> None:
        self.remote = remote.rstrip("/")
        self._store = self._answer(lambda: _store_of(self.remote))
        self._prefix = _prefix_of(self._store, self.remote)

    def read(self) -> Contents | None:
        """What is there; None: nothing yet.

        Raises:
            UserError: no answer, access refused, no such bucket; or a `latest.json` that is not ours.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, POINTER)
            try:
                self._answer(lambda: self._store.download_object(self._prefix + POINTER, path))
            except UserError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    return None
                raise
            try:
                with open(path, encoding="utf-8") as file:
                    return Contents.from_json(file.read())
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"checkpoints.remote: {self.remote}/{POINTER} is not one that pretrain.py wrote "
                    f"({type(error).__name__}: {error}); give another place"
                ) from error

    def write(self, contents: Contents) -> None:
        """Name what is there. Raises what the store's client raises."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, POINTER)
            with open(path, "w", encoding="utf-8") as file:
                file.write(contents.to_json())
            self._store.upload_object(self._prefix + POINTER, path)

    def claim(self, contents: Contents) -> None:
        """`write`, before training, so that a place that does not take anything is known at once.

        Raises:
            UserError: it does not.
        """
        self._answer(lambda: self.write(contents))

    def upload(self, name: str, path: str) -> None:
        """Raises what the store's client raises."""
        self._store.upload_object(self._prefix + name, path)

    def download(self, name: str, path: str) -> int:
        """Fetch an object into a file; its size in bytes.

        Raises:
            UserError: it is not there, access is refused, …
        """
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            self._store.download_object(self._prefix + name, path, overwrite=True)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise  # of the disk here
            raise self._says(error) from error
        except Exception as error:  # every storage client has errors of its own
            raise self._says(error) from error
        return os.path.getsize(path)

    def _answer(self, ask: Callable[[], T]) -> T:
        try:
            return answer(self.remote, SECONDS, ask)
        except UserError as error:
            raise UserError(f"checkpoints.remote: {error}") from error.__cause__

    def _says(self, error: Exception) -> UserError:
        return UserError(f"checkpoints.remote: {self.remote}: {explain(error, self.remote)}")


def _store_of(remote: str) -> ObjectStore:
    store = maybe_create_object_store_from_uri(remote)
    if store is None:
        raise ValueError("it is no URL of an object store, such as s3://bucket/folder")
    return store


def _prefix_of(store: ObjectStore, remote: str) -> str:
    """What stands before the names of a folder's objects. Composer's S3 store has the folder in it, others may not."""
    if store.get_uri(POINTER) == f"{remote}/{POINTER}":
        return ""
    return remote.partition("://")[2].partition("/")[2] + "/"
