"""Write a folder of shards atomically, on disk or in an object store. shard_folder.py describes its contents."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from electra_composer.atomic_files import move_into_place, remove, restore, write_file
from electra_composer.corpus.finished import FORMS, Finished, check_output, check_shards, shard_bytes
from electra_composer.corpus.part_writer import PartWriter, Place
from electra_composer.corpus.workspace import (
    INDEX,
    PLAN,
    UNFINISHED,
    WHOLE,
    is_workspace,
    missing_folders,
    open_workspace,
    part_name,
    plain,
    plan_digest,
    record_files,
    remove_part,
    write_json,
)
from electra_composer.disk import disk_error
from electra_composer.errors import UserError
from electra_composer.signals import Stopped, tell
from electra_composer.storage.remotes import is_remote, upload, workspace_of
from electra_composer.storage.shard_folder import META, TOKENIZER, Meta


class ShardFolder:
    """Context manager that writes a folder of shards, which appears only when it is complete.

    Everything is written to a workspace beside `out` (see workspace.py), and the finished folder is renamed to `out`.
    With a `plan`, which the finished folder records, an interrupted conversion can be resumed: its complete parts stay
    in `<out>.partial`, and the next conversion with the same plan finds them in :attr:`records`, or the folder in
    :attr:`finished`. Without a plan, or while no part is complete, leaving the `with` block by an error or without
    :meth:`finish` removes what was written.

    Args:
        out: the output folder; a URL that Streaming uploads to (`s3://…`) for an object store.
        overwrite: replace an existing folder of shards once the new one is complete. Not in an object store.
        compression: of the shards, as `MDSWriter` takes it (`zstd`, `zstd:7`), or None.
        plan: everything that determines the contents; None: keep and resume nothing.
        restart: remove the parts of an earlier conversion instead of resuming it.

    Attributes:
        workspace: folder for files of the conversion while it runs.
        records: of the complete parts, by part number; what :meth:`PartWriter.finish` returned.
        finished: of `out`, if a conversion with this plan has finished it already.

    Raises:
        UserError: when the block is entered: `out` exists and may not be replaced; not writable; disk full; the
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
        self.out = self.remote or os.path.realpath(os.path.expanduser(out))
        self.workspace = f"{self.out if self.remote is None else workspace_of(self.out)}.partial"
        self.records: dict[int, dict[str, Any]] = {}
        self.finished: Finished | None = None
        self._overwrite, self._compression, self._restart = overwrite, compression, restart
        self._plan = None if plan is None else plain(plan)
        self._part: PartWriter | None = None
        # The workers of a killed conversion hold the lock for a moment longer.
        self._lock = FileLock(f"{self.workspace}.lock", timeout=3)

    def __enter__(self) -> ShardFolder:
        folder = os.path.dirname(self.workspace)
        self._created = missing_folders(folder)
        try:
            os.makedirs(folder, exist_ok=True)
            self._lock.acquire()
            restore(self.workspace)
            if self.remote is None:
                restore(self.out)
            self.finished = check_output(self.out, self.remote, self._overwrite, self._plan, self.workspace)
            if self.finished is None:
                self.records = open_workspace(self.workspace, self.remote, self._plan, self._restart)
        except BaseException as error:
            if isinstance(error, Stopped) and self._lock.is_locked:
                self.__exit__(Stopped, error, None)
            self._unlock()
            if isinstance(error, Timeout):
                message = f"another conversion is writing {self.out}; wait for it, or choose another --out"
                raise UserError(message) from error
            if isinstance(error, OSError):
                raise UserError(f"cannot write to {folder}: {error.strerror}") from error
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
        elif is_workspace(self.workspace):
            remove(self.workspace)
        self._unlock()
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

    def _unlock(self) -> None:
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                os.remove(self._lock.lock_file)
            self._lock.release()
        with contextlib.suppress(OSError):  # not empty
            for folder in self._created:
                os.rmdir(folder)

    def forget(self) -> None:
        """Remove everything when the block is left, complete parts included."""
        self._plan = None

    def discard(self, numbers: Iterable[int]) -> None:
        """Remove complete parts, so that they can be converted again."""
        for number in numbers:
            del self.records[number]
            remove_part(self.workspace, number)

    def place(self, dtype: str) -> Place:
        """Return where :class:`PartWriter` writes. `dtype`: of the ids, from :func:`id_dtype`."""
        digest = None if self._plan is None else plan_digest(self._plan)
        return Place(self.workspace, dtype, self._compression, self.remote, digest)

    def begin(self, dtype: str, splits: Sequence[str]) -> PartWriter:
        """Start the only part of a folder that one process writes at once; :meth:`finish` finishes it too."""
        self._part = PartWriter(self.place(dtype), 0, splits)
        return self._part

    def finish(self, meta: Meta, tokenizer: PreTrainedTokenizerFast) -> int:
        """Write indices, plan, tokenizer and meta.json, rename the folder to `out`, and return the shards' bytes.

        Raises:
            UserError: a shard of a complete part is missing; `out` has appeared; an upload to the remote failed.
        """
        if self._part is not None:
            self.records[0] = self._part.finish({})
            self._part = None
        whole = os.path.join(self.workspace, WHOLE)
        parts = [(part_name(number), self.records[number]["shards"]) for number in sorted(self.records)]
        for split in sorted({split for _, shards in parts for split in shards}):
            _write_index(self.workspace, self.remote, split, {name: shards.get(split, []) for name, shards in parts})
        if self._plan is not None:
            write_json(os.path.join(whole, PLAN), self._plan)
        tokenizer.save_pretrained(os.path.join(whole, TOKENIZER))
        meta.tokenizer.files = sorted(os.listdir(os.path.join(whole, TOKENIZER)))
        write_file(os.path.join(whole, META), meta.to_json())
        if self.remote is not None:
            names = [os.path.join(TOKENIZER, name) for name in meta.tokenizer.files]
            upload(whole, self.remote, *names, META)  # last: a folder with META is complete
        elif os.path.lexists(self.out) and not self._overwrite:
            raise UserError(f"{self.out} has appeared during the conversion; move it away and rerun the same command")
        else:
            move_into_place(whole, self.out)
        return sum(shard_bytes(shard) for _, splits in parts for shards in splits.values() for shard in shards)


def _write_index(workspace: str, remote: str | None, split: str, shards_of: dict[str, list[dict[str, Any]]]) -> None:
    """Write the index of a split, and upload it if there is a remote.

    Args:
        shards_of: index entries of the shards of each part, by the part's name.

    Raises:
        UserError: a shard is missing.
    """
    folder = os.path.join(workspace, WHOLE, split)
    shards = []
    for name, found in shards_of.items():
        if remote is None:
            check_shards(os.path.join(folder, name), found, "--restart")
        for shard in plain(found):
            for form in FORMS:
                if shard[form] is not None:
                    shard[form]["basename"] = f"{name}/{shard[form]['basename']}"
            shards.append(shard)
    write_file(os.path.join(folder, INDEX), json.dumps({"version": 2, "shards": shards}))
    if remote is not None:
        upload(folder, f"{remote}/{split}", INDEX)
