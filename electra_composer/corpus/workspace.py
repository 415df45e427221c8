"""The folder where a conversion keeps its parts until all of them are complete, and what a later run resumes from.

    <workspace>/plan.json                  the options and source files that determine the shards
    <workspace>/unfinished/00003/<split>/  a part while it is written
    <workspace>/whole/<split>/00003/       shards of a complete part; `whole` becomes the output folder
    <workspace>/records/00003.json         written last: a part with a record is complete

With a remote, shards, records and plan are also uploaded to `<remote>/<split>/00003/`, `<remote>/records/` and
`<remote>/plan.json`, each as soon as it is written; only records and plan are kept on the local disk. What the remote
says of the plan counts: the folder may have been removed there, or started over by another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from electra_composer.atomic_files import remove, write_file
from electra_composer.errors import UserError
from electra_composer.storage.remotes import RemoteFolder, upload

UNFINISHED, WHOLE, RECORDS = "unfinished", "whole", "records"
INDEX, PLAN = "index.json", "plan.json"
MAX_MISSES = 32  # consecutive parts without a record after which a remote has no more; exceeds the parts run at a time


def open_workspace(
    workspace: str, remote: str | None, plan: dict[str, Any] | None, restart: bool
) -> dict[int, dict[str, Any]]:
    """Prepare a workspace, and return the records of its complete parts by part number.

    Args:
        plan: determines the contents of the shards; None: remove what an earlier conversion left.
        restart: remove it even if its plan is the same.

    Raises:
        UserError: the workspace holds parts of another plan, or something that no conversion has written.
    """
    plan_file = os.path.join(workspace, PLAN)
    ours = plain(plan)
    has_plan = plan is not None and not restart and _has_plan(workspace, remote)
    if not has_plan or (remote is None and has_moved(workspace, remote)):
        if os.path.lexists(workspace) and not is_workspace(workspace):
            raise UserError(
                f"{workspace} exists, and is not of a conversion (no {PLAN}): move it, or choose another --out"
            )
        remove(workspace)
        write_json(plan_file, ours)
        if remote is not None:
            upload(workspace, remote, PLAN)
        return {}
    with open(plan_file, encoding="utf-8") as file:
        theirs = json.load(file)
    if theirs != ours:
        changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        changes = ", ".join(f"{key}: {theirs.get(key)} before, {ours.get(key)} now" for key in changed)
        raise UserError(
            f"{workspace} holds an unfinished conversion with other options or sources ({_shorten(changes)}); repeat "
            "its options to resume it, pass --restart to discard it, or choose another --out"
        )
    shutil.rmtree(os.path.join(workspace, UNFINISHED), ignore_errors=True)
    records, digest = {}, plan_digest(ours)
    for path in record_files(workspace):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("plan", digest) == digest:
            records[int(path.stem)] = record
        else:  # left in the remote by a conversion that was started over with another plan
            path.unlink()
    for folder in list(Path(workspace, WHOLE).glob("*/[0-9]*")):
        if int(folder.name) not in records:  # moved there, but killed before its record was written
            shutil.rmtree(folder)
    return records


def is_workspace(path: str) -> bool:
    """Return whether a conversion has created this folder, so that it may be removed: its first file is the plan."""
    if os.path.islink(path) or not os.path.isdir(path):
        return False
    names = os.listdir(path)
    return PLAN in names or all(PLAN in name for name in names)  # killed while the plan was written


def record_file(workspace: str, number: int) -> str:
    """Return the path of the record of a part."""
    return os.path.join(workspace, RECORDS, f"{part_name(number)}.json")


def remove_part(workspace: str, number: int) -> None:
    """Remove a complete part: first its record."""
    os.remove(record_file(workspace, number))
    for part in Path(workspace, WHOLE).glob(f"*/{part_name(number)}"):
        shutil.rmtree(part)


def missing_folders(path: str) -> list[str]:
    """Return a folder and those around it that do not exist, inner ones first."""
    return [] if os.path.isdir(path) else [path, *missing_folders(os.path.dirname(path))]


def record_files(workspace: str) -> list[Path]:
    """List the records of all complete parts, including those written by processes that were killed since."""
    return sorted(Path(workspace, RECORDS).glob("[0-9]*.json"))


def has_moved(workspace: str, remote: str | None) -> bool:
    """Return whether all parts were complete and moved to the output folder, or belong to one in an object store."""
    return bool(record_files(workspace)) and (remote is not None or not os.path.isdir(os.path.join(workspace, WHOLE)))


def _has_plan(workspace: str, remote: str | None) -> bool:
    """Return whether there is a conversion to resume, after fetching plan and records if only the remote has them."""
    path = os.path.join(workspace, PLAN)
    was_here = os.path.isfile(path)
    if remote is None:
        return was_here
    folder = RemoteFolder(remote)
    with tempfile.TemporaryDirectory() as scratch:
        if not folder.fetch(PLAN, scratch):
            return False
        write_file(path, Path(scratch, PLAN).read_bytes())
    if was_here:
        return True
    number = misses = 0
    while misses < MAX_MISSES:  # parts finish roughly in the order of their numbers
        found = folder.fetch(f"{RECORDS}/{part_name(number)}.json", workspace)
        misses = 0 if found else misses + 1
        number += 1
    return True


def part_name(number: int) -> str:
    return f"{number:05}"


def plain(value: Any) -> Any:
    """Return a value as JSON keeps it: tuples as lists, keys as text and sorted."""
    return json.loads(json.dumps(value, sort_keys=True))


def plan_digest(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: str, value: Any) -> None:
    """Write a JSON file atomically and durably."""
    write_file(path, json.dumps(value, sort_keys=True))


def _shorten(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + " …"
