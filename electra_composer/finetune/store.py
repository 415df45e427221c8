"""The append-only record of finetuning runs, which any number of processes share.

A JSON object per line, as in [JSON Lines](https://jsonlines.org): a finished run, a run that failed, or a mark from
which on a group's runs count anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from electra_composer.errors import UserError
from electra_composer.finetune.tasks import TASKS

log = logging.getLogger(__name__)

PACKAGES = ("electra-composer", "torch", "mosaicml", "transformers", "torchmetrics")

RUN_KEYS = {"group", "task", "seed", "score", "metrics", "collapsed", "source", "settings"}
KEYS = {"run": RUN_KEYS, "failure": {"group", "task", "seed", "error", "at"}, "restart": {"group"}}
LINE_START = b'{"kind": "'  # of every line: what tells a torn line of ours from a stranger's text


def store_path(results: str) -> str:
    """Where the record of a results file is: `runs.jsonl` beside it."""
    return os.path.join(os.path.dirname(results), "runs.jsonl")


class RunStore:
    """The append-only record of runs, a JSON object per line; see the module's text.

    Several processes may add and read at once: a line is one write under a lock. A line that a killed process left
    unfinished is dropped, with a warning, so that its run is done again.

    Args:
        path: of `runs.jsonl`, which need not exist; see :func:`store_path`.
    """

    def __init__(self, path: str):
        self.path = path
        self._warned = False

    def runs(self, group: str | None = None) -> list[dict[str, Any]]:
        """Finished runs of one group, or of all, by group, task and seed: whatever the order in which they ended.

        Raises:
            UserError: the file cannot be read, or is not a record of runs.
        """
        order = {name: position for position, name in enumerate(TASKS)}
        found = [run for run in self._current("run").values() if group in (None, run["group"])]
        return sorted(found, key=lambda run: (run["group"], order.get(run["task"], len(order)), run["seed"]))

    def failures(self, group: str) -> list[dict[str, Any]]:
        """The last failure of each run of a group that has not been finished since."""
        done = self._current("run")
        failed = {key: each for key, each in self._current("failure").items() if each["group"] == group}
        return [failed[key] for key in sorted(failed.keys() - done.keys())]

    def is_done(self, group: str, task_name: str, seed: int) -> bool:
        return (group, task_name, seed) in self._current("run")

    def add(self, run: dict[str, Any]) -> None:
        """Record a finished run, with the libraries' versions; on return it is on the disk.

        Args:
            run: `group`, `task`, `seed`, `score` × 100 or None, `metrics` (name → score × 100 or None), `collapsed`
                (whether it predicts one class, or one value), `source`, `settings` (both as of :func:`group_of`), and
                whatever else is worth keeping. NaN and infinity become null.

        Raises:
            UserError: it cannot be written, such as on a full disk; the runs before it are whole.
        """
        self._append("run", {"versions": _versions(), **run})

    def add_failure(self, failure: dict[str, Any]) -> None:
        """Record that a run failed: `group`, `task`, `seed`, `error`, `at`. It is not done: the next start tries it."""
        self._append("failure", failure)

    def restart(self, group: str) -> None:
        """Let the runs of a group so far no longer count. They stay in the file."""
        self._append("restart", {"group": group})

    def _current(self, kind: str) -> dict[tuple[str, str, int], dict[str, Any]]:
        """Records of a kind that no restart has put aside: of several of one run the first, of failures the last."""
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
        whole, torn = _split(data, self.path)
        if torn and not self._warned:
            self._warned = True
            log.warning("%s: its last line is cut short; the run that was writing it will be done again", self.path)
        return [_parse(line, f"{self.path}:{number}") for number, line in enumerate(whole.splitlines(), 1)]

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
                f"{self.path}: {lost} cannot be written: {error.strerror}; those before it are kept: free some space "
                "or set another results=…, and start again"
            ) from error


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _split(data: bytes, path: str) -> tuple[bytes, bytes]:
    """The whole lines of a record, and the torn one at its end, if there is one."""
    end = data.rfind(b"\n") + 1
    whole, torn = data[:end], data[end:]
    if not LINE_START.startswith(torn[: len(LINE_START)]):
        raise UserError(f"{path}: does not end in a record of a run; move the file away or set another results=…")
    return whole, torn


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
    """Append a line, or nothing: what a full disk took of it is cut off again, and so is a line torn before."""
    start = len(_split(os.pread(descriptor, os.fstat(descriptor).st_size, 0), path)[0])
    os.ftruncate(descriptor, start)
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, start)
        raise
