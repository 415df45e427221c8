"""Report of finetuning runs: tables, plot, published scores, statistics over several pretraining runs."""

from __future__ import annotations

import csv
import io
import statistics
import struct
from typing import Any

import matplotlib.figure
import pytest
from finetuning_runs import EIGHT, cells, make_results, settings_of

from electra_composer.finetuning.plot import plot
from electra_composer.finetuning.published import PUBLISHED, published_rows
from electra_composer.finetuning.report import (
    csv_text,
    headline,
    markdown,
    published_table,
    table,
)


def test_table_rows_and_average() -> None:
    results = make_results({"sst2": [80.0, 82.0, 90.0], "cola": [40.0], "wnli": [50.0], "synthetic-words": [99.0]})
    rows = {row[0]: row[1:] for row in cells(table(results))}
    std = f"{statistics.stdev([80, 82, 90]):.1f}"
    runs = "80.0 (1), 82.0 (2), 90.0 (3)"
    assert rows["SST-2"] == ["accuracy", f"84.0 ± {std}", "82.0", "90.0", "3", runs, ""]
    assert rows["CoLA"] == ["matthews", "40.0", "40.0", "40.0", "1", "40.0 (1)", "accuracy 40.0"]
    assert rows["Average of these 2"][1:4] == ["62.00", "61.00", "65.00"]  # without WNLI and the synthetic task
    alone = make_results({"sst2": [80.0], "wnli": [50.0]})
    assert "Average" not in table(alone)


def test_the_average_of_the_eight_has_its_name() -> None:
    results = make_results({name: [80.0] for name in [*EIGHT, "wnli"]})
    assert cells(table(results))[-1][:3] == ["Average without WNLI", "", "80.00"]


def test_collapsed_runs_are_marked_and_counted() -> None:
    results = make_results({"cola": [0.0, 40.0], "stsb": [None, 80.0, 81.0], "sst2": [90.0]})
    text = markdown(results)
    assert "0.0† (1), 40.0 (2)" in text
    assert "nan† (1), 80.0 (2), 81.0 (3)" in text
    assert (
        "† 2 of 6 runs collapsed to one class or value (included in the statistics): CoLA 1 of 2, STS-B 1 of 3." in text
    )
    assert cells(table(results))[-1][2] == "nan"  # not the average of the other tasks
    assert "None of the 1 runs collapsed" in markdown(make_results({"sst2": [90.0]}))


def test_the_protocol_stands_above_the_table() -> None:
    overrides = ("optimizer.lr=1e-4", "task_settings.rte.epochs=7", "task_settings.rte.lr=0.002")
    results = make_results({"rte": [60.0, 61.0], "stsb": [80.0], "sst2": [90.0]}, settings_of(*overrides))
    text = markdown(results)
    above = text[: text.index("| Task")]
    assert "3 epochs (SST-2) and 10 epochs (STS-B, RTE)" in above
    assert "batch 32, learning rate 0.0001, layerwise decay 0.8 (google)" in above
    assert "RTE: epochs 7, lr 0.002" in above
    assert "STS-B: pairs also swapped, targets unit" in above
    assert "every task from the pretrained weights, without an intermediate task" in above
    assert f"weights SHA-256 {'ab' * 6}…" in above
    assert "Seeds: 1 (SST-2, STS-B); 1–2 (RTE)." in above
    assert "Versions: torch 2.7.0." in above


def test_other_protocols_are_stated() -> None:
    overrides = ("optimizer.layerwise_decay=null", "trainer.max_duration=5ep", "double_unordered=false")
    overrides += ("max_train_examples=100", "model.random_init=true")
    results = make_results({"mrpc": [80.0]}, settings_of(*overrides, weights=None), started_from="mnli-seed1")
    text = markdown(results)
    assert headline(results) == "Dev scores × 100 of random weights with the sizes of a model"
    assert "5ep of training, batch 32, learning rate 0.0003, no layerwise decay" in text
    assert "a sample of at most 100 training examples" in text
    assert "MRPC: pairs not swapped" in text
    assert "every task from random weights, but MRPC from those of mnli-seed1." in text
    assert "weights SHA-256" not in text


def test_published_rows_are_what_their_sources_give() -> None:
    """The averages that richarddwang/electra_pytorch prints: 80.36 twice (table 1), 79.7 (table 2)."""
    rows = {row.model: row for row in PUBLISHED}
    averages = {name: statistics.mean(row.scores.values()) for name, row in rows.items() if row.scores}
    assert averages["ELECTRA-Small-OWT"] == pytest.approx(80.36, abs=0.005)
    assert averages["ELECTRA-Small-OWT (richarddwang)"] == pytest.approx(80.36, abs=0.005)
    assert averages["ELECTRA-Small++ (paper)"] == pytest.approx(79.7, abs=0.05)
    assert all(sorted(row.scores) == sorted(EIGHT) for row in PUBLISHED if row.scores)
    assert {row["model"] for row in published_rows(768)} == {"ELECTRA-Base (released)"}
    assert published_rows(128) == published_rows(256)  # no published row of this size: the smallest model


def test_published_averages_are_over_the_tasks_that_are_here() -> None:
    results = make_results({"cola": [50.0, 60.0], "sst2": [90.0, 92.0]})
    rows = {(row[0], row[1]): row[2:] for row in cells(published_table(results))}
    assert rows["Scores of", "Statistic"] == ["Set", "CoLA", "SST-2", "Average of these 2"]
    assert rows["this", "mean of 2"] == ["dev", "55.0", "91.0", "73.00"]
    assert rows["this", "best of 2"] == ["dev", "60.0", "92.0", "76.00"]
    assert rows["ELECTRA-Small-OWT", "median over many seeds"] == ["dev", "56.8", "88.3", "72.55"]
    assert rows["ELECTRA-Small-OWT (richarddwang)", "mean of 10"] == ["dev", "58.72", "88.03", "73.38"]
    assert rows["ELECTRA-Small++ (paper)", "as published"] == ["test", "55.6", "91.1", "73.35"]
    assert ("ELECTRA-Small (paper)", "average only") not in rows  # its average is of eight tasks
    full = cells(published_table(make_results({name: [80.0] for name in EIGHT})))
    assert ["ELECTRA-Small (paper)", "average only", "dev", *[""] * 8, "79.90"] in full
    assert "ELECTRA-Large (released)" in markdown(make_results({"cola": [60.0]}, settings_of(hidden_size=1024)))
    assert "published" not in markdown(make_results({"synthetic-words": [60.0]}))


def test_csv_has_every_number_in_full() -> None:
    results = make_results({"cola": [0.0, 100 / 3], "stsb": [None, 80.0], "wnli": [50.0]})
    rows = list(csv.DictReader(io.StringIO(csv_text(results))))
    assert [row["task"] for row in rows] == ["CoLA", "STS-B", "WNLI", "Average of these 2"]
    cola, stsb, wnli, average = rows
    assert float(cola["mean"]) == statistics.mean([0.0, 100 / 3])
    assert (cola["n"], cola["collapsed"], cola["scores by seed"]) == ("2", "1", f"1: 0.0; 2: {100 / 3}")
    assert (stsb["mean"], stsb["median"], stsb["best"]) == ("", "", "80.0")
    owt = "ELECTRA-Small-OWT, median over many seeds, dev"
    assert (cola[owt], wnli[owt], float(average[owt])) == ("56.8", "", pytest.approx((56.8 + 86.8) / 2))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the matplotlib figures that are saved."""
    found: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


def test_the_picture_has_every_run_the_mean_and_the_published_scores(figures: list[Any]) -> None:
    results = make_results({"cola": [0.0, 50.0, 58.0], "stsb": [None, 86.0], "synthetic-words": [70.0]})
    png = plot(results)
    assert png.startswith(b"\x89PNG")
    assert plot(results) == png
    panels = [axes for axes in figures[0].axes if axes.axison]
    assert [axes.get_title().strip() for axes in panels] == ["CoLA", "STS-B", "synthetic-words"]

    def heights(axes: Any, marker: str) -> list[float]:
        return sorted(float(y) for line in axes.lines if line.get_marker() == marker for y in line.get_ydata())

    cola, stsb, synthetic = panels
    assert (heights(cola, "o"), heights(cola, "X")) == ([50.0, 58.0], [0.0])
    assert heights(stsb, "o") == [86.0]
    assert "1 undefined" in stsb.get_xlabel()
    flat = {float(line.get_ydata()[0]) for line in cola.lines if line.get_marker() == "None"}
    assert flat == {36.0, 56.8, 58.72, 57.0}  # the mean, then published dev scores but no test scores
    assert len(synthetic.lines) == 2  # mean and run; no published scores
    for axes in panels:
        low, high = axes.get_ylim()
        assert all(low < float(y) < high for line in axes.lines for y in line.get_ydata())
        assert high - low >= 2.0


@pytest.mark.parametrize("count", [1, 5, 10])
def test_the_picture_grows_with_the_tasks(count: int) -> None:
    names = [*EIGHT, "wnli", "synthetic-words"][:count]
    width, height = struct.unpack(">II", plot(make_results({name: [80.0, 81.0] for name in names}))[16:24])
    assert 800 <= width <= 2000
    assert 400 <= height <= 1200
