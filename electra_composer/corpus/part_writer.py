"""Write the shards of one part of a conversion, in any process or machine. workspace.py describes the folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

from streaming import MDSWriter

from electra_composer.atomic_files import sync
from electra_composer.corpus.examples import Row
from electra_composer.corpus.workspace import INDEX, RECORDS, UNFINISHED, WHOLE, part_name, record_file, write_json
from electra_composer.errors import UserError
from electra_composer.storage.remotes import upload
from electra_composer.storage.shard_folder import HASH


class Place(NamedTuple):
    """Where and in which form parts are written."""

    workspace: str
    dtype: str  # of the ids, from `id_dtype`
    compression: str | None = None  # as `MDSWriter` takes it (`zstd`, `zstd:7`)
    remote: str | None = None  # such as s3://bucket/owt
    plan: str | None = None  # digest of the conversion's plan; with one, complete parts survive a power failure


class PartWriter:
    """Writes one part: :meth:`write` for each row, then :meth:`finish`. A split without rows is written too.

    Args:
        number: of the part; it determines the order of the shards in the index.
        splits: names.
    """

    def __init__(self, place: Place, number: int, splits: Sequence[str]) -> None:
        self._place, self._number = place, number
        self._folder = os.path.join(place.workspace, UNFINISHED, part_name(number))
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writers = {split: self._writer(split) for split in splits}

    def _writer(self, split: str) -> MDSWriter:
        local = os.path.join(self._folder, split)
        remote = self._place.remote
        return MDSWriter(
            columns={"input_ids": f"ndarray:{self._place.dtype}", "segment_lengths": "ndarray:uint16"},
            out=local if remote is None else (local, f"{remote}/{split}/{part_name(self._number)}"),
            compression=self._place.compression,
            hashes=[HASH],
            max_workers=1 if remote is None else 4,
        )

    def write(self, split: str, row: Row) -> None:
        """Append one row."""
        ids = row.input_ids.astype(self._place.dtype, copy=False)
        self._writers[split].write({"input_ids": ids, "segment_lengths": row.segment_lengths})

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Complete the part: write or upload its last shards, move them to their place, and write the record.

        Args:
            record: what the conversion needs to know about the part afterwards.

        Returns:
            The record with `shards` added: the index entries of the part's shards, by split.

        Raises:
            OSError: disk full, or not writable.
            UserError: an upload to the remote failed.
        """
        name, place = part_name(self._number), self._place
        record = {**record, "plan": place.plan, "shards": {}}
        for split, writer in self._writers.items():
            try:
                writer.finish()
            # Workaround (streaming 0.13): a failed upload raises a bare Exception without the reason, which is only in
            # the log; goes when MDSWriter raises the uploader's error.
            except Exception as error:
                if place.remote is None or isinstance(error, OSError):
                    raise
                raise UserError(f"{place.remote}: a shard could not be uploaded; the lines above say why") from error
            record["shards"][split] = writer.shards
        if place.remote is None:
            for split in self._writers:
                folder = os.path.join(self._folder, split)
                os.remove(os.path.join(folder, INDEX))  # all parts of a split share one index
                if place.plan is not None:
                    for entry in os.scandir(folder):
                        sync(entry.path)
                os.makedirs(os.path.join(place.workspace, WHOLE, split), exist_ok=True)
                os.rename(folder, os.path.join(place.workspace, WHOLE, split, name))
        shutil.rmtree(self._folder, ignore_errors=True)
        write_json(record_file(place.workspace, self._number), record)
        if place.remote is not None:
            upload(place.workspace, place.remote, os.path.join(RECORDS, f"{name}.json"))
        return record

    def cancel(self) -> None:
        """Stop uploading, and remove what was written."""
        for writer in self._writers.values():
            writer.cancel_future_jobs()
        shutil.rmtree(self._folder, ignore_errors=True)
