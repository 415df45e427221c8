"""The metrics file is read in columns; what is drawn of a column keeps its extremes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_runs import rows_of

from electra_composer.reports.metrics import extremes, find_metrics, moving_average, read_metrics


def test_columns_are_the_values_of_the_rows(tmp_path):
    rows = rows_of(40)
    rows[3]["metrics/train/rtd_loss"] = None  # not finite
    rows[4]["only/later"] = 1
    rows[5]["only/later"] = 1.5
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = read_metrics(str(path))
    assert set(metrics.columns) == {name for row in rows for name in row}
    for name in metrics.columns:
        found, values = metrics.series(name)
        expected = [(index, row[name]) for index, row in enumerate(rows) if row.get(name) is not None]
        assert list(zip(found.tolist(), values.tolist(), strict=True)) == expected
    assert (metrics.damaged, metrics.not_finite) == (0, 1)
    assert metrics.axes["step"].tolist() == [row["step"] for row in rows]
    np.testing.assert_allclose(metrics.axes["tokens"], [row["time/token"] for row in rows])
    # Logged in every fifth row, at a constant rate: between and after them it is interpolated.
    np.testing.assert_allclose(metrics.axes["hours"][5:], [row["step"] / 1e5 for row in rows[5:]], rtol=3e-3)


@pytest.mark.parametrize(
    ("more", "values", "damaged"),
    [
        ('{"step": 7, "metr', [], 1),  # cut off by a crash
        ('{"step": 1}}\n{"step": 2, "a": 4}\n', [4], 1),
        ('[]\n{"a": 1}\n{"step": 2, "a": "text"}\n{"step": 3, "a": 5}\n\x00\n{', [5], 5),
    ],
)
def test_damaged_lines_are_counted_and_left_out(tmp_path, more, values, damaged):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2.5}\n' + more)
    metrics = read_metrics(str(path))
    assert metrics.columns["a"].tolist() == [1, 2.5, *values]
    assert metrics.damaged == damaged


def test_csv_and_empty_files(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,a,b\n0,1.5,\n1,nan,2\n2,inf,3\n3,2")
    metrics = read_metrics(str(path))
    assert [each.tolist() for each in metrics.series("a")] == [[0], [1.5]]
    assert [each.tolist() for each in metrics.series("b")] == [[1, 2], [2, 3]]
    for name in ("metrics.jsonl", "metrics.csv"):
        (tmp_path / name).write_text("")
        empty = read_metrics(str(tmp_path / name))
        assert (empty.columns, empty.axes) == ({}, {})
    assert find_metrics(str(tmp_path)) == str(tmp_path / "metrics.jsonl")
    assert find_metrics(str(tmp_path), str(path)) == str(path)
    assert find_metrics(str(tmp_path / "no")) is None


@pytest.mark.parametrize("count", [1, 7, 200, 201, 1000, 9973])
def test_extremes_of_each_part_are_kept(count):
    values = np.random.default_rng(count).normal(size=count)
    places = extremes(values, 100)
    assert len(places) <= 202
    assert (np.diff(places) > 0).all()
    assert {0, count - 1, values.argmin(), values.argmax()} <= set(places.tolist())
    width = -(-count // 100)
    for start in range(0, count, width):
        part = values[start : start + width]
        kept = values[places[(places >= start) & (places < start + width)]]
        assert (kept.min(), kept.max()) == (part.min(), part.max())


@pytest.mark.parametrize(("count", "width"), [(1, 5), (4, 5), (50, 5), (50, 51)])
def test_moving_average_is_the_mean_around_each_value(count, width):
    values = np.random.default_rng(0).normal(size=count)
    expected = []
    for place in range(count):
        half = min(width // 2, place, count - 1 - place)
        expected.append(values[place - half : place + half + 1].mean())
    np.testing.assert_allclose(moving_average(values, width), expected, atol=1e-12)
