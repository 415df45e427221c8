"""The results of finetuning: a JSON file that grows run by run, and a Markdown table beside it.

All scores are multiplied by 100, as papers print them. The file is the record of which runs are done: a later start
with the same settings does what is missing, one with other settings is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from electra_composer.checkpoint import Pretrained
from electra_composer.config import GlueConfig, to_dict
from electra_composer.errors import UserError
from electra_composer.glue_tasks import TASKS, Task
from electra_composer.vocabulary import vocabulary_sha256

PACKAGES = ("electra-composer", "torch", "mosaicml", "transformers", "torchmetrics")

# What may change between two starts that share a results file: it changes no score.
FREE_KEYS = ("run_name", "tasks", "seeds", "results", "checkpoints", "callbacks", "loggers")
FREE_SUBKEYS = (
    ("trainer", "progress_bar"),
    ("trainer", "log_interval"),
    ("trainer", "eval_interval"),
    ("trainer", "device_eval_batch_size"),
    ("data", "num_workers"),
)


def describe_source(source: Pretrained, random_init: bool) -> dict[str, Any]:
    """What was finetuned: the weights by their SHA-256, since a path such as `latest-rank0.pt` moves on."""
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


def new_results(config: GlueConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The document before the first run."""
    return {"config": to_dict(config), "source": source, "versions": _versions(), "tasks": {}, "average": None}


def load_results(config: GlueConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The document to continue: the one of `config.results` if it is of the same settings, else a new one.

    Raises:
        UserError: a file of other settings, or of any if `checkpoints.resume` is off, unless it may be overwritten; a
            file that is no results file.
    """
    fresh = new_results(config, source)
    path = config.results
    if config.checkpoints.overwrite or not os.path.lexists(path):
        return fresh
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        assert isinstance(found["tasks"], dict)
        there = _settings(found)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"results {path}: exists, but is not a results file; move it away or set results=…") from error
    here = _settings(json.loads(json.dumps(fresh)))
    way_out = "set another results=…, or checkpoints.overwrite=true to replace it"
    if not config.checkpoints.resume:
        raise UserError(f"results {path}: exists, and checkpoints.resume is false; {way_out}")
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise UserError(
                f"results {path}: holds runs with {key} = {there.get(key)}, now it is {here.get(key)}; {way_out}"
            )
    return {**fresh, "tasks": found["tasks"], "average": found["average"]}


def is_done(results: dict[str, Any], task: Task, seed: int) -> bool:
    runs = results["tasks"].get(task.name, {}).get("runs", [])
    return any(run["seed"] == seed for run in runs)


def add_run(results: dict[str, Any], task: Task, run: dict[str, Any]) -> None:
    """Add a finished run and bring the summaries up to date.

    Args:
        run: `seed`, `metrics` (name → score × 100, NaN if it is undefined) and whatever else is worth keeping.
    """
    row = results["tasks"].setdefault(task.name, {"task": task.folder, "metric": task.metrics[0], "runs": []})
    metrics = {name: value if math.isfinite(value) else None for name, value in run["metrics"].items()}
    row["runs"].append({**run, "score": metrics[task.metrics[0]], "metrics": metrics})
    row["runs"].sort(key=lambda each: each["seed"])
    row.update(_summary([each["score"] for each in row["runs"]]))
    results["tasks"] = {name: results["tasks"][name] for name in TASKS if name in results["tasks"]}
    means = [each["mean"] for name, each in results["tasks"].items() if not TASKS[name].is_synthetic]
    results["average"] = statistics.fmean(means) if means and None not in means else None


def save_results(results: dict[str, Any], path: str) -> None:
    """Write the JSON file and the Markdown table beside it; each is replaced in one move."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    _replace(path, json.dumps(results, indent=2, allow_nan=False) + "\n")
    _replace(os.path.splitext(path)[0] + ".md", f"{headline(results)}\n\n{table(results)}\n")


def headline(results: dict[str, Any]) -> str:
    """One line on what the table shows."""
    source = results["source"]
    weights = f"random weights of the sizes of {source['name']}" if source["random_init"] else source["name"]
    return f"Dev scores × 100 of {weights}"


def table(results: dict[str, Any]) -> str:
    """A Markdown table with a row per task and, of two or more real tasks, their average."""
    rows = [["Task", "Metric", "Mean ± std", "Median", "Best", "Score (seed)"]]
    for row in results["tasks"].values():
        runs = ", ".join(f"{_number(run['score'])} ({run['seed']})" for run in row["runs"])
        spread = "" if row["std"] is None else f" ± {_number(row['std'])}"
        mean, median, best = (_number(row[key]) for key in ("mean", "median", "best"))
        rows.append([row["task"], row["metric"], mean + spread, median, best, runs])
    if sum(not TASKS[name].is_synthetic for name in results["tasks"]) > 1:
        rows.append(["Average", "", _number(results["average"]), "", "", ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _summary(scores: list[float | None]) -> dict[str, float | None]:
    """Mean, sample standard deviation, median and best; None where a score is undefined."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return {"mean": None, "std": None, "median": None, "best": max(known, default=None)}
    return {
        "mean": statistics.fmean(known),
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "median": statistics.median(known),
        "best": max(known),
    }


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """What two sets of runs must share to stand in one table, flat."""
    config = {key: value for key, value in results["config"].items() if key not in FREE_KEYS}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        for subkey, subvalue in value.items() if isinstance(value, dict) else [(None, value)]:
            if (key, subkey) not in FREE_SUBKEYS:
                flat[f"{key}.{subkey}" if subkey else key] = subvalue
    for key in ("weights_sha256", "vocabulary_sha256"):
        flat[f"{key} of model.source"] = results["source"][key]
    return flat


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.1f}"


def _replace(path: str, text: str) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)
