"""Report finetuning runs in Markdown and CSV, and compute the paper's statistics over several pretraining runs.

    python -m electra_composer.finetuning.report A/results.json B/results.json …

A report states the finetuning protocol, the scores with the number of collapsed runs, and the published scores of
ELECTRA and its replication.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import argparse
import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetuning.protocol import OF_SOURCE, is_random, protocol
from electra_composer.finetuning.published import PUBLISHED_MODELS
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
            f"{_number(run['score'])}{COLLAPSED if run['collapsed'] else ''} ({run['seed']})" for run in row["runs"]
        )
        others = ", ".join(
            f"{name} {_number(value)}" for name, value in row["metrics"].items() if name != row["metric"]
        )
        spread = "" if row["std"] is None else f" ± {_number(row['std'])}"
        mean, median, best = (_number(row[key]) for key in ("mean", "median", "best"))
        rows.append([row["task"], row["metric"], mean + spread, median, best, str(row["n"]), runs, others])
    average = results["average"]
    if len(average["tasks"]) > 1:
        mean, median, best = (_number(average[key], 2) for key in ("mean", "median", "best"))
        rows.append([average_name(results), "", mean, median, best, "", "", ""])
    return _render(rows)


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
        scores = [_number(results["tasks"][name][statistic]) for name in names]
        sizes = sorted({results["tasks"][name]["n"] for name in names})
        of = f"{statistic} of {sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "")
        rows.append(["this", of, "dev", *scores, _number(results["average"][statistic], 2)])
    notes = []
    for row in results["published"]:
        average = _average_of(row, names)
        if average is None:
            continue
        notes.append(f"{row['model']}: {row['source']}.")
        cells = [_as_published(row["scores"][name]) if name in row["scores"] else "" for name in names]
        rows.append([row["model"], row["statistic"], row["split"], *cells, _number(average, 2)])
    return _render(rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


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


def over_models(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the paper's statistics over pretraining runs; a model's score is the average of its best run per task.

    The best is taken of the same number of runs per task and model, the fewest that any model has, in the order of
    their seeds, because the best of more runs is higher.

    Args:
        models: name → content of its results file.

    Returns:
        `best_of`: number of runs; `tasks`: names; `models`: name → `best` by task and `average`; and over the models'
        averages `mean`, sample `std` (None for one model), `max`, `min`.

    Raises:
        UserError: the models differ in tasks or protocol, a model is given twice, or a task has no score.
    """
    first, tasks = next(iter(models)), None
    seen: dict[str, str] = {}
    for name, results in models.items():
        if tasks is None:
            tasks = results["average"]["tasks"]
        if not tasks:
            raise UserError(f"{name}: no run of any GLUE task of the average; expected at least one")
        if results["average"]["tasks"] != tasks:
            found, expected = (", ".join(each) or "none" for each in (results["average"]["tasks"], tasks))
            raise UserError(
                f"{name}: has the tasks {found}, but {first} has {expected}; finetune all on the same tasks"
            )
        _refuse_other_protocol(name, results["settings"], first, models[first]["settings"])
        weights = results["settings"].get(f"weights_sha256{OF_SOURCE}") or name
        if weights in seen:
            raise UserError(f"{name} and {seen[weights]} have the same weights; expected different pretraining runs")
        seen[weights] = name
    assert tasks is not None
    best_of = min(results["tasks"][task]["n"] for results in models.values() for task in tasks)
    rows: dict[str, dict[str, Any]] = {}
    for name, results in models.items():
        best = {task: _best_of(results["tasks"][task], best_of, name) for task in tasks}
        rows[name] = {"best": best, "average": statistics.fmean(best.values())}
    averages = [row["average"] for row in rows.values()]
    return {
        "best_of": best_of,
        "tasks": tasks,
        "models": rows,
        "mean": statistics.fmean(averages),
        "std": statistics.stdev(averages) if len(averages) > 1 else None,
        "max": max(averages),
        "min": min(averages),
    }


def models_report(found: Mapping[str, Any]) -> str:
    """Render the result of :func:`over_models` in Markdown."""
    rows = [["Model", *(TASKS[task].folder for task in found["tasks"]), "Average"]]
    for name, row in found["models"].items():
        rows.append([name, *(_number(row["best"][task]) for task in found["tasks"]), _number(row["average"], 2)])
    keys = ("mean", "std", "max", "min")
    numbers = [["", "Mean", "Std", "Max", "Min", "Models"]]
    numbers.append(
        ["these", *("" if found[key] is None else _number(found[key], 2) for key in keys), str(len(found["models"]))]
    )
    parts = [f"Dev scores × 100: the best of {found['best_of']} runs per task, averaged over the tasks", _render(rows)]
    if found["tasks"] == AVERAGED:
        published = [f"{PUBLISHED_MODELS[key]:.2f}" for key in keys]
        numbers.append(["ELECTRA-Small, best of 10", *published, str(PUBLISHED_MODELS["models"])])
        return "\n\n".join([*parts, _render(numbers), f"- ELECTRA-Small, best of 10: {PUBLISHED_MODELS['source']}."])
    return "\n\n".join([*parts, _render(numbers)])


def read_results(path: str) -> dict[str, Any]:
    """Read a results file of `glue.py`.

    Raises:
        UserError: the file does not exist or is not a results file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            results = json.load(file)
        ours = isinstance(results["average"]["tasks"], list) and {"tasks", "settings"} <= results.keys()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a results.json that glue.py wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path}: not a results file; expected a results.json that glue.py wrote")
    return results


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


def _refuse_other_protocol(name: str, settings: Mapping[str, Any], first: str, expected: Mapping[str, Any]) -> None:
    for key in sorted(settings.keys() | expected.keys()):
        about_source = key.endswith(OF_SOURCE) or key == "model.source"
        if not about_source and settings.get(key) != expected.get(key):
            raise UserError(
                f"{name}: was finetuned with {key} = {settings.get(key)}, but {first} with {expected.get(key)}; "
                "finetune all with the same settings"
            )


def _best_of(row: Mapping[str, Any], count: int, name: str) -> float:
    scores = [run["score"] for run in row["runs"][:count] if run["score"] is not None]
    if not scores:
        raise UserError(f"{name}: {row['task']} has no defined score in {count} runs; finetune it with more seeds")
    return max(scores)


def _number(value: float | None, digits: int = 1) -> str:
    return "nan" if value is None else f"{value:.{digits}f}"


def _as_published(value: float) -> str:
    """Format a score with the number of decimals it was published with, one or two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _render(rows: list[list[str]]) -> str:
    """Render a Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the statistics over the models of several results files."""
    parser = argparse.ArgumentParser(
        prog="python -m electra_composer.finetuning.report",
        description="GLUE statistics over models pretrained with different seeds: best run per task, averaged.",
    )
    parser.add_argument("results", nargs="+", help="results.json of each model, written by glue.py")
    options = parser.parse_args(arguments)
    if len(set(options.results)) < len(options.results):
        raise UserError("a results file is given twice; expected one per model")
    print(models_report(over_models({path: read_results(path) for path in options.results})))


if __name__ == "__main__":
    main()
