"""Record the starts and ends of a run in its folder, from which a report tells interruptions."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime, timezone
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

HISTORY = "history.jsonl"  # in a run's folder


class RunHistory(Callback):
    """Appends a line to `history.jsonl` in the run's folder when training starts and when it ends, on rank 0.

    A line has `event` (`start` or `end`), `batch` (batches done), `time` (UTC, ISO 8601), and of a start `ranks` and
    `device`. A run that was killed has no line for its end. A resumed run appends to the file.

    Args:
        folder: the run's folder.
        replace: forget the history of the run that the folder held before.
    """

    def __init__(self, folder: str, replace: bool = False) -> None:
        self.path = os.path.join(folder, HISTORY)
        self.replace = replace
        self.has_started = False

    def fit_start(self, state: State, logger: Logger) -> None:
        self.has_started = True
        self._write(state, "w" if self.replace else "a", ranks=dist.get_world_size(), device=state.device.name)

    def close(self, state: State, logger: Logger) -> None:
        if self.has_started:  # Composer closes callbacks again when the process exits
            self.has_started = False
            self._write(state, "a")

    def _write(self, state: State, mode: str, **more: Any) -> None:
        if dist.get_global_rank() != 0:
            return
        event, now = "start" if more else "end", datetime.now(timezone.utc)
        line = {"event": event, "batch": state.timestamp.batch.value, "time": now.isoformat(timespec="seconds"), **more}
        # A full disk ends a run when it saves, not here.
        with contextlib.suppress(OSError), open(self.path, mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
