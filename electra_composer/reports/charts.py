"""Draw panels with Bokeh, whose JavaScript is then part of the page."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.events import DocumentReady
from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    FactorRange,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure
from bokeh.resources import Resources

from electra_composer.reports.metrics import AXES
from electra_composer.reports.panels import Line, Panel
from electra_composer.reports.runs import Run

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and yellow; the blue is lighter, for a
# dark page.
PALETTE = ("#1f83c4", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("solid", "dashed", "dotted", "dotdash")
HEIGHT = 270  # pixels


def color_of(line: Line, several: bool) -> str:
    """Colours tell runs apart, or the curves of a single run."""
    return PALETTE[(line.run if several else line.curve) % len(PALETTE)]


def script_of_library() -> str:
    """Return Bokeh's JavaScript, as a script element."""
    # Without the parts for widgets, tables, WebGL and mathematics; the page would be 2.6 MB larger.
    return Resources(mode="inline", components=["bokeh"]).render_js()


def ends_of_axes(runs: list[Run]) -> dict[str, float]:
    """Return the axes that a run has, and the largest value of each over the runs."""
    ends: dict[str, float] = {}
    for axis in AXES:
        values = [float(run.metrics.axes[axis][-1]) for run in runs if axis in run.metrics.axes]
        if values:
            ends[axis] = max(max(values), 1e-9)
    return ends


def embed(curves: list[Any], results: list[Any], axes: dict[str, float]) -> tuple[str, list[str]]:
    """Return a script element, and the elements that it draws the figures into."""
    if not curves and not results:
        return "", []
    document = Document()
    for each in (*curves, *results):
        document.add_root(each)
    arguments = {"curves": curves, "results": results, "range": curves[0].x_range if curves else None}
    code = f"window.startReport(curves, results, range, { ({**axes})!r})"
    document.js_on_event(DocumentReady, CustomJS(args=arguments, code=code))
    script, elements = components((*curves, *results))
    return script, list(elements)


def draw_panel(panel: Panel, lines: list[Line], runs: list[Run], x_range: Range1d) -> Any:
    """Draw the curves of a panel over `step`. The page switches to other axes."""
    several = len(runs) > 1
    chart = _figure(panel.title, x_range=x_range)
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[00]a")
    items: dict[str, list[Any]] = {}
    for line in lines:
        color, dash = color_of(line, several), DASHES[line.curve % len(DASHES)] if several else "solid"
        raw = ColumnDataSource(line.raw)
        faint = line.smooth is not None
        found = [
            chart.line(
                "step",
                "y",
                source=raw,
                color=color,
                alpha=0.3 if faint else 1,
                line_width=1 if faint else 2,
                line_dash="solid" if faint else dash,
                name="raw" if faint else "line",
            )
        ]
        if line.is_evaluation or len(line.raw["y"]) == 1:
            found.append(chart.scatter("step", "y", source=raw, color=color, size=5, name="line"))
        if line.smooth is not None:
            smooth = ColumnDataSource(line.smooth)
            found.append(chart.line("step", "y", source=smooth, color=color, line_width=2, line_dash=dash, name="line"))
        chart.add_tools(_hover(found[-1], runs[line.run].name if several else "", line))
        items.setdefault(line.label, []).extend(found)
    _restarts(chart, runs, several)
    if len(items) > 1:
        legend = Legend(
            items=[LegendItem(label=label, renderers=found[::-1]) for label, found in items.items()],
            orientation="horizontal",
            click_policy="hide",
            padding=0,
            margin=4,
            border_line_alpha=0,
            background_fill_alpha=0,
            glyph_height=12,
            label_height=12,
            label_text_font_size="12px",
        )
        chart.add_layout(legend, "above")
    return chart


def _hover(renderer: Any, run: str, line: Line) -> HoverTool:
    """Create the tooltip of a line. `@` and `$` in a name would refer to columns."""
    curve = ", ".join(each for each in (run, line.label) if each).replace("@", "＠").replace("$", "＄")
    rows = [("curve", curve), ("value", "@y{0.[0000]}"), ("step", "@step{0,0}")]
    rows += [(title, f"@{axis}{{0.[00]a}}") for axis, title in AXES.items() if axis != "step" and axis in line.raw]
    return HoverTool(renderers=[renderer], tooltips=rows, line_policy="nearest", visible=False)


def _figure(title: str, **options: Any) -> Any:
    chart = figure(
        title=title,
        height=HEIGHT,
        sizing_mode="stretch_width",
        tools="xbox_zoom,reset,save",
        active_drag="xbox_zoom",
        toolbar_location="right",
        min_border=4,
        **options,
    )
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    # The page sets colours of text and lines for its light and dark theme.
    chart.background_fill_color = chart.border_fill_color = None
    chart.title.text_font_size = "14px"
    chart.axis.major_label_text_font_size = "11px"
    chart.axis.axis_label_text_font_size = "11px"
    chart.axis.minor_tick_line_color = None
    return chart


def _restarts(chart: Any, runs: list[Run], several: bool) -> None:
    """Draw a vertical line where a run was resumed."""
    for number, run in enumerate(runs):
        steps = np.array([session.start["batch"] for session in run.restarts], float)
        axes = run.metrics.axes
        if not len(steps) or "step" not in axes:
            continue
        places = {axis: np.interp(steps, axes["step"], column).astype(np.float32) for axis, column in axes.items()}
        color = PALETTE[number % len(PALETTE)] if several else "#888888"
        source = ColumnDataSource(places)
        chart.vspan(x="step", source=source, line_color=color, line_alpha=0.6, line_width=1, name="line")


def draw_results(titles: list[str], points: list[tuple[str, list[tuple[str, float, int]]]], metric: str) -> Any:
    """Draw the scores of finetuning: a point for each seed, a dash for their mean.

    Args:
        titles: of tasks, in their order on the axis.
        points: label of each model → task, score and seed of each run.
        metric: name of the score.
    """
    chart = _figure(f"Finetuning: {metric}", x_range=FactorRange(*titles))
    chart.toolbar.active_drag = None
    items = []
    for number, (label, runs) in enumerate(points):
        color, shift = PALETTE[number % len(PALETTE)], (number + 1) / (len(points) + 1) - 0.5
        xs: list[tuple[str, float]] = []
        for index, (title, _, _) in enumerate(runs):
            before = sum(other == title for other, _, _ in runs[:index])
            count = sum(other == title for other, _, _ in runs)
            xs.append((title, shift + 0.12 * ((before + 0.5) / count - 0.5)))
        data = {"x": xs, "y": [score for _, score, _ in runs], "seed": [seed for _, _, seed in runs]}
        source = ColumnDataSource(data)
        dots = chart.scatter("x", "y", source=source, size=9, fill_color=color, line_color=None, alpha=0.75)
        chart.add_tools(HoverTool(renderers=[dots], tooltips=[("score", "@y{0.00}"), ("seed", "@seed")]))
        known = [title for title in titles if any(other == title for other, _, _ in runs)]
        means = [float(np.mean([score for other, score, _ in runs if other == title])) for title in known]
        dashes = chart.scatter(
            [(title, shift) for title in known], means, marker="dash", size=26, line_color=color, line_width=2.5
        )
        items.append(LegendItem(label=label, renderers=[dots, dashes]))
    legend = Legend(
        items=items,
        orientation="horizontal",
        padding=0,
        margin=4,
        border_line_alpha=0,
        background_fill_alpha=0,
        label_text_font_size="12px",
        ncols=1,
    )
    chart.add_layout(legend, "above")
    return chart
