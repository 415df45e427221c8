"""Append-only record of finetuning runs, shared by any number of processes.

The format is [JSON Lines](https://jsonlines.org). A line is a finished run, a failed run, or a restart, which discards
the earlier runs of a group.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from electra_composer.errors import UserError
from electra_composer.finetuning.tasks import TASKS

log = logging.getLogger(__name__)

PACKAGES = ("electra-composer", "torch", "mosaicml", "transformers", "torchmetrics")

RUN_KEYS = {"group", "task", "seed", "score", "metrics", "collapsed", "source", "settings"}
KEYS = {"run": RUN_KEYS, "failure": {"group", "task", "seed", "error", "at"}, "restart": {"group"}}
LINE_START = b'{"kind": "'  # of every line; tells an incomplete record from other content


def store_path(results: str) -> str:
    """Return the path of the record that belongs to a results file: `runs.jsonl` beside it."""
    return os.path.join(os.path.dirname(results), "runs.jsonl")


class RunStore:
    """Append-only record of runs; see the module's docstring for the format.

    Several processes may add and read concurrently: a line is one write under a lock. An incomplete last line, left by
    a killed process, is ignored with a warning, so that its run is repeated.

    Args:
        path: path of `runs.jsonl`, which need not exist; see :func:`store_path`.
    """

    def __init__(self, path: str):
        self.path = path
        self._warned = False

    def runs(self, group: str | None = None) -> list[dict[str, Any]]:
        """Return the finished runs of one group, or of all, sorted by group, task and seed.

        Raises:
            UserError: the file cannot be read, or is not a record of runs.
        """
        order = {name: position for position, name in enumerate(TASKS)}
        found = [run for run in self._current("run").values() if group in (None, run["group"])]
        return sorted(found, key=lambda run: (run["group"], order.get(run["task"], len(order)), run["seed"]))

    def failures(self, group: str) -> list[dict[str, Any]]:
        """Return the last failure of each run of a group that has not finished."""
        done = self._current("run")
        failed = {key: each for key, each in self._current("failure").items() if each["group"] == group}
        return [failed[key] for key in sorted(failed.keys() - done.keys())]

    def is_done(self, group: str, task_name: str, seed: int) -> bool:
        return (group, task_name, seed) in self._current("run")

    def add(self, run: dict[str, Any]) -> None:
        """Record a finished run with the versions of the libraries, durably (`fsync`).

        Args:
            run: `group`, `task`, `seed`, `score` × 100 or None, `metrics` (name → score × 100 or None), `collapsed`
                (whether it predicts a single class or value), `source`, `settings` (as in :func:`group_of`), and any
                other values. NaN and infinity become null.

        Raises:
            UserError: the run cannot be written, such as on a full disk; earlier runs stay intact.
        """
        self._append("run", {"versions": _versions(), **run})

    def add_failure(self, failure: dict[str, Any]) -> None:
        """Record a failed run: `group`, `task`, `seed`, `error`, `at`. The next invocation retries it."""
        self._append("failure", failure)

    def restart(self, group: str) -> None:
        """Discard the runs of a group so far. They stay in the file."""
        self._append("restart", {"group": group})

    def _current(self, kind: str) -> dict[tuple[str, str, int], dict[str, Any]]:
        """Return the records of a kind that no restart has discarded: of each run the first, or the last failure."""
        found: dict[tuple[str, str, int], dict[str, Any]] = {}
        for record in self._records():
            if record["kind"] == "restart":
                found = {key: value for key, value in found.items() if key[0] != record["group"]}
            elif record["kind"] == kind:
                key = (record["group"], record["task"], record["seed"])
                if key not in found or kind == "failure":
                    found[key] = {name: value for name, value in record.items() if name != "kind"}
        return found

    def _records(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                data = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from error
        complete, rest = _split(data, self.path)
        if rest and not self._warned:
            self._warned = True
            log.warning("%s: the last line is incomplete; the run that was writing it will be repeated", self.path)
        return [_parse(line, f"{self.path}:{number}") for number, line in enumerate(complete.splitlines(), 1)]

    def _append(self, kind: str, record: dict[str, Any]) -> None:
        if missing := sorted(KEYS[kind] - record.keys()):
            raise ValueError(f"a {kind} record needs {', '.join(missing)}")
        line = (json.dumps(_finite({"kind": kind, **record}), allow_nan=False) + "\n").encode()
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                _write_line(descriptor, line, self.path)
            finally:
                os.close(descriptor)  # which unlocks
        except OSError as error:
            lost = f"{kind} {record.get('task')}, seed {record.get('seed')} (score {record.get('score')})"
            raise UserError(
                f"{self.path}: {lost} cannot be written: {error.strerror}; earlier runs are kept: free some space "
                "or set another results=…, and rerun the command"
            ) from error


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _finite(value: Any) -> Any:
    """Replace every NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _split(data: bytes, path: str) -> tuple[bytes, bytes]:
    """Split the content of a record into its complete lines and the incomplete line at its end, which may be empty."""
    end = data.rfind(b"\n") + 1
    if not LINE_START.startswith(data[end:][: len(LINE_START)]):
        raise UserError(f"{path}: does not end in a record of a run; move the file away or set another results=…")
    return data[:end], data[end:]


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        ok = KEYS[record["kind"]] <= record.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise UserError(f"{where}: not the record of a run; move the file away or set another results=…")
    return record


def _write_line(descriptor: int, line: bytes, path: str) -> None:
    """Append a complete line or nothing, and remove an incomplete line at the end of the file."""
    start = len(_split(os.pread(descriptor, os.fstat(descriptor).st_size, 0), path)[0])
    os.ftruncate(descriptor, start)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, start)
        raise
