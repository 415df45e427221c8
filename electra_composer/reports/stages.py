"""What generator and discriminator make of the same rows at several stages of training."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from electra_composer.batches.checks import check_shards
from electra_composer.batches.row_reader import reader_of_split
from electra_composer.batches.shards import read_meta
from electra_composer.checkpoints.saving import SavedCheckpoint
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.errors import UserError
from electra_composer.reports.runs import Run
from electra_composer.reports.tokens import Token, annotate_tokens

ROWS, TOKENS = 3, 96  # rows shown, and tokens of each
MOST = 5  # stages
MOST_BYTES = 8 << 30  # of the checkpoints that are read
SEED = 0  # of rows, masks and samples


class Stage(NamedTuple):
    """Tokens of some rows after a number of batches."""

    batch: int
    kind: str  # of the objective
    rows: list[list[Token]]


def choose_checkpoints(run: Run) -> list[SavedCheckpoint]:
    """Return the checkpoints to show: milestones and the newest, or some of them, evenly spaced."""
    found = {saved.batch: saved for saved in run.checkpoints if os.path.basename(saved.path).startswith("milestone")}
    if run.checkpoints:
        found.setdefault(run.checkpoints[-1].batch, run.checkpoints[-1])
    saved = [found[batch] for batch in sorted(found)]
    count = min(MOST, len(saved))
    while count > 2 and count * max(_size(each.path) for each in saved) > MOST_BYTES:
        count -= 1
    return [saved[round(place)] for place in np.linspace(0, len(saved) - 1, count)] if saved else []


def _size(path: str) -> int:
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())


def stages_of(run: Run) -> list[Stage]:
    """Read the checkpoints of a run and let them fill and judge the same rows of its validation split.

    Raises:
        UserError: there is no checkpoint, the shards are not here or not those of the run, or a checkpoint cannot be
            read.
    """
    saved = choose_checkpoints(run)
    if not saved:
        raise UserError("the run has no checkpoint; checkpoints.milestones keeps some of several stages")
    streams = run.value("data.streams") or {}
    folder = next((stream["path"] for stream in streams.values()), run.value("data.path"))
    if not isinstance(folder, str) or not os.path.isfile(os.path.join(folder, "meta.json")):
        raise UserError(f"the shards of the run, {folder}, are not here")
    meta = read_meta(folder)
    names = [run.value("data.eval_split"), run.value("data.train_split")]
    split = next((name for name in names if name in meta.splits and meta.splits[name].rows), None)
    reader = None if split is None else reader_of_split(folder, split)
    if split is None or reader is None:
        raise UserError(f"{folder}: no split of the run can be read here; compressed shards are after a first training")
    count = meta.splits[split].rows
    numbers = np.sort(np.random.default_rng(SEED).choice(count, min(ROWS, count), replace=False))
    rows, stages = reader.read(numbers), []
    for each in saved:
        checkpoint = read_checkpoint(each.path)
        check_shards(meta, checkpoint.tokenizer, meta.max_seq_length)
        model = checkpoint.build_model()
        tokens = annotate_tokens(rows, checkpoint.tokenizer, meta, model, SEED)
        stages.append(Stage(each.batch, model.objective.kind, [row[:TOKENS] for row in tokens]))
    return stages
