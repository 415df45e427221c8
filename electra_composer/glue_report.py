"""Statistics over models pretrained with different seeds: `python electra_composer/glue_report.py A/results.json …`.

The results are those of `glue.py` or `finetune.py`, one file per model. Source: table 4 of the README of
richarddwang/electra_pytorch; the best of 10 runs per task as in the paper, arXiv 2003.10555.
"""

from __future__ import annotations

if __name__ == "__main__":
    from electra_composer.program import begin

    begin()

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from electra_composer.arguments import ArgumentParser
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetuning.protocol import OF_SOURCE
from electra_composer.finetuning.published import PUBLISHED_MODELS
from electra_composer.finetuning.report import AVERAGED, number, render
from electra_composer.finetuning.results_file import read_results, tasks_of

BEST = "best"
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    BEST: max,
    "mean": statistics.fmean,
    "median": statistics.median,
}


def over_models(models: Mapping[str, Mapping[str, Any]], statistic: str = BEST) -> dict[str, Any]:
    """Compute statistics over pretraining runs; a model's score is the average over the tasks.

    A task's score is that of the best of its runs, as in the paper, or the mean or median of them. It is taken of the
    same number of runs per task and model, the fewest that any model has, in the order of their seeds, because the best
    of more runs is higher.

    Args:
        models: name → content of a results file of `glue.py` or `finetune.py`.
        statistic: a key of :data:`STATISTICS`.

    Returns:
        `statistic`; `runs`: number of runs; `tasks`: name → title; `models`: name → `scores` by task and `average`; and
        over the models' averages `mean`, sample `std` (None for one model), `max`, `min`.

    Raises:
        UserError: the models differ in tasks or protocol, a model is given twice, or a task has no score.
    """
    first, tasks = next(iter(models)), None
    seen: dict[str, str] = {}
    for name, results in models.items():
        mine = tasks_of(results)
        if tasks is None:
            tasks = mine
        if not tasks:
            raise UserError(f"{name}: no run of any GLUE task of the average; expected at least one")
        if mine != tasks:
            found, expected = (", ".join(each) or "none" for each in (mine, tasks))
            raise UserError(
                f"{name}: has the tasks {found}, but {first} has {expected}; finetune all on the same tasks"
            )
        _refuse_other_protocol(name, results["settings"], first, models[first]["settings"])
        weights = results["settings"].get(f"weights_sha256{OF_SOURCE}") or name
        if weights in seen:
            raise UserError(f"{name} and {seen[weights]} have the same weights; expected different pretraining runs")
        seen[weights] = name
    assert tasks is not None
    runs = min(results["tasks"][task]["n"] for results in models.values() for task in tasks)
    rows: dict[str, dict[str, Any]] = {}
    for name, results in models.items():
        scores = {task: _score_of(results["tasks"][task], runs, statistic, name) for task in tasks}
        rows[name] = {"scores": scores, "average": statistics.fmean(scores.values())}
    averages = [row["average"] for row in rows.values()]
    return {
        "statistic": statistic,
        "runs": runs,
        "tasks": {task: models[first]["tasks"][task]["task"] for task in tasks},
        "models": rows,
        "mean": statistics.fmean(averages),
        "std": statistics.stdev(averages) if len(averages) > 1 else None,
        "max": max(averages),
        "min": min(averages),
    }


def models_report(found: Mapping[str, Any]) -> str:
    """Render the result of :func:`over_models` in Markdown."""
    rows = [["Model", *found["tasks"].values(), "Average"]]
    for name, row in found["models"].items():
        rows.append([name, *(number(row["scores"][task]) for task in found["tasks"]), number(row["average"], 2)])
    keys = ("mean", "std", "max", "min")
    numbers = [["", "Mean", "Std", "Max", "Min", "Models"]]
    numbers.append(
        ["these", *("" if found[key] is None else number(found[key], 2) for key in keys), str(len(found["models"]))]
    )
    title = f"Dev scores × 100: the {found['statistic']} of {found['runs']} runs per task, averaged over the tasks"
    parts = [title, render(rows)]
    if list(found["tasks"]) == AVERAGED and found["statistic"] == BEST:
        published = [f"{PUBLISHED_MODELS[key]:.2f}" for key in keys]
        numbers.append(["ELECTRA-Small, best of 10", *published, str(PUBLISHED_MODELS["models"])])
        return "\n\n".join([*parts, render(numbers), f"- ELECTRA-Small, best of 10: {PUBLISHED_MODELS['source']}."])
    return "\n\n".join([*parts, render(numbers)])


def _refuse_other_protocol(name: str, settings: Mapping[str, Any], first: str, expected: Mapping[str, Any]) -> None:
    for key in sorted(settings.keys() | expected.keys()):
        about_source = key.endswith(OF_SOURCE) or key == "model.source"
        if not about_source and settings.get(key) != expected.get(key):
            raise UserError(
                f"{name}: was finetuned with {key} = {settings.get(key)}, but {first} with {expected.get(key)}; "
                "finetune all with the same settings"
            )


def _score_of(row: Mapping[str, Any], count: int, statistic: str, name: str) -> float:
    scores = [run["score"] for run in row["runs"][:count] if run["score"] is not None]
    if not scores:
        raise UserError(f"{name}: {row['task']} has no defined score in {count} runs; finetune it with more seeds")
    return STATISTICS[statistic](scores)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the statistics over the models of several results files."""
    parser = ArgumentParser(
        prog="python electra_composer/glue_report.py",
        description="Statistics over models pretrained with different seeds: a score per task, averaged over tasks.",
    )
    parser.add_argument("results", nargs="+", help="results.json of each model, written by glue.py or finetune.py")
    parser.add_argument("--statistic", choices=STATISTICS, default=BEST, help="of a task's runs (default: %(default)s)")
    options = parser.parse_args(arguments)
    if len(set(options.results)) < len(options.results):
        raise UserError("a results file is given twice; expected one per model")
    print(models_report(over_models({path: read_results(path) for path in options.results}, options.statistic)))


if __name__ == "__main__":
    main()
