"""Checkpoints of a run: checks of its folder, the checkpoint to start from, and the savers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from composer.core import Event, State, Timestamp, TimeUnit
from composer.utils import create_interval_scheduler

from electra_composer.checkpoints.remote import RemoteCopy, fetch_newest
from electra_composer.checkpoints.resuming import repair_latest_link
from electra_composer.checkpoints.saving import AtomicCheckpointSaver, IntervalSaver, MilestoneSaver, checkpoints_in
from electra_composer.checkpoints.sharded import is_sharded
from electra_composer.config import RunConfig
from electra_composer.errors import UserError
from electra_composer.faults import check_can_write
from electra_composer.foreign_files import refuse_foreign

LATEST = "latest-rank{rank}.pt"  # link to the newest checkpoint in a run's folder
LATEST_OF_RANK_0 = LATEST.format(rank=0)


def check_run_folder(config: RunConfig) -> None:
    """Refuse a folder that cannot be written, and one with a run's checkpoints unless they may be used or replaced.

    Raises:
        UserError: `checkpoints.folder` is a URL or cannot be written; it has checkpoints, and the configuration neither
            resumes nor overwrites them; `checkpoints.remote` without checkpoints to copy; or there is no
            `checkpoints.load_path`.
    """
    checkpoints = config.checkpoints
    if "://" in checkpoints.folder:
        # An object store has no rename, so checkpoints could not be written atomically.
        raise UserError(
            f"checkpoints.folder={checkpoints.folder}: expected a folder of this machine, or of a file system that its "
            "nodes share; set checkpoints.remote to the object store for copies of the checkpoints"
        )
    if checkpoints.remote is not None and not checkpoints.interval and not checkpoints.milestones:
        raise UserError(
            f"checkpoints.remote={checkpoints.remote}: there will be no checkpoints to copy; set checkpoints.interval, "
            "such as 1000ba, or checkpoints.milestones"
        )
    latest = os.path.join(checkpoints.folder, LATEST_OF_RANK_0)
    holds_run = os.path.lexists(latest) or checkpoints_in(checkpoints.folder)
    if holds_run and not checkpoints.resume and not checkpoints.overwrite:
        raise UserError(
            f"{checkpoints.folder} holds the checkpoints of a run; set checkpoints.resume=true to continue it, "
            "checkpoints.overwrite=true to replace it, or another checkpoints.folder"
        )
    check_can_write("checkpoints.folder", checkpoints.folder, is_folder=True)
    if not os.path.lexists(latest) and checkpoints.remote is None:
        path = load_path(config)
        if path is not None and not os.path.isdir(path) and not os.path.isfile(path):
            raise UserError(f"checkpoints.load_path={path}: no such checkpoint; expected a .pt file or a run's folder")


def checkpoint_to_load(config: RunConfig, check_only: bool = False) -> str | None:
    """Find the checkpoint that the trainer will start from: the run's newest, else `checkpoints.load_path`, else None.

    A newer checkpoint in `checkpoints.remote` is fetched first. If the run's newest checkpoint is broken, the link to
    it moves to the one before (see checkpoints/resuming.py).

    Args:
        check_only: fetch and move nothing. A newer checkpoint in `checkpoints.remote` is then not seen.

    Returns:
        A file, or the folder of a sharded checkpoint. Its contents are not checked yet.
    """
    checkpoints = config.checkpoints
    fetch_newest(checkpoints, config.run_name, LATEST_OF_RANK_0, check_only)
    if checkpoints.resume and not checkpoints.overwrite:
        newest = repair_latest_link(checkpoints.folder, LATEST_OF_RANK_0, check_only)
        if newest is not None:
            return newest if check_only else os.path.join(checkpoints.folder, LATEST_OF_RANK_0)
    return load_path(config)


def load_path(config: RunConfig) -> str | None:
    """Return `checkpoints.load_path`, or the newest checkpoint in it if it is a run's folder.

    Raises:
        UserError: a folder that is neither a run's nor a sharded checkpoint; a checkpoint of another program.
    """
    path = config.checkpoints.load_path
    if path is not None:
        refuse_foreign(path, "a checkpoint of pretrain.py")
    if path is None or not os.path.isdir(path):
        return path
    latest = os.path.join(path, LATEST_OF_RANK_0)
    if os.path.exists(latest):
        path = os.path.realpath(latest)
    if os.path.isdir(path) and not is_sharded(path):
        raise UserError(
            f"checkpoints.load_path={path}: neither the folder of a run, with a {LATEST_OF_RANK_0}, nor a sharded "
            "checkpoint; give one of them, or a .pt file"
        )
    return path


def checkpoint_savers(config: RunConfig, copy: RemoteCopy | None = None) -> list[AtomicCheckpointSaver]:
    """Create the savers of milestones (all kept) and of intervals (the newest `keep`); none if the run saves neither.

    The last saver also saves when a signal ends the run. `latest-rank0.pt` links to the newest checkpoint of either. A
    run that resumes from before a checkpoint overwrites it; :func:`check_run_folder` keeps other runs out.
    """
    checkpoints = config.checkpoints
    if not checkpoints.interval and not checkpoints.milestones:
        return []
    folder, milestones, interval = checkpoints.folder, checkpoints.milestones, checkpoints.interval
    common: Any = {"latest_filename": LATEST, "overwrite": True, "replace_run": checkpoints.overwrite, "copy": copy}
    # A milestone at 1.0 is saved at the end of training; without it the interval saver saves there.
    final_events: Any = {"final_events": set()} if 1.0 in milestones else {}
    is_due = create_interval_scheduler(interval, **final_events) if interval else lambda state, event: False
    savers: list[AtomicCheckpointSaver] = [milestone_saver(folder, milestones, **common)] if milestones else []
    savers.append(
        IntervalSaver(folder, "batch-", save_interval=is_due, num_checkpoints_to_keep=checkpoints.keep, **common)
    )
    return savers


def milestone_saver(
    folder: str, fractions: Sequence[float], latest_filename: str | None = None, **arguments: Any
) -> MilestoneSaver:
    """Create a saver of checkpoints at fixed fractions of training, all of which are kept.

    A fraction fires at the end of the first batch that reaches it. This follows from the timestamps before and after
    the batch alone, so each fires once, in a resumed run too. The duration of training may be in batches, samples,
    tokens, or in epochs if the loader has a length.

    Args:
        folder: where `milestone-ba{batch}-rank0.pt` are written.
        fractions: in (0, 1], such as 0.0625.
        latest_filename: name of the symbolic link to the newest checkpoint, such as `latest-rank{rank}.pt`.
        arguments: of the saver; a run that resumes from before a milestone needs `overwrite`.
    """

    def is_due(state: State, event: Event) -> bool:
        if event != Event.BATCH_CHECKPOINT or state.previous_timestamp is None:
            return False
        before, now = elapsed_fraction(state, state.previous_timestamp), elapsed_fraction(state, state.timestamp)
        return any(before < fraction <= now for fraction in fractions)

    return MilestoneSaver(folder, "milestone-ba", latest_filename, save_interval=is_due, **arguments)


def elapsed_fraction(state: State, timestamp: Timestamp) -> float:
    """Return the fraction of `state.max_duration` that is over at `timestamp`. Epochs are counted in batches.

    Raises:
        UserError: a duration in epochs and a loader without a length.
    """
    duration = state.max_duration
    assert duration is not None
    if duration.unit != TimeUnit.EPOCH:
        return timestamp.get(duration.unit).value / duration.value
    if state.dataloader_len is None:
        raise UserError("the loader has no length, so milestones need trainer.max_duration in ba, sp or tok")
    return timestamp.batch.value / (duration.value * int(state.dataloader_len))
