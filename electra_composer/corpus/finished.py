"""Recognize a folder of shards that an earlier conversion with the same plan has finished."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from electra_composer.corpus.workspace import INDEX, PLAN
from electra_composer.errors import UserError
from electra_composer.storage.remotes import RemoteFolder
from electra_composer.storage.shard_folder import META, Meta

FORMS = ("raw_data", "zip_data")  # of a shard in an index; the other one is None


class Finished(NamedTuple):
    """A finished conversion."""

    meta: Meta
    bytes: int  # of the shards


def exists(out: str, remote: str | None) -> bool:
    """Return whether there is anything at `out`, or a complete folder in an object store."""
    return os.path.lexists(out) if remote is None else RemoteFolder(remote).has(META)


def find_finished(out: str, remote: str | None, plan: dict[str, Any] | None) -> Finished | None:
    """Describe `out` if a conversion with this plan has written it; None for another plan or kind of folder.

    Raises:
        UserError: a shard is missing, or the object store could not be read.
    """
    if plan is None:
        return None
    with contextlib.ExitStack() as stack:
        folder = out if remote is None else stack.enter_context(tempfile.TemporaryDirectory())
        store = None if remote is None else RemoteFolder(remote)

        def read(name: str) -> Any:
            if store is not None:
                store.fetch(name, folder)
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                return json.load(file)

        try:
            if read(PLAN) != plan:
                return None
            meta = Meta.from_json(json.dumps(read(META)), out)
            shards = {split: read(os.path.join(split, INDEX))["shards"] for split in meta.splits}
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
            return None
    if remote is None:
        for split, found in shards.items():
            check_shards(os.path.join(out, split), found, "--overwrite")
    return Finished(meta, sum(shard_bytes(shard) for found in shards.values() for shard in found))


def check_shards(folder: str, shards: Iterable[dict[str, Any]], option: str) -> None:
    """Raise a UserError that advises `option` unless all shards of an index are in a folder."""
    for shard in shards:
        names = [shard[form]["basename"] for form in FORMS if shard[form] is not None]
        if not any(os.path.isfile(os.path.join(folder, name)) for name in names):  # either raw or compressed
            raise UserError(f"{folder}/{names[-1]} is missing; pass {option} to convert everything again")


def shard_bytes(shard: dict[str, Any]) -> int:
    """Return the size of a shard as it is stored, from its entry in an index."""
    return int((shard["zip_data"] or shard["raw_data"])["bytes"])
