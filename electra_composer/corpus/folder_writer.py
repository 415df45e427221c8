"""Write a folder of shards atomically, on disk or in an object store. shard_folder.py describes its contents."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from streaming.base.util import merge_index
from transformers import PreTrainedTokenizerFast

from electra_composer.corpus.part_writer import PartWriter, Place
from electra_composer.corpus.workspace import (
    INDEX,
    UNFINISHED,
    WHOLE,
    open_workspace,
    part_name,
    record_file,
    record_files,
    write_json,
)
from electra_composer.disk import disk_error
from electra_composer.errors import UserError
from electra_composer.signals import Stopped, tell
from electra_composer.storage.remotes import RemoteFolder, is_remote, upload, workspace_of
from electra_composer.storage.shard_folder import META, TOKENIZER, Meta

# Workaround (streaming 0.13): merge_index logs a warning about its temporary folder on the root logger; goes when it
# no longer does.
logging.getLogger().addFilter(lambda record: not str(record.msg).startswith("A temporary folder "))


class ShardFolder:
    """Context manager that writes a folder of shards, which appears only when it is complete.

    Everything is written to a workspace beside `out` (see workspace.py), and the finished folder is renamed to `out`.
    With a `plan`, an interrupted conversion can be resumed: its complete parts stay in `<out>.partial`, and the next
    conversion with the same plan finds them in :attr:`records`. Without a plan, or while no part is complete, leaving
    the `with` block by an error or without :meth:`finish` removes what was written.

    Args:
        out: the output folder; a URL that Streaming uploads to (`s3://…`) for an object store.
        overwrite: replace an existing folder of shards once the new one is complete. Not in an object store.
        compression: of the shards, as `MDSWriter` takes it (`zstd`, `zstd:7`), or None.
        plan: everything that determines the contents; None: keep and resume nothing.
        restart: remove the parts of an earlier conversion instead of resuming it.

    Attributes:
        workspace: folder for files of the conversion while it runs.
        records: of the complete parts, by part number; what :meth:`PartWriter.finish` returned.

    Raises:
        UserError: `out` exists and `overwrite` is off, or is not a folder of shards; not writable; disk full; the
            workspace holds parts of another plan; another conversion is writing the same folder.
    """

    def __init__(
        self,
        out: str,
        overwrite: bool = False,
        compression: str | None = None,
        plan: dict[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.remote = out.rstrip("/") if is_remote(out) else None
        self.out = self.remote or os.path.abspath(os.path.expanduser(out))
        place = self.out if self.remote is None else workspace_of(self.out)
        self.workspace = f"{place}.partial" if plan is not None else f"{place}.partial-{os.getpid()}"
        self.records: dict[int, dict[str, Any]] = {}
        self._compression, self._plan, self._restart = compression, plan, restart
        self._part: PartWriter | None = None
        # The workers of a killed conversion hold the lock for a moment longer.
        self._lock = FileLock(f"{self.workspace}.lock", timeout=3)
        if self.remote is not None:
            if RemoteFolder(self.remote).has(META):
                raise UserError(
                    f"{out} exists already; choose another --out, or remove it first: a folder in an object store "
                    "cannot be replaced atomically"
                )
        elif os.path.lexists(self.out):
            if not overwrite:
                raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
            if not os.path.isfile(os.path.join(self.out, META)):
                raise UserError(f"{out} is not a folder of shards (no {META}), so --overwrite does not replace it")

    def __enter__(self) -> ShardFolder:
        try:
            os.makedirs(os.path.dirname(self.workspace), exist_ok=True)
            self._lock.acquire()
            self.records = open_workspace(self.workspace, self.remote, self._plan, self._restart)
        except Timeout as error:
            raise UserError(
                f"another conversion is writing {self.out}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write to {os.path.dirname(self.workspace)}: {error.strerror}") from error
        except Stopped as error:
            self.__exit__(Stopped, error, None)
            raise
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._part is not None:
            self._part.cancel()
        kept = ""
        complete = record_files(self.workspace)
        if self._plan is not None and complete:
            kept = f"{len(complete)} finished part(s) are kept in {self.remote or self.workspace}"
        if kept and error is not None:
            shutil.rmtree(os.path.join(self.workspace, UNFINISHED), ignore_errors=True)
        else:
            shutil.rmtree(self.workspace, ignore_errors=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            os.remove(self._lock.lock_file)
        reason = disk_error(error)
        if reason is not None:
            raise UserError(
                f"cannot write the shards to {self.out}: {reason}; "
                + (f"{kept}: free some space and rerun the same command to resume" if kept else "nothing was kept")
            ) from error
        outcome = f"{kept}; rerun the same command to resume" if kept else "nothing was kept"
        if isinstance(error, Stopped):
            tell(outcome)
        elif error is not None and (kept or not isinstance(error, UserError)):
            print(outcome, file=sys.stderr)

    def forget(self) -> None:
        """Remove everything when the block is left, complete parts included."""
        self._plan = None

    def discard(self, numbers: Iterable[int]) -> None:
        """Remove complete parts, so that they can be converted again."""
        for number in numbers:
            del self.records[number]
            os.remove(record_file(self.workspace, number))
            for part in Path(self.workspace, WHOLE).glob(f"*/{part_name(number)}"):
                shutil.rmtree(part)

    def place(self, dtype: str) -> Place:
        """Return where :class:`PartWriter` writes. `dtype`: of the ids, from :func:`id_dtype`."""
        return Place(self.workspace, dtype, self._compression, self.remote, durable=self._plan is not None)

    def begin(self, dtype: str, splits: Sequence[str]) -> PartWriter:
        """Start the only part of a folder that one process writes at once; :meth:`finish` finishes it too."""
        self._part = PartWriter(self.place(dtype), 0, splits)
        return self._part

    def finish(self, meta: Meta, tokenizer: PreTrainedTokenizerFast) -> int:
        """Write indices, tokenizer and meta.json, rename the folder to `out`, and return its size in bytes.

        Raises:
            UserError: a shard of a complete part is missing; an upload to the remote failed.
        """
        if self._part is not None:
            self.records[0] = self._part.finish({})
            self._part = None
        whole = os.path.join(self.workspace, WHOLE)
        parts = [(part_name(number), self.records[number]["shards"]) for number in sorted(self.records)]
        for split in sorted({split for _, shards in parts for split in shards}):
            shards_of = {name: shards[split] for name, shards in parts if shards.get(split)}
            _write_index(self.workspace, self.remote, split, shards_of)
        tokenizer.save_pretrained(os.path.join(whole, TOKENIZER))
        meta.tokenizer.files = sorted(os.listdir(os.path.join(whole, TOKENIZER)))
        with open(os.path.join(whole, META), "w", encoding="utf-8", newline="\n") as file:
            file.write(meta.to_json())
        size = sum(path.stat().st_size for path in Path(whole).rglob("*") if path.is_file())
        if self.remote is not None:
            names = [os.path.join(TOKENIZER, name) for name in meta.tokenizer.files]
            upload(whole, self.remote, *names, META)  # last: a folder with META is complete
            return size + sum(_size_of(shard) for _, splits in parts for shards in splits.values() for shard in shards)
        if os.path.lexists(self.out):
            old = f"{self.out}.old-{os.getpid()}"
            os.rename(self.out, old)
            os.rename(whole, self.out)
            shutil.rmtree(old)
        else:
            os.rename(whole, self.out)
        return size


def _size_of(shard: dict[str, Any]) -> int:
    return int((shard["zip_data"] or shard["raw_data"])["bytes"])


def _write_index(workspace: str, remote: str | None, split: str, shards_of: dict[str, list[dict[str, Any]]]) -> None:
    """Write the index of a split by merging those of its parts, and upload it if there is a remote.

    Args:
        shards_of: index entries of the shards of each part, by the part's name; parts without shards are left out.

    Raises:
        UserError: a shard is missing.
    """
    folder = os.path.join(workspace, WHOLE, split)
    os.makedirs(folder, exist_ok=True)
    # Workaround (streaming 0.13): merge_index fails if the index is already there, as after a kill; goes when it
    # replaces the file.
    with contextlib.suppress(FileNotFoundError):
        os.remove(os.path.join(folder, INDEX))
    if not shards_of:
        write_json(os.path.join(folder, INDEX), {"shards": [], "version": 2})
        if remote is not None:
            upload(folder, f"{remote}/{split}", INDEX)
        return
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        indices = []
        for name, shards in shards_of.items():
            if remote is None:
                _check_shards(os.path.join(folder, name), shards)
            indices.append(os.path.join(scratch, name, INDEX))
            write_json(indices[-1], {"shards": shards, "version": 2})
        merge_index(indices, folder if remote is None else (folder, f"{remote}/{split}"))


def _check_shards(folder: str, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        forms = [shard[form]["basename"] for form in ("raw_data", "zip_data") if shard[form] is not None]
        if not any(os.path.isfile(os.path.join(folder, name)) for name in forms):  # either raw or compressed
            raise UserError(f"{folder}/{forms[-1]} is missing; pass --restart to convert everything again")
