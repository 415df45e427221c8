"""Compose the report: one HTML file that needs nothing else, and PNGs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from bokeh.models import Range1d
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from electra_composer.errors import UserError, one_line
from electra_composer.reports.charts import PALETTE, draw_panel, draw_results, embed, ends_of_axes, script_of_library
from electra_composer.reports.differences import differences, nearest_shipped
from electra_composer.reports.metrics import AXES
from electra_composer.reports.panels import GROUPS, Line, Panel, choose_panels, lines_of
from electra_composer.reports.pictures import plot_curves, plot_results
from electra_composer.reports.runs import Run
from electra_composer.reports.stages import Stage, stages_of
from electra_composer.reports.summary import Score, checkpoint_rows, history, scores, summary

SECTIONS = (
    ("summary", "Summary"),
    ("curves", "Curves"),
    ("tokens", "Tokens"),
    ("results", "Finetuning"),
    ("history", "Starts and checkpoints"),
    ("settings", "Settings"),
)


@dataclass
class Report:
    """Everything that a report shows of its runs."""

    runs: list[Run]
    panels: list[tuple[Panel, list[Line]]] = field(default_factory=list)
    tokens: list[tuple[str, list[Stage], str | None]] = field(default_factory=list)  # run, stages, why there are none
    scores: list[Score] = field(default_factory=list)


def compose(runs: list[Run], with_tokens: bool = True) -> Report:
    """Compute what the report shows.

    Args:
        with_tokens: read checkpoints and let their models fill and judge some rows.
    """
    panels = [(panel, lines_of(panel, runs)) for panel in choose_panels(runs)]
    return Report(runs, panels, [_tokens(run, with_tokens) for run in runs], scores(runs))


def _tokens(run: Run, wanted: bool) -> tuple[str, list[Stage], str | None]:
    if not wanted:
        return run.name, [], "left out (--no-tokens)"
    try:
        return run.name, stages_of(run), None
    except UserError as error:
        return run.name, [], str(error)
    except (OSError, KeyError, TypeError, RuntimeError) as error:  # of another version, or of another objective
        return run.name, [], f"its models cannot be shown: {type(error).__name__}: {one_line(error, 200)}"


def render(report: Report, refresh: int | None = None) -> str:
    """Render the page.

    Args:
        refresh: seconds after which a browser loads the file again; None: never.
    """
    runs = report.runs
    axes = ends_of_axes(runs)
    x_range = Range1d(0, axes.get("step", 1))
    curves = [draw_panel(panel, lines, runs, x_range) for panel, lines in report.panels]
    results = [draw_results(*each) for each in _results(report.scores)]
    script, elements = embed(curves, results, axes)
    marked = [Markup(element) for element in elements]
    placed = list(zip([panel.group for panel, _ in report.panels], marked, strict=False))
    shipped = nearest_shipped(runs[0].config)
    return _template().render(
        title=f"Report of {runs[0].name}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        refresh=refresh,
        css=Markup(_resource("page.css")),
        js=Markup(_resource("page.js")),
        library=Markup(script_of_library() if curves or results else ""),
        script=Markup(script),
        sections=SECTIONS,
        notes=[note for run in runs for note in run.notes],
        runs=runs,
        summary=summary(runs),
        axes=[(axis, AXES[axis]) for axis in axes],
        palette=PALETTE,
        restarts=any(run.restarts for run in runs),
        charts=[
            (group, [e for g, e in placed if g == group]) for group in GROUPS if any(g == group for g, _ in placed)
        ],
        tokens=report.tokens,
        scores=[(each.model, each.task, each.metric, each.mean, len(each.runs), _each(each)) for each in report.scores],
        result_charts=marked[len(curves) :],
        history=[(run, history(run), checkpoint_rows(run)) for run in runs],
        shipped=shipped and shipped[0],
        differences=differences([run.config for run in runs], shipped and shipped[1]),
    )


def pictures(report: Report) -> dict[str, bytes]:
    """Return PNGs by the ends of their names: `curves` and `results`, as far as there is something to draw."""
    found = {}
    if report.panels:
        found["curves"] = plot_curves(report.panels, report.runs)
    if report.scores:
        found["results"] = plot_results(report.scores)
    return found


def _each(score: Score) -> str:
    return ", ".join(f"{value:.2f} ({seed})" for seed, value in score.runs)


def _results(found: list[Score]) -> list[tuple[list[str], list[tuple[str, list[tuple[str, float, int]]]], str]]:
    """Group scores into one chart, since all are between 0 and 100 or close to it."""
    if not found:
        return []
    tasks = list(dict.fromkeys(score.task for score in found))
    metrics = list(dict.fromkeys(score.metric for score in found))
    points: dict[str, list[tuple[str, float, int]]] = {}
    for score in found:
        points.setdefault(score.model, []).extend((score.task, value, seed) for seed, value in score.runs)
    return [(tasks, list(points.items()), metrics[0] if len(metrics) == 1 else "score of each task")]


def _resource(name: str) -> str:
    return files("electra_composer.reports").joinpath(name).read_text(encoding="utf-8")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_resource("page.html"))
