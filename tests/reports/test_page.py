"""The page is one file that loads nothing, and its numbers are those of the metrics file."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_runs import results_of, rows_of, write_run
from PIL import Image

from electra_composer.reports.differences import differences, flatten, nearest_shipped
from electra_composer.reports.page import compose, pictures, render
from electra_composer.reports.panels import choose_panels, lines_of
from electra_composer.reports.runs import read_run
from electra_composer.reports.stages import Stage
from electra_composer.reports.tokens import Token

LOADING = {"src", "href", "data", "poster", "srcset", "action"}


class Page(HTMLParser):
    """Collects what a page loads, its tags and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in LOADING and value is not None]

    def handle_data(self, data):
        self.texts.append(data)


def sources_of(page: str) -> list[dict[str, np.ndarray]]:
    """Return the columns of numbers of Bokeh's data sources in a page."""
    (text,) = re.findall(r"docs_json = '(.*?)';\n", page)
    found = []

    def visit(node):
        if isinstance(node, dict):
            if node.get("name") == "ColumnDataSource":
                entries = dict(node["attributes"]["data"]["entries"])
                found.append({name: decode(value) for name, value in entries.items() if isinstance(value, dict)})
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    def decode(value):
        return np.frombuffer(gzip.decompress(base64.b64decode(value["array"]["data"])), np.dtype(value["dtype"]))

    visit(json.loads(json.loads(f'"{text}"') if "\\" in text else text))
    return found


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run of 1M steps with a row every 100."""
    rows = rows_of(10_000)
    folder = write_run(tmp_path_factory.mktemp("runs") / "long", rows, trainer__max_duration="1000000ba")
    return folder, rows


def test_a_million_steps_in_one_small_file(long_run):
    folder, rows = long_run
    page = render(compose([read_run(str(folder))]))
    assert len(page.encode()) < 3_000_000
    parsed = Page(page)
    assert not [each for each in parsed.loaded if not each.startswith(("#", "data:"))]
    assert "http-equiv" not in page[:2000]
    assert {"html", "head", "body", "main", "table", "script"} <= set(parsed.tags)
    assert not re.search(r"@import|url\((?!data:)", "".join(re.findall(r"<style>.*?</style>", page, re.S)))
    losses = {row["step"]: row["metrics/train/mlm_loss"] for row in rows}
    sources = sources_of(page)
    (drawn,) = [each for each in sources if "y" in each and 99.0 in each["y"]]  # the spike is kept
    np.testing.assert_allclose(drawn["y"], [losses[int(step)] for step in drawn["step"]], rtol=1e-6)
    np.testing.assert_allclose(drawn["tokens"], drawn["step"] * 16384, rtol=1e-6)
    assert drawn["step"][[0, -1]].tolist() == [0, rows[-1]["step"]]
    assert min(losses.values()) == pytest.approx(drawn["y"].min())
    assert {"step", "tokens", "hours", "y"} <= drawn.keys()


def test_a_page_without_metrics_says_so(tmp_path):
    page = render(compose([read_run(str(write_run(tmp_path / "none")))]), refresh=7)
    text = " ".join(Page(page).texts)
    assert "no metrics file, so there are no curves" in text
    assert "There are no metrics to draw" in text
    assert "Not shown: the run has no checkpoint" in text
    assert '<meta http-equiv="refresh" content="7">' in page
    assert "<script>" in page
    assert pictures(compose([read_run(str(tmp_path / "none"))])) == {}


def test_names_are_escaped(tmp_path):
    folder = write_run(tmp_path / "run", few(rows_of(3)), run_name="'<b>&x</b>'")
    page = render(compose([read_run(str(folder))]))
    assert "Report of &lt;b&gt;&amp;x&lt;/b&gt;" in page
    assert "<b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_panels_are_of_the_metrics_that_there_are(tmp_path):
    rows = [
        {
            "step": step,
            "metrics/train/main_loss": 1.0 / (step + 1),
            "metrics/eval/main_auc": 0.5,
            "loss/train/main": 2.0,
        }
        for step in range(5)
    ]
    rows[0] |= {"trouble/loss_spikes": 1, "trainer/device_train_microbatch_size": 8}
    run = read_run(str(write_run(tmp_path / "run", rows)))
    panels = choose_panels([run])
    assert [(panel.title, [curve.metric for curve in panel.curves]) for panel in panels] == [
        ("Main loss", ["metrics/train/main_loss"]),
        ("loss/train/main", ["loss/train/main"]),
        ("Main auc", ["metrics/eval/main_auc"]),
        ("Loss spikes", ["trouble/loss_spikes"]),
    ]
    (line,) = lines_of(panels[0], [run])
    np.testing.assert_allclose(line.raw["y"], [1.0 / (step + 1) for step in range(5)])
    assert set(line.raw) == {"step", "y"}  # neither tokens nor time were logged
    (validation,) = lines_of(panels[2], [run])
    assert (line.curve, validation.curve) == (0, 1)  # as where both are in one panel
    assert len(render(compose([run]))) > 1_000_000


def few(rows):
    """Leave out most metrics, since each takes a moment to draw."""
    kept = {"step", "time/token", "metrics/train/mlm_loss", "metrics/eval/rtd_auc"}
    return [{name: value for name, value in row.items() if name in kept} for row in rows]


def test_several_runs_side_by_side(tmp_path):
    first = write_run(tmp_path / "first", few(rows_of(60)), run_name="one")
    second = write_run(tmp_path / "second", few(rows_of(200)), run_name="two", optimizer__lr="1e-4", seed="2")
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "results.json").write_text(json.dumps(results_of(str(second), {1: 71.0, 2: 73.0})))
    runs = [read_run(str(folder)) for folder in (first, second)]
    report = compose(runs)
    page = render(report)
    text = " ".join(" ".join(Page(page).texts).split())
    for said in ("Report of 2 runs", "5,900 of 16ba", "19,900 of 16ba", "two, pretrained (glue)", "72.00 ± 1.41"):
        assert said in text, said
    lines = dict(report.panels)[next(panel for panel, _ in report.panels if "masked-LM" in panel.title)]
    assert [line.run for line in lines] == [0, 1]
    rows = {each.key: each for each in differences([run.config for run in runs], None)}
    assert rows.keys() == {"run_name", "optimizer.lr", "seed"}
    assert rows["optimizer.lr"].values == ["0.005", "0.0001"]
    sizes = {name: Image.open(io.BytesIO(png)).size for name, png in pictures(report).items()}
    assert sizes.keys() == {"curves", "results"}
    assert min(min(size) for size in sizes.values()) > 200


def test_the_nearest_shipped_file_and_the_differences_from_it(tmp_path):
    folder = tmp_path / "run"
    found = nearest_shipped(read_run(str(write_run(folder, data__max_seq_length="16"))).config)
    assert found is not None
    name, shipped = found
    run = read_run(str(folder)).config
    rows = differences([run], shipped)
    assert {each.key for each in rows} == {
        key for key in {*flatten(run), *shipped} if flatten(run).get(key) != shipped.get(key)
    }
    small = nearest_shipped({**run, "model": {**run["model"], "num_layers": 12, "hidden_size": 256, "num_heads": 4}})
    assert name.endswith(".yaml")
    assert small is not None


@pytest.mark.parametrize(
    ("kind", "token", "shown", "title"),
    [
        (
            "electra",
            Token("film", 0, 1, True, "movie", True, True),
            'class="masked correct"|<del>film</del>movie',
            "film: masked, the generator put movie; judged replaced",
        ),
        (
            "electric",
            Token("film", 0, 1, True, "film", True, False, energy=2.46),
            'class="masked missed"|film',
            "film: masked, the generator put film; judged original; energy 2.5",
        ),
        (
            "mlm",
            Token("film", 0, 1, True, prediction="##s"),
            'class="masked wrong"|<del>film</del>⇒s',
            "film: masked; predicted ##s",
        ),
        (
            "replace_mlm",
            Token("film", 0, 1, True, "movie", True, prediction="film"),
            'class="masked correct"|<del>film</del>movie',
            "film: masked, the generator put movie; predicted film",
        ),
        (
            "all_tokens_mlm",
            Token("film", 0, 1, False, "film", prediction="it"),
            'class="wrong"|<del>film</del>⇒it',
            "film: predicted it",
        ),
    ],
)
def test_tokens_of_every_kind_of_objective(tmp_path, kind, token, shown, title):
    report = compose([read_run(str(write_run(tmp_path / "run")))])
    report.tokens = [("run", [Stage(7, kind, [[token]])], None)]
    (cell,) = re.findall(r'<div class="stage"><div>step 7</div>(.*?)\n', render(report))
    css, text = shown.split("|")
    assert f'<span {css} title="{title}">' in cell
    assert f'">{text}</span>' in cell
