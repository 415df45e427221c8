"""`pretrain.py` with a record of each batch's rows and losses; started by soak.py, user_runs.py and the tests.

python benchmarks/recorded_run.py YAML callbacks.record.folder=FOLDER [callbacks.signal_at.batch=7 …] [key=value …]
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config_from_command_line
from electra_composer.errors import report_user_errors
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS
from electra_composer.training.numerical_guard import NumericalGuard


class Record(Callback):
    """Append a line per batch to `rank<n>.jsonl`: its number, epoch, digests of its rows, and losses.

    A row's digest is of its token ids, so it identifies the row only if no two rows are the same. A line is written at
    the end of the batch. A resumed run may repeat a batch; its last line counts.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"rank{dist.get_global_rank()}.jsonl"
        self.line: dict[str, Any] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        rows = state.batch["input_ids"].cpu().numpy()
        digests = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]
        self.line = {"batch": state.timestamp.batch.value, "epoch": state.timestamp.epoch.value, "rows": digests}

    def batch_end(self, state: State, logger: Logger) -> None:
        self.line |= {name: float(value) for name, value in state.total_loss_dict.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            # A line break first, in case a kill has cut the line before.
            file.write(("" if file.tell() == 0 else "\n") + json.dumps(self.line))


def read_record(folder: str | Path) -> dict[int, dict[str, Any]]:
    """Read the records of all ranks: batch → its line, with the rows of all ranks in rank order.

    Raises:
        ValueError: the ranks do not have the same batches.
    """
    ranks = []
    for path in sorted(Path(folder).glob("rank*.jsonl")):
        lines: dict[int, dict[str, Any]] = {}
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # cut by a kill; the batch was repeated
            lines[line["batch"]] = line
        ranks.append(lines)
    if not ranks or any(lines.keys() != ranks[0].keys() for lines in ranks):
        raise ValueError(f"{folder}: no record, or the ranks have different batches")
    return {
        batch: {**line, "rows": [row for lines in ranks for row in lines[batch]["rows"]]}
        for batch, line in sorted(ranks[0].items())
    }


class SignalAt(Callback):
    """Send a signal to the own process at the end of a batch.

    Args:
        batch: number of batches done at that moment.
        signal: number of the signal.
        rank: rank that sends it; -1: every rank.
    """

    def __init__(self, batch: int, signal: int, rank: int = -1) -> None:
        self.batch, self.signal, self.rank = batch, signal, rank

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch and self.rank in (-1, dist.get_global_rank()):
            os.kill(os.getpid(), signal.Signals(self.signal))


class LossTrace(Callback):
    """Write the exact losses of every batch, and a checksum of its token ids, to `losses.jsonl`.

    Unlike :class:`Record`, it does not wait for the device in a step, so that the host runs ahead as in any run: copies
    of the losses stay on the device and are read every `interval` batches. Losses are written by `float.hex`.

    Args:
        folder: must exist.
        interval: batches between two reads.
    """

    def __init__(self, folder: str, interval: int = 50) -> None:
        self.path = Path(folder) / "losses.jsonl"
        self.interval = interval
        self.pending: list[dict[str, torch.Tensor]] = []
        self.batches = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        guard = next(callback for callback in state.callbacks if isinstance(callback, NumericalGuard))
        record_losses = guard.record_losses  # gets the losses of every batch, on the device

        def trace_losses(losses: dict[str, torch.Tensor]) -> None:
            ids = state.batch["input_ids"].long().flatten()
            rows = (ids * torch.arange(1, len(ids) + 1, device=ids.device)).sum()
            copies = {name.removeprefix("loss/train/"): loss.detach().clone() for name, loss in losses.items()}
            self.pending.append({"rows": rows, **copies})
            record_losses(losses)

        guard.record_losses = trace_losses  # type: ignore[method-assign]

    def batch_end(self, state: State, logger: Logger) -> None:
        if len(self.pending) >= self.interval:
            self.write()

    def fit_end(self, state: State, logger: Logger) -> None:
        self.write()

    def write(self) -> None:
        """Read the pending losses and append them to the file."""
        with open(self.path, "a", encoding="utf-8") as file:
            for values in self.pending:
                self.batches += 1
                rows, *losses = (values[name].item() for name in values)
                exact = dict(zip(list(values)[1:], (float(loss).hex() for loss in losses), strict=True))
                file.write(json.dumps({"batch": self.batches, "rows": rows, **exact}) + "\n")
        self.pending = []


EXTRA: dict[str, type[Callback]] = {"record": Record, "signal_at": SignalAt, "losses": LossTrace}

if __name__ == "__main__":
    CALLBACKS.update(EXTRA)
    report_user_errors(main)(load_config_from_command_line(PretrainConfig, "recorded_run.py YAML [key=value …]")[0])
