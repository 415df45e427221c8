"""Writes a folder of shards, here or in an object store: whole or not at all. shard_folder.py says what is in it."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from streaming.base.util import merge_index
from transformers import PreTrainedTokenizerFast

from electra_composer.corpus.part_writer import (
    INDEX,
    RECORDS,
    UNFINISHED,
    WHOLE,
    PartWriter,
    Place,
    name_of,
    write_json,
)
from electra_composer.errors import UserError
from electra_composer.storage.remotes import RemoteFolder, is_remote, upload, workspace_of
from electra_composer.storage.shard_folder import META, TOKENIZER, Meta

PLAN = "plan.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
MISSES = 32  # parts without a record in a row, after which a remote is taken to have no more; more than run at a time


class ShardFolder:
    """A folder of shards that either is whole or is not there, made of parts that any process may write.

    Everything goes into a workspace beside `out`, of which the finished folder gets its name by one rename. With a
    `plan`, an interrupted conversion goes on with the parts that it lacks: the whole ones stay in `<out>.partial`, and
    the next conversion of the same plan finds them in :attr:`records`. Without a plan, or before a first part is whole,
    leaving the `with` block by an error or without :meth:`finish` removes what was written. part_writer.py says what
    is in the workspace; there is also `plan.json`.

    Args:
        out: the folder to be; a URL (`s3://…`, what Streaming uploads to) for one in an object store.
        overwrite: replace a folder of shards that is there, once the new one is whole. Not in an object store.
        compression: of the shards, as `MDSWriter` takes it (`zstd`, `zstd:7`), or None.
        plan: everything that the contents follow from; None: nothing is kept or continued.
        restart: remove the parts of an earlier conversion instead of going on from them.

    Attributes:
        workspace: where files of the conversion may be kept while it runs.
        records: of the whole parts, by their numbers; what :meth:`PartWriter.finish` returned.

    Raises:
        UserError: `out` exists and `overwrite` is off, or is not a folder of shards; no place to write to; disk full;
            parts of another plan are in the way; another conversion is at work on the same folder.
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
        self.out = out.rstrip("/") if self.remote else os.path.abspath(os.path.expanduser(out))
        place = self.out if self.remote is None else workspace_of(self.out)
        self.workspace = f"{place}.partial" if plan is not None else f"{place}.partial-{os.getpid()}"
        self.records: dict[int, dict[str, Any]] = {}
        self._compression, self._plan, self._restart = compression, plan, restart
        self._part: PartWriter | None = None
        self._lock = FileLock(f"{self.workspace}.lock", timeout=3)  # a killed one's workers hold it for a moment
        if self.remote is not None:
            if RemoteFolder(self.remote).has(META):
                raise UserError(
                    f"{out} exists already; choose another --out, or remove it there first: a folder in an object "
                    "store cannot be replaced at once"
                )
        elif os.path.lexists(self.out):
            if not overwrite:
                raise UserError(f"{out} exists already; choose another --out, or pass --overwrite to replace it")
            if not os.path.isfile(os.path.join(self.out, META)):
                raise UserError(f"{out} is no folder of shards (it has no {META}), so --overwrite leaves it alone")

    def __enter__(self) -> ShardFolder:
        try:
            os.makedirs(os.path.dirname(self.workspace), exist_ok=True)
            self._lock.acquire()
            self._open()
        except Timeout as error:
            raise UserError(
                f"another conversion is writing {self.out}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            self._lock.release()
            raise UserError(f"cannot write to {os.path.dirname(self.workspace)}: {error.strerror}") from error
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        plan_file = os.path.join(self.workspace, PLAN)
        ours = json.loads(json.dumps(self._plan))
        if self._plan is None or self._restart or not self._has_plan():
            shutil.rmtree(self.workspace, ignore_errors=True)
            write_json(plan_file, ours)
            if self.remote is not None:
                upload(self.workspace, self.remote, PLAN)
            return
        with open(plan_file, encoding="utf-8") as file:
            theirs = json.load(file)
        if theirs != ours:
            changed = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            told = ", ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in changed)
            raise UserError(
                f"{self.workspace} holds an unfinished conversion of something else ({_shortened(told)}); give the "
                "same options to go on with it, pass --restart to begin anew, or choose another --out"
            )
        shutil.rmtree(os.path.join(self.workspace, UNFINISHED), ignore_errors=True)
        for path in self._recorded():
            with open(path, encoding="utf-8") as file:
                self.records[int(os.path.basename(path).partition(".")[0])] = json.load(file)
        self._remove_parts_without_record()

    def _has_plan(self) -> bool:
        """Whether an earlier conversion has begun: here, or from another machine into the same remote."""
        if os.path.isfile(os.path.join(self.workspace, PLAN)):
            return True
        if self.remote is None:
            return False
        folder = RemoteFolder(self.remote)
        if not folder.fetch(PLAN, self.workspace):
            return False
        number = misses = 0
        while misses < MISSES:  # parts are finished about in their order
            found = folder.fetch(f"{RECORDS}/{name_of(number)}.json", self.workspace)
            misses = 0 if found else misses + 1
            number += 1
        return True

    def _recorded(self) -> list[str]:
        return sorted(glob.glob(os.path.join(glob.escape(self.workspace), RECORDS, "*.json")))

    def _remove_parts_without_record(self) -> None:
        """What was moved to its place before a kill, but not recorded."""
        for path in glob.glob(os.path.join(glob.escape(self.workspace), WHOLE, "*", "[0-9]*")):
            if int(os.path.basename(path)) not in self.records:
                shutil.rmtree(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._part is not None:
            self._part.cancel()
        kept = ""
        whole = self._recorded()  # by processes that this one may not have heard of yet
        if self._plan is not None and whole:
            kept = f"what was finished ({len(whole)} of its parts) stays in {self.remote or self.workspace}"
        if kept and error is not None:
            shutil.rmtree(os.path.join(self.workspace, UNFINISHED), ignore_errors=True)
        else:
            shutil.rmtree(self.workspace, ignore_errors=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            os.remove(self._lock.lock_file)
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise UserError(
                f"cannot write the shards to {self.out}: {error.strerror}; "
                + (f"{kept}: make room, and the same command goes on" if kept else "nothing was kept")
            ) from error
        if error is not None and (kept or not isinstance(error, UserError)):
            print(f"{kept}; the same command goes on" if kept else "nothing was kept", file=sys.stderr)

    def forget(self) -> None:
        """Keep nothing of it when the block is left."""
        self._plan = None

    def place(self, dtype: str) -> Place:
        """Where :class:`PartWriter` is to write. `dtype`: of the ids, from :func:`id_dtype`."""
        return Place(self.workspace, dtype, self._compression, self.remote, durable=self._plan is not None)

    def begin(self, dtype: str, splits: Sequence[str]) -> PartWriter:
        """The only part of a folder that one process writes at a go; :meth:`finish` finishes it too."""
        self._part = PartWriter(self.place(dtype), 0, splits)
        return self._part

    def finish(self, meta: Meta, tokenizer: PreTrainedTokenizerFast) -> int:
        """Put the parts together, give the folder its name, and return its size in bytes.

        Raises:
            UserError: a shard that was there is gone; the remote does not take the rest.
        """
        if self._part is not None:
            self.records[0] = self._part.finish({})
            self._part = None
        whole = os.path.join(self.workspace, WHOLE)
        for split in sorted({split for record in self.records.values() for split in record["shards"]}):
            self._index(split, os.path.join(whole, split))
        tokenizer.save_pretrained(os.path.join(whole, TOKENIZER))
        meta.tokenizer.files = sorted(os.listdir(os.path.join(whole, TOKENIZER)))
        with open(os.path.join(whole, META), "w", encoding="utf-8", newline="\n") as file:
            file.write(meta.to_json())
        size = sum(os.path.getsize(os.path.join(base, name)) for base, _, names in os.walk(whole) for name in names)
        if self.remote is not None:
            names = [os.path.join(TOKENIZER, name) for name in meta.tokenizer.files]
            upload(whole, self.remote, *names, META)  # what tells that it is whole comes last
            return size + sum(_bytes_of(shard) for shard in self._shards())
        if os.path.lexists(self.out):
            old = f"{self.out}.old-{os.getpid()}"
            os.rename(self.out, old)
            os.rename(whole, self.out)
            shutil.rmtree(old)
        else:
            os.rename(whole, self.out)
        return size

    def _shards(self) -> list[dict[str, Any]]:
        return [shard for record in self.records.values() for shards in record["shards"].values() for shard in shards]

    def _index(self, split: str, folder: str) -> None:
        """The common index of a split's parts, by Streaming's own merge of theirs."""
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # of an attempt that was killed
            os.remove(os.path.join(folder, INDEX))
        with tempfile.TemporaryDirectory(dir=self.workspace) as scratch:
            indices = []
            for number in sorted(self.records):
                shards = self.records[number]["shards"].get(split, [])
                if self.remote is None:
                    self._check_there(os.path.join(folder, name_of(number)), shards)
                if shards:
                    indices.append(os.path.join(scratch, name_of(number), INDEX))
                    write_json(indices[-1], {"shards": shards, "version": 2})
            if indices:
                with _quiet_root_logger():
                    merge_index(indices, folder if self.remote is None else (folder, f"{self.remote}/{split}"))
            else:
                write_json(os.path.join(folder, INDEX), {"shards": [], "version": 2})
                if self.remote is not None:
                    upload(folder, f"{self.remote}/{split}", INDEX)

    def _check_there(self, folder: str, shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            forms = [shard[form]["basename"] for form in ("raw_data", "zip_data") if shard[form] is not None]
            if not any(os.path.isfile(os.path.join(folder, name)) for name in forms):  # compressed or not, not both
                raise UserError(f"{folder}/{forms[-1]} is missing; pass --restart to convert anew")


def _bytes_of(shard: dict[str, Any]) -> int:
    return int((shard["zip_data"] or shard["raw_data"])["bytes"])


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Streaming's merge warns, on the root logger, of the folder that it makes for a moment."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length] + " …"
