"""Describe the finetuning protocol above the table of scores: only scores of the same protocol are comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from electra_composer.finetuning.tasks import TASKS

OF_SOURCE = " of model.source"  # suffix of the settings that identify the source


def protocol(results: Mapping[str, Any]) -> str:
    """Return the protocol as a Markdown list; empty while no run is finished.

    The list gives the recipe, exceptions of single tasks, initial weights, source, seeds and versions.

    Args:
        results: see :func:`electra_composer.finetuning.results.summary`.
    """
    if not results["tasks"]:
        return ""
    settings = results["settings"]
    lines = [f"Finetuning: {', '.join(_recipe(results))}."]
    if exceptions := _exceptions(results):
        lines.append(f"Single tasks: {'; '.join(exceptions)}.")
    digests = {name: settings[f"{name}_sha256{OF_SOURCE}"] for name in ("weights", "vocabulary")}
    hashes = "".join(f"{name} SHA-256 {digest[:12]}…, " for name, digest in digests.items() if digest)
    versions = ", ".join(f"{name} {' and '.join(found)}" for name, found in results["versions"].items())
    lines += [
        _start(results),
        f"Source: {results['source']}, {hashes}group {results['group']}.",
        f"Seeds: {_seeds(results)}. Scores are those after the last epoch; std is that of a sample.",
        f"Versions: {versions}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def is_random(results: Mapping[str, Any]) -> bool:
    """Whether finetuning started from random weights: the baseline."""
    return bool(results["settings"].get("model.random_init"))


def _recipe(results: Mapping[str, Any]) -> list[str]:
    settings = results["settings"]
    decay, variant = (settings[f"optimizer.layerwise_{key}"] for key in ("decay", "variant"))
    recipe = [
        _epochs(results),
        f"batch {settings['trainer.global_train_batch_size']}",
        f"learning rate {settings['optimizer.lr']:g}",
        "no layerwise decay" if decay is None else f"layerwise decay {decay:g} ({variant})",
        f"{settings['schedule.name']} schedule with warmup {settings['schedule.warmup']}",
        f"at most {settings['data.max_seq_length']} tokens",
    ]
    if settings.get("loss_reduction") == "sum":
        recipe.append("loss summed over the batch")
    if settings["max_train_examples"] is not None:
        recipe.append(f"a sample of at most {settings['max_train_examples']} training examples")
    return recipe


def _epochs(results: Mapping[str, Any]) -> str:
    if duration := results["settings"]["trainer.max_duration"]:
        return f"{duration} of training"
    epochs: dict[int, list[str]] = {}
    for name in results["tasks"]:
        epochs.setdefault(TASKS[name].epochs, []).append(TASKS[name].folder)
    if len(epochs) == 1:
        return f"{next(iter(epochs))} epochs"
    return " and ".join(f"{count} epochs ({', '.join(tasks)})" for count, tasks in sorted(epochs.items()))


def _exceptions(results: Mapping[str, Any]) -> list[str]:
    """List deviations of single tasks from the recipe."""
    settings = results["settings"]
    parts = []
    for name, row in results["tasks"].items():
        changed = settings.get(f"task_settings.{name}") or {}
        words = [f"{key} {value}" for key, value in changed.items() if value is not None]
        if TASKS[name].swap_augmentation:
            words.append("pairs also swapped" if settings["double_unordered"] else "pairs not swapped")
        if name == "wnli" and settings.get("wnli") == "coreference":
            words.append("candidates for the pronoun ranked by the discriminator")
        if TASKS[name].is_regression:
            words.append(f"targets {settings['regression_targets']}")
        if words:
            parts.append(f"{row['task']}: {', '.join(words)}")
    return parts


def _start(results: Mapping[str, Any]) -> str:
    """State the initial weights, and the tasks that started from an intermediate task."""
    everything = f"every task from {'random' if is_random(results) else 'the pretrained'} weights"
    others = []
    for row in results["tasks"].values():
        if starts := [run["started_from"] for run in row["runs"] if run.get("started_from")]:
            others.append(f"{row['task']} from those of {', '.join(dict.fromkeys(starts))}")
    if others:
        return f"Start: {everything}, but {', '.join(others)}."
    return f"Start: {everything}, without an intermediate task."


def _seeds(results: Mapping[str, Any]) -> str:
    seeds: dict[str, list[str]] = {}
    for row in results["tasks"].values():
        seeds.setdefault(_ranges([run["seed"] for run in row["runs"]]), []).append(row["task"])
    if len(seeds) == 1:
        return next(iter(seeds))
    return "; ".join(f"{numbers} ({', '.join(tasks)})" for numbers, tasks in seeds.items())


def _ranges(numbers: list[int]) -> str:
    """Format ascending numbers as in `1–5, 8`."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in ends)
