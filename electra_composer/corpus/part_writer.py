"""Writes the shards of one part of a conversion, in whichever process or machine converts it.

    <workspace>/unfinished/00003/<split>/  while it is written
    <workspace>/whole/<split>/00003/       shards of a whole part: the folder to be
    <workspace>/records/00003.json         what was done, written last: a part with a record is whole

With a remote, shards and record go to `<remote>/<split>/00003/` and `<remote>/records/` through Streaming's uploaders
instead, each as soon as it is written, and only the record stays here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from streaming import MDSWriter

from electra_composer.corpus.examples import Row
from electra_composer.errors import UserError
from electra_composer.storage.remotes import upload
from electra_composer.storage.shard_folder import HASH

UNFINISHED, WHOLE, RECORDS = "unfinished", "whole", "records"
INDEX = "index.json"


class Place(NamedTuple):
    """Where parts are written to, and how."""

    workspace: str
    dtype: str  # of the ids, from `id_dtype`
    compression: str | None = None  # as `MDSWriter` takes it (`zstd`, `zstd:7`)
    remote: str | None = None  # such as s3://bucket/owt
    durable: bool = True  # a part that is said to be whole is so after a power cut too


class PartWriter:
    """Writes one part: :meth:`write` for each row, then :meth:`finish`. A split is there even if no row comes.

    Args:
        number: of the part; parts are put together in this order.
        splits: names.
    """

    def __init__(self, place: Place, number: int, splits: Sequence[str]) -> None:
        self._place, self._number = place, number
        self._folder = os.path.join(place.workspace, UNFINISHED, name_of(number))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writers = {split: self._writer(split) for split in splits}

    def _writer(self, split: str) -> MDSWriter:
        local = os.path.join(self._folder, split)
        remote = self._place.remote
        return MDSWriter(
            columns={"input_ids": f"ndarray:{self._place.dtype}", "segment_lengths": "ndarray:uint16"},
            out=local if remote is None else (local, f"{remote}/{split}/{name_of(self._number)}"),
            compression=self._place.compression,
            hashes=[HASH],
            max_workers=1 if remote is None else 4,
        )

    def write(self, split: str, row: Row) -> None:
        """Append one row."""
        ids = row.input_ids.astype(self._place.dtype, copy=False)
        self._writers[split].write({"input_ids": ids, "segment_lengths": row.segment_lengths})

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Make the part whole.

        Args:
            record: what the conversion needs to know of it afterwards.

        Returns:
            The record, with the entries of its shards in their splits' indices added as `shards`.

        Raises:
            OSError: no room, or no more right to write.
            UserError: the remote does not take it.
        """
        name, place = name_of(self._number), self._place
        record = {**record, "shards": {}}
        for split, writer in self._writers.items():
            try:
                writer.finish()
            except Exception as error:  # of an upload: Streaming's message names no reason, its log does
                if place.remote is None or isinstance(error, OSError):
                    raise
                raise UserError(f"{place.remote}: a shard could not be uploaded, see the lines above") from error
            record["shards"][split] = writer.shards
        if place.remote is None:
            for split in self._writers:
                folder = os.path.join(self._folder, split)
                os.remove(os.path.join(folder, INDEX))  # the split has one for all its parts
                if place.durable:
                    _sync_files(folder)
                os.makedirs(os.path.join(place.workspace, WHOLE, split), exist_ok=True)
                os.rename(folder, os.path.join(place.workspace, WHOLE, split, name))
        shutil.rmtree(self._folder, ignore_errors=True)
        write_json(os.path.join(place.workspace, RECORDS, f"{name}.json"), record)
        if place.remote is not None:
            upload(place.workspace, place.remote, os.path.join(RECORDS, f"{name}.json"))
        return record

    def cancel(self) -> None:
        """Stop uploading, and remove what was written."""
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        shutil.rmtree(self._folder, ignore_errors=True)


def name_of(number: int) -> str:
    return f"{number:05}"


def write_json(path: str, value: Any) -> None:
    """Write a JSON file that appears whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(value, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def _sync_files(folder: str) -> None:
    for entry in os.scandir(folder):
        with open(entry.path, "rb") as file:
            os.fsync(file.fileno())
