"""Recognize a folder of shards that an earlier conversion with the same plan has finished."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from electra_composer.corpus.workspace import INDEX, PLAN, has_moved
from electra_composer.errors import UserError
from electra_composer.storage.remotes import RemoteFolder
from electra_composer.storage.shard_folder import META, Meta

FORMS = ("raw_data", "zip_data")  # of a shard in an index; the other one is None


class Finished(NamedTuple):
    """A finished conversion."""

    meta: Meta
    bytes: int  # of the shards


def check_output(
    out: str, remote: str | None, overwrite: bool, plan: dict[str, Any] | None, workspace: str
) -> Finished | None:
    """Describe what a conversion with this plan has written to `out`; None if `out` is to be written.

    With `overwrite`, what is complete is written again, unless an interrupted conversion has only to be cleaned up.

    Args:
        out, remote: the output folder, and its URL in an object store.
        plan: of the conversion; None: it cannot be recognized.
        workspace: of the conversion.

    Raises:
        UserError: `out` exists, and may not be replaced; a shard in it is missing.
    """
    exists = os.path.lexists(out) if remote is None else RemoteFolder(remote).has(META)
    if not exists:
        return None
    if not overwrite or has_moved(workspace, remote):
        finished = find_finished(out, remote, plan)
        if finished is not None:
            return finished
    if remote is not None:
        raise UserError(
            f"{out} exists already; choose another --out, or remove it first: a folder in an object store cannot be "
            "replaced atomically"
        )
    if not overwrite:
        raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
    if not os.path.isfile(os.path.join(out, META)):
        raise UserError(f"{out} is not a folder of shards (no {META}), so --overwrite does not replace it")
    return None


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
