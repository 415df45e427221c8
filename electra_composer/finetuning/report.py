"""Report finetuning runs in Markdown and CSV.

A report states the finetuning protocol, the scores with the number of collapsed runs, and the published scores of
ELECTRA and its replication.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from electra_composer.finetuning.protocol import is_random, protocol
from electra_composer.finetuning.tasks import TASKS

COLLAPSED = "†"
AVERAGED = [name for name, task in TASKS.items() if task.in_average]  # the eight tasks of the paper's average


def headline(results: Mapping[str, Any]) -> str:
    """Return the title of the report."""
    return f"Dev scores × 100 of {model_name(results)}"


def model_name(results: Mapping[str, Any]) -> str:
    """Name the model that was finetuned."""
    return f"random weights with the sizes of {results['source']}" if is_random(results) else results["source"]


def markdown(results: Mapping[str, Any]) -> str:
    """Render the complete report of a :func:`electra_composer.finetuning.results.summary`."""
    parts = [f"# {headline(results)}" if results["tasks"] else "# No finished run yet", protocol(results)]
    if results["tasks"]:
        parts += [table(results), _collapsed_note(results)]
        if results["average"]["tasks"]:
            parts += ["## Comparison with published scores", published_table(results)]
    if results["failures"]:
        lines = [
            f"- {TASKS[each['task']].folder if each['task'] in TASKS else each['task']}, seed {each['seed']}, "
            f"{each['at']}: {' '.join(str(each['error']).split())}"
            for each in results["failures"]
        ]
        parts += ["## Failed runs", "Rerunning the same command retries them.", "\n".join(lines)]
    if results["other_groups"]:
        lines = []
        for other in results["other_groups"]:
            differs = ", ".join(f"{key} = {there} (here {here})" for key, (there, here) in other["differs"].items())
            lines.append(f"- group {other['group']}, {other['runs']} runs of {other['source']}: {differs}")
        parts += ["## Runs with other settings in the same record, not included here", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(results: Mapping[str, Any]) -> str:
    """Render a Markdown table with a row per task and, for two or more averaged tasks, their average."""
    rows = [["Task", "Metric", "Mean ± std", "Median", "Best", "n", "Score (seed)", "Other metrics (mean)"]]
    for row in results["tasks"].values():
        runs = ", ".join(
            f"{number(run['score'])}{COLLAPSED if run['collapsed'] else ''} ({run['seed']})" for run in row["runs"]
        )
        others = ", ".join(f"{name} {number(value)}" for name, value in row["metrics"].items() if name != row["metric"])
        spread = "" if row["std"] is None else f" ± {number(row['std'])}"
        mean, median, best = (number(row[key]) for key in ("mean", "median", "best"))
        rows.append([row["task"], row["metric"], mean + spread, median, best, str(row["n"]), runs, others])
    average = results["average"]
    if len(average["tasks"]) > 1:
        mean, median, best = (number(average[key], 2) for key in ("mean", "median", "best"))
        rows.append([average_name(results), "", mean, median, best, "", "", ""])
    return render(rows)


def average_name(results: Mapping[str, Any]) -> str:
    """Return the name of the average, which states the number of tasks if it is below eight."""
    count = len(results["average"]["tasks"])
    return "Average without WNLI" if count == len(AVERAGED) else f"Average of these {count}"


def published_table(results: Mapping[str, Any]) -> str:
    """Render these scores and the published ones, one row each; all averages are over the tasks of `results`.

    Column `Set` marks rows of a test set, which do not compare with dev scores.
    """
    names = results["average"]["tasks"]
    rows = [["Scores of", "Statistic", "Set", *(TASKS[name].folder for name in names), average_name(results)]]
    for statistic in ("mean", "median", "best"):
        scores = [number(results["tasks"][name][statistic]) for name in names]
        sizes = sorted({results["tasks"][name]["n"] for name in names})
        of = f"{statistic} of {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
        rows.append(["this", of, "dev", *scores, number(results["average"][statistic], 2)])
    notes = []
    for row in results["published"]:
        average = _average_of(row, names)
        if average is None:
            continue
        notes.append(f"{row['model']}: {row['source']}.")
        cells = [_as_published(row["scores"][name]) if name in row["scores"] else "" for name in names]
        rows.append([row["model"], row["statistic"], row["split"], *cells, number(average, 2)])
    return render(rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def csv_text(results: Mapping[str, Any]) -> str:
    """Render CSV: a line per task and the average, with a column per published row. Empty: undefined or unknown."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    published = results["published"]
    titles = [f"{row['model']}, {row['statistic']}, {row['split']}" for row in published]
    writer.writerow(["task", "metric", "mean", "std", "median", "best", "n", "collapsed", "scores by seed", *titles])
    for name, row in results["tasks"].items():
        numbers = [row[key] for key in ("mean", "std", "median", "best")]
        scores = "; ".join(f"{run['seed']}: {'' if run['score'] is None else run['score']}" for run in row["runs"])
        writer.writerow(
            [row["task"], row["metric"], *numbers, row["n"], row["collapsed"], scores]
            + [each["scores"].get(name) for each in published]
        )
    average = results["average"]
    if len(average["tasks"]) > 1:
        line = [average_name(results), "", average["mean"], "", average["median"], average["best"], "", "", ""]
        writer.writerow(line + [_average_of(row, average["tasks"]) for row in published])
    return file.getvalue()


def _collapsed_note(results: Mapping[str, Any]) -> str:
    """State how many runs collapsed on which tasks."""
    rows = results["tasks"].values()
    total, n = (sum(row[key] for row in rows) for key in ("collapsed", "n"))
    if not total:
        return f"None of the {n} runs collapsed to one class or value."
    where = ", ".join(f"{row['task']} {row['collapsed']} of {row['n']}" for row in rows if row["collapsed"])
    return f"{COLLAPSED} {total} of {n} runs collapsed to one class or value (included in the statistics): {where}."


def _average_of(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Return a published row's average over the given tasks; None if it lacks one of them."""
    if all(name in row["scores"] for name in names):
        return statistics.fmean(row["scores"][name] for name in names)
    return row["average"] if list(names) == AVERAGED else None


def number(value: float | None, digits: int = 1) -> str:
    return "nan" if value is None else f"{value:.{digits}f}"


def _as_published(value: float) -> str:
    """Format a score with the number of decimals it was published with, one or two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def render(rows: list[list[str]]) -> str:
    """Render a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)
