"""Predictions for the test sets, as the GLUE server takes them: a zip of TSV files.

Every run keeps its logits on the test sets of its task; which of the runs speak is decided afterwards, so that another
choice costs no training. A file has the server's name, a header, and the columns `index` (the row's number, from 0) and
`prediction`: the label's name for MNLI, QNLI, RTE and AX, 0 or 1 for the others, a number from 0 to 5 for STS-B.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_composer.errors import UserError
from electra_composer.finetune.tasks import TASKS, Task

HEADER = "index\tprediction"
BEST, ENSEMBLE = "best", "ensemble"

SERVER_ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}
"""What a whole submission has: each file and its predictions, without the header."""


def check_select(select: str, seeds: Sequence[int]) -> None:
    """Refuse a choice of runs that there is not.

    Raises:
        UserError: neither `best` nor `ensemble` nor one of the seeds.
    """
    if select not in (BEST, ENSEMBLE, *map(str, seeds)):
        raise UserError(
            f"predict.select is {select!r}; expected {BEST}, {ENSEMBLE}, or one of the seeds {list(map(int, seeds))}"
        )


def check_indices(indices: Any, where: str) -> None:
    """Refuse a test set whose own index is not 0, 1, 2, …, as the server's are: rows lost or in another order.

    Args:
        indices: int64 `[examples]`, or None where the file has none.

    Raises:
        UserError: naming the first that differs.
    """
    if indices is None:
        return
    wrong = np.flatnonzero(np.asarray(indices) != np.arange(len(indices)))
    if len(wrong):
        raise UserError(
            f"{where}: index {indices[wrong[0]]} stands at place {wrong[0]}; expected 0, 1, 2, …, as the server has"
        )


def save_logits(path: str, logits: Mapping[str, Tensor]) -> None:
    """Keep the logits of a run, fp32 `[examples, num_outputs]` by `task-split`, in NumPy's format without pickle.

    Raises:
        UserError: it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in logits.items()})
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; free some space or set another results=…"
        ) from error


def load_logits(path: str) -> dict[str, Tensor]:
    """What :func:`save_logits` kept.

    Raises:
        UserError: no such file, or not one of ours.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file: the run was done with predict.enabled=false, or the file was removed; "
            "set another results=… to do the runs again"
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: not the logits of a run: {error}; remove the run's results to do it again") from error


def select_runs(runs: Sequence[dict[str, Any]], task: Task, select: str) -> list[dict[str, Any]]:
    """The runs of one task whose logits are averaged: one, or all for an ensemble.

    Args:
        runs: on record, of this task, each with `seed` and `score` (on dev).

    Raises:
        UserError: the named run is not done, or no score is defined.
    """
    if select == ENSEMBLE:
        return list(runs)
    if select == BEST:
        scored = [run for run in runs if run["score"] is not None]
        if not scored:
            raise UserError(
                f"predict.select is {BEST}, but no run of {task.folder} has a score on dev; name a seed, or {ENSEMBLE}"
            )
        return [max(scored, key=lambda run: (run["score"], -run["seed"]))]
    named = [run for run in runs if str(run["seed"]) == select]
    if not named:
        raise UserError(f"predict.select is {select}, but {task.folder} has no finished run of this seed")
    return named


def answers(task: Task, logits: Tensor) -> list[str]:
    """What the server is told, a string per example.

    Args:
        logits: fp32 `[examples, num_outputs]`, in the order of the test file.
    """
    if task.score_range is not None:
        low, high = task.score_range
        return [f"{value:.3f}" for value in (logits[:, 0].double() / task.target_scale).clamp(low, high).tolist()]
    return [task.server_labels[index] for index in logits.argmax(-1).tolist()]


def submission_files(
    tasks: Sequence[Task], runs: Sequence[dict[str, Any]], select: str, logits_path: Any
) -> dict[str, tuple[Task, list[str]]]:
    """The answers of every test set: official file name → its task and the answers.

    Args:
        tasks: AX among them is answered by the runs of the task that `trained_by` names.
        runs: on record, of one group.
        select: `best` (on dev, the lower seed if two are), the seed of one, or `ensemble`.
        logits_path: run's name such as `rte-seed1` → the file of its logits.

    Raises:
        UserError: no run of a task, or one without logits.
    """
    files: dict[str, tuple[Task, list[str]]] = {}
    for task in tasks:
        trained = task if task.trained_by is None else TASKS[task.trained_by]
        mine = [run for run in runs if run["task"] == trained.name]
        if not task.submission or not mine:
            continue
        chosen = [
            load_logits(logits_path(f"{run['task']}-seed{run['seed']}")) for run in select_runs(mine, trained, select)
        ]
        for split, name in task.submission.items():
            key = logits_key(task, split)
            if missing := [each for each in chosen if key not in each]:
                raise UserError(
                    f"{len(missing)} of the chosen runs of {trained.folder} have no logits of {key}; set another "
                    "results=… to do the runs again"
                )
            files[name] = (task, answers(task, torch.stack([each[key] for each in chosen]).mean(0)))
    return files


def logits_key(task: Task, split: str) -> str:
    """How a test set is called among the logits of a run."""
    return f"{task.name}-{split}"


def write_submission(path: str, files: Mapping[str, tuple[Task, list[str]]]) -> None:
    """Write the zip, and read it again to see that it is what the server takes; it appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (_, predictions) in files.items():
                lines = [HEADER, *(f"{index}\t{prediction}" for index, prediction in enumerate(predictions))]
                # ZipInfo: without the time of day, the same predictions are the same bytes.
                archive.writestr(zipfile.ZipInfo(name), "\n".join(lines) + "\n", zipfile.ZIP_DEFLATED)
        check_submission(temporary, {name: (task, len(predictions)) for name, (task, predictions) in files.items()})
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"predict.file {path}: cannot be written: {error.strerror}; set another predict.file"
        ) from error


def check_submission(path: str, expected: Mapping[str, tuple[Task, int]]) -> None:
    """Read a submission as the server does.

    Args:
        path: of the zip.
        expected: file name → its task and how many predictions it must have.

    Raises:
        UserError: a file missing or too many, another header, a row count that differs, an index out of order, or a
            prediction that is none of the task's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name).decode("utf-8") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a submission that can be read: {error}") from error
    if contents.keys() != expected.keys():
        raise UserError(f"{path}: holds {', '.join(sorted(contents))}; expected {', '.join(sorted(expected))}")
    for name, text in contents.items():
        task, rows = expected[name]
        header, *lines = text.splitlines()
        if header != HEADER:
            raise UserError(f"{path}: {name}: the header is {header!r}; expected {HEADER!r}")
        if len(lines) != rows:
            raise UserError(f"{path}: {name}: {len(lines)} predictions; expected {rows}")
        for number, line in enumerate(lines):
            index, _, prediction = line.partition("\t")
            if index != str(number):
                raise UserError(f"{path}: {name}: index {index!r} stands where {number} is expected")
            if not _is_answer(task, prediction):
                raise UserError(f"{path}: {name}: prediction {prediction!r} of index {index} is none of {task.folder}")


def missing_of(files: Mapping[str, tuple[Task, list[str]]]) -> str | None:
    """Why the server would refuse the files, in a line; None if they are a whole submission."""
    absent = [name for name in SERVER_ROWS if name not in files]
    others = [
        f"{name} has {len(files[name][1])} predictions, not {rows}"
        for name, rows in SERVER_ROWS.items()
        if name in files and len(files[name][1]) != rows
    ]
    parts = ([f"no {', '.join(absent)}"] if absent else []) + others
    return "; ".join(parts) or None


def _is_answer(task: Task, text: str) -> bool:
    if task.score_range is None:
        return text in task.server_labels
    low, high = task.score_range
    try:
        return low <= float(text) <= high
    except ValueError:
        return False
