"""Predictions for the test sets as a submission to the GLUE server: a zip of TSV files.

Every run saves its logits on the test sets of its task. Which runs are used is chosen afterwards, so another choice
needs no training. A file has the name that the server expects, a header, and the columns `index` (row number, from 0)
and `prediction`: the label's name for MNLI, QNLI, RTE and AX, 0 or 1 for the others, a number in [0, 5] for STS-B.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from electra_composer.atomic_files import replaced_file, write_file
from electra_composer.errors import UserError
from electra_composer.finetuning.tasks import TASKS, Task

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
"""Files of a complete submission, with their number of predictions."""


def check_select(select: str, seeds: Sequence[int]) -> None:
    """Check `predict.select`.

    Raises:
        UserError: it is not `best`, `ensemble` or one of the seeds.
    """
    if select not in (BEST, ENSEMBLE, *map(str, seeds)):
        raise UserError(
            f"predict.select is {select!r}; expected {BEST}, {ENSEMBLE}, or one of the seeds {list(map(int, seeds))}"
        )


def check_indices(indices: Any, where: str) -> None:
    """Check that the index column of a test set is 0, 1, 2, … as on the server: no rows missing, none out of order.

    Args:
        indices: int64 `[examples]`, or None if the file has no such column.

    Raises:
        UserError: naming the first index that differs.
    """
    if indices is None:
        return
    wrong = np.flatnonzero(np.asarray(indices) != np.arange(len(indices)))
    if len(wrong):
        raise UserError(
            f"{where}: row {wrong[0]} has index {indices[wrong[0]]}; expected 0, 1, 2, … as on the server; "
            "download the file again"
        )


def save_logits(path: str, logits: Mapping[str, Tensor]) -> None:
    """Save the logits of a run, fp32 `[examples, num_outputs]` by `task-split`, as `.npz` without pickle.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replaced_file(path) as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in logits.items()})
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; free some space or set another results=…"
        ) from error


def load_logits(path: str) -> dict[str, Tensor]:
    """Load the logits written by :func:`save_logits`.

    Raises:
        UserError: the file does not exist or is corrupt.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file: the run had predict.enabled=false, or the file was deleted; "
            "set another results=… to repeat the runs"
        ) from error
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"{path}: not a readable logits file: {error}; set another results=… to repeat the runs"
        ) from error


def select_runs(runs: Sequence[dict[str, Any]], task: Task, select: str) -> list[dict[str, Any]]:
    """Select the runs of a task to average: one, or all for an ensemble.

    Args:
        runs: recorded runs of this task, each with `seed` and `score` (on dev).

    Raises:
        UserError: the selected run is not finished, or no run has a defined score.
    """
    if select == ENSEMBLE:
        return list(runs)
    if select == BEST:
        scored = [run for run in runs if run["score"] is not None]
        if not scored:
            raise UserError(
                f"predict.select is {BEST}, but no run of {task.folder} has a dev score; set it to a seed or {ENSEMBLE}"
            )
        return [max(scored, key=lambda run: (run["score"], -run["seed"]))]
    named = [run for run in runs if str(run["seed"]) == select]
    if not named:
        raise UserError(
            f"predict.select is {select}, but {task.folder} has no finished run with this seed; set another"
        )
    return named


def format_predictions(task: Task, logits: Tensor) -> list[str]:
    """Convert logits to the strings of the `prediction` column, one per example.

    Args:
        logits: fp32 `[examples, num_outputs]`, in the order of the test file.
    """
    if task.score_range is not None:
        low, high = task.score_range
        return [f"{value:.3f}" for value in (logits[:, 0].double() / task.target_scale).clamp(low, high).tolist()]
    return [task.labels[index] for index in logits.argmax(-1).tolist()]


def submission_files(
    tasks: Sequence[Task], runs: Sequence[dict[str, Any]], select: str, logits_path: Callable[[str], str]
) -> dict[str, tuple[Task, list[str]]]:
    """Compute the predictions for every test set: file name in the submission → task and predictions.

    Args:
        tasks: the tasks; AX is predicted by the runs of the task named by its `trained_by`.
        runs: recorded runs of one group.
        select: `best` (best dev score, ties to the lower seed), a seed, or `ensemble`.
        logits_path: name of a run, such as `rte-seed1` → file of its logits.

    Raises:
        UserError: no selected run of a task, or a run without logits.
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
                    f"{len(missing)} of the selected runs of {trained.folder} have no logits for {key}; set another "
                    "results=… to repeat the runs"
                )
            files[name] = (task, format_predictions(task, torch.stack([each[key] for each in chosen]).mean(0)))
    return files


def logits_key(task: Task, split: str) -> str:
    """Return the key of a test set in the logits of a run."""
    return f"{task.name}-{split}"


def write_submission(path: str, files: Mapping[str, tuple[Task, list[str]]]) -> None:
    """Write a submission atomically, after a check with :func:`check_submission`.

    Raises:
        UserError: the file cannot be written, or fails the check.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (_, predictions) in files.items():
            lines = [HEADER, *(f"{index}\t{prediction}" for index, prediction in enumerate(predictions))]
            # ZipInfo has a fixed modification time, so equal predictions give equal bytes.
            archive.writestr(zipfile.ZipInfo(name), "\n".join(lines) + "\n", zipfile.ZIP_DEFLATED)
    check_submission(path, {name: (task, len(predictions)) for name, (task, predictions) in files.items()}, content)
    try:
        write_file(path, content.getvalue())
    except OSError as error:
        raise UserError(
            f"predict.file {path}: cannot be written: {error.strerror}; set another predict.file"
        ) from error


def check_submission(path: str, expected: Mapping[str, tuple[Task, int]], content: io.BytesIO | None = None) -> None:
    """Check a submission against the format that the server requires.

    Args:
        path: path of the zip.
        expected: file name → task and number of predictions.
        content: the zip, if it is not at `path` yet.

    Raises:
        UserError: missing or unexpected file, wrong header, wrong number of rows, index out of order, or a prediction
            that is not a label of the task.
    """
    try:
        with zipfile.ZipFile(path if content is None else content) as archive:
            contents = {name: archive.read(name).decode("utf-8") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable submission: {error}") from error
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
                raise UserError(f"{path}: {name}: index {index!r}; expected {number}")
            if not _is_valid(task, prediction):
                raise UserError(f"{path}: {name}: prediction {prediction!r} of index {index} is no {task.folder} label")


def submission_problems(files: Mapping[str, tuple[Task, list[str]]]) -> str | None:
    """Return, in one line, why the server would reject the files; None for a complete submission."""
    absent = [name for name in SERVER_ROWS if name not in files]
    others = [
        f"{name} has {len(files[name][1])} predictions, not {rows}"
        for name, rows in SERVER_ROWS.items()
        if name in files and len(files[name][1]) != rows
    ]
    parts = ([f"no {', '.join(absent)}"] if absent else []) + others
    return "; ".join(parts) or None


def _is_valid(task: Task, text: str) -> bool:
    if task.score_range is None:
        return text in task.labels
    low, high = task.score_range
    try:
        return low <= float(text) <= high
    except ValueError:
        return False
