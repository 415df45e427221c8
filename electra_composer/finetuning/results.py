"""Summarize finetuning runs and write `results.json`, `.md`, `.csv` and `.png`.

The files are rewritten from the record of runs (`store.py`) after each run. Runs with different settings are in
different groups: a record may hold several groups; a report shows one and lists the others. All scores are multiplied
by 100.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from electra_composer.atomic_files import locked, write_file
from electra_composer.checkpoints.weights import Pretrained
from electra_composer.config_loading import to_dict
from electra_composer.errors import UserError
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.plot import plot
from electra_composer.finetuning.published import published_rows
from electra_composer.finetuning.report import AVERAGED, csv_text, markdown
from electra_composer.finetuning.store import RunStore, store_path
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue_config import GlueConfig
from electra_composer.training.compilation import choose_compile
from electra_composer.vocabulary import vocabulary_sha256

# Settings that may differ within a group because they do not affect scores.
IGNORED_KEYS = ("run_name", "tasks", "seeds", "results", "checkpoints", "callbacks", "loggers", "predict", "save")
IGNORED_SUBKEYS = (
    ("trainer", "progress_bar"),
    ("trainer", "log_interval"),
    ("trainer", "cuda_graph"),
    ("trainer", "layer_kernels"),
    ("trainer", "eval_interval"),
    ("trainer", "device_eval_batch_size"),
    ("data", "num_workers"),
    ("data", "cache"),
    ("data", "test"),
)

# Values of keys that results of earlier versions lack, and that they were computed with.
EARLIER = {"loss_reduction": "mean"}

# Callbacks that end a run early; others do not affect scores.
STOPPERS = ("early_stopper", "threshold_stopper")

GROUP_KEYS = ("group", "settings", "source")  # equal in all runs of a group: stored once in results.json


def describe_source(source: Pretrained, random_init: bool) -> dict[str, Any]:
    """Describe the finetuned model, with SHA-256 of its weights because a path such as `latest-rank0.pt` is reused."""
    digest = hashlib.sha256()
    for name in sorted(source.weights):
        digest.update(name.encode())
        digest.update(source.weights[name].detach().cpu().float().contiguous().numpy().data)
    return {
        "name": source.name,
        "random_init": random_init,
        "sizes": vars(source.encoder),
        "weights_sha256": None if random_init else digest.hexdigest(),
        "vocabulary_sha256": vocabulary_sha256(source.tokenizer),
    }


def group_of(
    config: GlueConfig | FinetuneConfig, source: dict[str, Any], more: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return the group of a configuration; only runs of one group are summarized together.

    Args:
        source: from :func:`describe_source`.
        more: further settings.

    Returns:
        The group's key, 12 hexadecimal digits, and the flat settings that it is a hash of: `optimizer.lr`, …,
        `weights_sha256 of model.source`, ….
    """
    flat: dict[str, Any] = {}
    for key, value in to_dict(config).items():
        for subkey, subvalue in value.items() if isinstance(value, dict) else [(None, value)]:
            if key not in IGNORED_KEYS and (key, subkey) not in IGNORED_SUBKEYS:
                flat[f"{key}.{subkey}" if subkey else key] = subvalue
    flat.update({f"callbacks.{name}": config.callbacks[name] for name in STOPPERS if name in config.callbacks})
    for key, value in EARLIER.items():
        if flat[key] == value:
            del flat[key]
    # What `auto` means here, so that results of versions without it are of the same group.
    flat["trainer.compile"] = choose_compile(config.trainer, static_shapes=False)[0]
    # Includes the sizes because random weights have no hash, and because they include dropout.
    described = {**source["sizes"], **{key: source[key] for key in ("weights_sha256", "vocabulary_sha256")}}
    flat.update({f"{key} of model.source": value for key, value in described.items()})
    flat.update(more or {})
    text = json.dumps(flat, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12], json.loads(text)


def open_store(config: GlueConfig | FinetuneConfig, group: str, check_only: bool = False) -> RunStore:
    """Open the record of `config.results` for runs of `group`; call on rank 0, before other ranks read the record.

    Args:
        check_only: discard no runs.

    Raises:
        UserError: the path is another kind of file; or the record has runs of the group and `checkpoints.resume` and
            `checkpoints.overwrite` are false.
    """
    check_results_path(config.results)
    store = RunStore(store_path(config.results))
    if store.runs(group):
        if config.checkpoints.overwrite:
            if not check_only:
                store.restart(group)
        elif not config.checkpoints.resume:
            raise UserError(
                f"results {config.results}: has runs with these settings, and checkpoints.resume is false; "
                "set another results=…, or checkpoints.overwrite=true to replace them"
            )
    return store


def check_results_path(path: str) -> None:
    """Check that writing the results file would not replace another kind of file.

    Raises:
        UserError: the file exists and was not written by :func:`write_reports`.
    """
    if not os.path.lexists(path):
        return
    try:
        if not os.path.isfile(path):  # reading a device or a pipe may never end
            raise ValueError
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        ours = isinstance(found["tasks"], dict) and isinstance(found["group"], str)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"results {path}: exists, but is not a results file; move it away or set results=…")


def summary(
    runs: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    group: str = "",
    failures: Sequence[dict[str, Any]] = (),
    others: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Compute the content of the results file.

    Args:
        runs: runs of one group, from :meth:`RunStore.runs`.
        settings: settings of the group.
        failures: from :meth:`RunStore.failures`.
        others: runs of other groups in the same record.

    Returns:
        `tasks`: name → `mean`, sample `std`, `median` and `best` of the scores, `n`, `collapsed` (number of collapsed
        runs), `metrics` (mean of each) and `runs`; None where a score is undefined.
        `average`: `tasks`, the names of those of the eight averaged tasks that have runs, and the averages over them of
        `mean`, `median` and `best`.
        `average_without_wnli`: the average `mean`, or None while one of the eight is missing.
        Also `group`, `settings`, `source`, `versions`, `published`, `failures`, `other_groups`.

    Raises:
        UserError: a run is of an unknown task.
    """
    for run in (*runs, *others):
        if run["task"] not in TASKS:
            raise UserError(
                f"the record has runs of task {run['task']!r}, unknown to this version; set another results=…"
            )
    tasks = {}
    for name in TASKS:
        if mine := [run for run in runs if run["task"] == name]:
            tasks[name] = over_seeds(TASKS[name].folder, TASKS[name].metrics[0], mine)
    averaged = [name for name in AVERAGED if name in tasks]
    average = {key: _mean([tasks[name][key] for name in averaged]) for key in ("mean", "median", "best")}
    return {
        "group": group,
        "source": runs[0]["source"] if runs else None,
        "tasks": tasks,
        "average_without_wnli": average["mean"] if averaged == AVERAGED else None,
        "average": {"tasks": averaged, **average},
        "published": published_rows(settings.get("hidden_size of model.source")),
        "failures": list(failures),
        "other_groups": _other_groups(settings, others),
        "versions": all_versions(runs),
        "settings": settings,
    }


def write_reports(store: RunStore, group: str, path: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `results.json`, `.md`, `.csv` and `.png` from the record; each file is replaced atomically.

    Args:
        path: path of `results.json`; the others are beside it with the same stem.
        settings: settings of the group; only needed while it has no finished run.

    Returns:
        The content of `results.json`; see :func:`summary`.

    Raises:
        UserError: the path is another kind of file, or the disk is full; the record and the former files stay intact.
    """
    folder, stem = os.path.dirname(path) or ".", os.path.splitext(path)[0]
    check_results_path(path)
    try:
        os.makedirs(folder, exist_ok=True)
        # Locked from reading the record to the last replacement; otherwise another process could restore older files.
        with locked(folder):
            every = store.runs()
            runs = [run for run in every if run["group"] == group]
            others = [run for run in every if run["group"] != group]
            if runs:
                settings = runs[0]["settings"]
            results = summary(runs, settings or {}, group, store.failures(group), others)
            if results["tasks"]:
                write_file(f"{stem}.png", plot(results))
            write_file(f"{stem}.csv", csv_text(results))
            write_file(f"{stem}.md", markdown(results))
            write_file(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"results {path}: cannot be written: {error.strerror}; all finished runs are kept in {store.path}: free "
            "some space and rerun the command"
        ) from error
    return results


def over_seeds(title: str, metric: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the runs of one task.

    Returns:
        An entry of `tasks` in :func:`summary`.
    """
    runs = sorted(runs, key=lambda run: run["seed"])
    scores = [run["score"] for run in runs]
    known = [score for score in scores if score is not None]
    defined = len(known) == len(scores)
    metrics = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    return {
        "task": title,
        "metric": metric,
        "mean": statistics.fmean(known) if defined else None,
        "std": statistics.stdev(known) if defined and len(known) > 1 else None,
        "median": statistics.median(known) if defined else None,
        "best": max(known, default=None),
        "n": len(runs),
        "collapsed": sum(run["collapsed"] for run in runs),
        "metrics": {name: _mean([run["metrics"].get(name) for run in runs]) for name in metrics},
        "runs": [{key: value for key, value in run.items() if key not in GROUP_KEYS} for run in runs],
    }


def _other_groups(settings: dict[str, Any], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe each other group: its key, number of runs, source, and differing settings: key → [there, here]."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in others:
        groups.setdefault(run["group"], []).append(run)
    rows = []
    for key, runs in sorted(groups.items()):
        there = runs[0]["settings"]
        differs = {
            name: [there.get(name), settings.get(name)]
            for name in sorted(there.keys() | settings.keys())
            if there.get(name) != settings.get(name)
        }
        rows.append({"group": key, "runs": len(runs), "source": runs[0]["source"], "differs": differs})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def all_versions(runs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the library versions of the runs: package → versions."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for package, number in run.get("versions", {}).items():
            found.setdefault(package, set()).add(str(number))
    return {package: sorted(numbers) for package, numbers in found.items()}
