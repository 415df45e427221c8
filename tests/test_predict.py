"""predict.py: files and streams in, predictions in their order out; runs, ensembles, and bad input."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from task_models import build_source, outputs_of, random_model, split_of, task_of
from transformers import pipeline

from electra_composer import predict
from electra_composer.tasks import inference
from electra_composer.tasks.saved import load_model, save_model

TEXTS = [" ".join(f"w{(3 * i + j) % 94}" for j in range(1 + 7 * i % 11)) for i in range(23)]


@pytest.fixture
def source(tmp_path):
    return build_source(tmp_path)


@pytest.fixture
def run(source, tmp_path):
    """A run of two seeds, the second of which is better."""
    task = task_of("classification")
    task.learn(split_of([{"text": "w1", "label": label} for label in "abc"]))
    task.columns = {"text": "review", "text_pair": None, "label": "stars"}
    for seed in (1, 2):
        save_model(random_model(task, source, seed), task, source, 16, str(tmp_path / f"run/models/seed{seed}"))
    models = [{"seed": seed, "score": 90.0 + seed, "folder": f"models/seed{seed}"} for seed in (2, 1)]
    (tmp_path / "run/results.json").write_text(json.dumps({"models": models, "select": "best"}))
    return tmp_path / "run"


@pytest.fixture
def call(capsys):
    """`call(*arguments)`: the JSON lines of stdout."""

    def run_program(*arguments):
        predict.main([*map(str, arguments), "--device", "cpu"])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run_program


@pytest.fixture
def refused(capsys):
    """`refused(*arguments)`: the error of a call, one line."""

    def run_program(*arguments):
        with pytest.raises(SystemExit) as caught:
            predict.main([*map(str, arguments), "--device", "cpu"])
        assert caught.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if line.startswith("error: "))

    return run_program


def feed(monkeypatch, text):
    """Set stdin."""
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


def as_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_predictions_are_those_of_the_pipeline_in_the_order_of_the_file(run, call, tmp_path, monkeypatch):
    """Over several blocks and batches."""
    monkeypatch.setattr(predict, "BLOCK", 8)
    rows = [{"text": "w1", "review": text, "key": f"k{i}"} for i, text in enumerate(TEXTS)]  # trained on `review`
    as_csv(tmp_path / "new.csv", rows)
    out = tmp_path / "out.jsonl"
    call(run, "--input", tmp_path / "new.csv", "--output", out, "--copy", "key", "--batch-size", 3)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["index"], row["key"]) for row in found] == [(i, f"k{i}") for i in range(len(TEXTS))]
    expected = pipeline("text-classification", str(run / "models/seed2"), device="cpu", top_k=None)(TEXTS)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["label"] == theirs[0]["label"]
        assert mine["probabilities"] == pytest.approx({each["label"]: each["score"] for each in theirs}, abs=1e-5)


def test_a_table_as_output(run, call, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    call(run, "--input", tmp_path / "new.jsonl", "--output", tmp_path / "out.tsv", "--copy", "text")
    with open(tmp_path / "out.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["text"] for row in rows] == TEXTS
    assert all(max(chances := json.loads(row["probabilities"]), key=chances.get) == row["label"] for row in rows)


def test_stdin_to_stdout(run, call, monkeypatch):
    """Lines of text and JSON lines give the same; an empty line has a prediction too."""
    feed(monkeypatch, "w1 w2\n\nw3\n")
    texts = call(run)
    feed(monkeypatch, '{"text": "w1 w2"}\n{"text": ""}\n{"text": "w3"}\n')
    assert call(run) == texts
    assert [row["index"] for row in texts] == [0, 1, 2]
    feed(monkeypatch, '{"title": "w1 w2"}\n{"title": null}\n{"title": "w3"}')
    assert call(run, "--columns", "text=title") == texts


def test_an_ensemble_averages_the_outputs(run, source, call, tmp_path):
    (tmp_path / "new.txt").write_text("\n".join(TEXTS))
    arguments = ("--input", tmp_path / "new.txt", "--format", "text", "--select")
    best, one, both = (call(run, *arguments, select) for select in ("best", "1", "ensemble"))
    assert best == call(run, *arguments, "2") != one
    models = [load_model(str(run / f"models/seed{seed}")) for seed in (1, 2)]
    task = models[0].task
    split = split_of([{"text": text} for text in TEXTS], "input", label=None)
    rows = task.encode(task.tokenize(split, source.tokenizer), source.tokenizer, 16)
    mean = np.mean([np.stack(outputs_of(each.model, task, rows)) for each in models], axis=0)
    for row, expected in zip(both, task.predictions(rows, list(mean)), strict=True):
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)


def test_memory_holds_a_block_of_rows(monkeypatch, run, tmp_path):
    """A stream of rows is not read ahead of the block that is predicted."""
    read, seen = [], []
    monkeypatch.setattr(predict, "BLOCK", 4)
    predicted = inference.predict

    def watched(models, split, *rest):
        seen.append((len(split.table), len(read)))
        return predicted(models, split, *rest)

    monkeypatch.setattr(predict, "predict", watched)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=(read.append(1) or b"w1 w2\n" for _ in range(10))))
    predict.main([str(run), "--device", "cpu", "--output", str(tmp_path / "out")])
    assert seen == [(4, 5), (4, 9), (2, 10)]
    assert len((tmp_path / "out").read_text().splitlines()) == 10


def test_an_error_leaves_no_output(run, refused, tmp_path):
    path, out = tmp_path / "new.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"text": "w1"}\n{"text": ["w2"]}\n')
    assert f"{path}:2: text is a list; expected text" in refused(run, "--input", path, "--output", out)
    assert [each.name for each in tmp_path.iterdir() if "out" in each.name] == []


def test_what_cannot_be(run, refused, tmp_path, monkeypatch):
    as_csv(tmp_path / "new.csv", [{"opinion": "w1"}])
    new = ("--input", tmp_path / "new.csv")
    assert "set it, as in --columns text=opinion" in refused(run, *new)
    assert "no column titel; it has opinion" in refused(run, *new, "--columns", "text=opinion", "--copy", "titel")
    assert "expected role=column" in refused(run, *new, "--columns", "opinion")
    assert "--max-seq-length=100, but" in refused(run, *new, "--max-seq-length", 100)
    assert "expected best, ensemble, or one of the seeds [2, 1]" in refused(run, *new, "--select", "3")
    assert "is not a run of finetune.py" in refused(run / "models/seed1", *new, "--select", "best")
    assert "no finetuned model" in refused(tmp_path / "absent", *new)
    feed(monkeypatch, "")
    assert "stdin: no rows" in refused(run)
    feed(monkeypatch, "w1\n")
    assert "--format=csv of stdin; expected jsonl or text" in refused(run, "--format", "csv")
    (tmp_path / "run/results.json").write_text('{"models": [], "select": "best"}')
    assert "no saved models; finetune with save=best or save=all" in refused(run, *new)


def test_other_kinds_of_tasks(source, call, tmp_path, monkeypatch):
    """Sentences and questions, without their labels; documents are not divided between blocks."""
    monkeypatch.setattr(predict, "BLOCK", 1)
    tagging = task_of("tagging", context=True)
    learned = [{"tokens": ["w1", "w2"], "tags": ["B-X", "O"], "document": 1}]
    tagging.learn(split_of(learned, tokens="tokens", tags="tags", document="document"))
    save_model(random_model(tagging, source), tagging, source, 16, str(tmp_path / "tagging"))
    rows = [{"tokens": ["w1"], "document": 1}, {"tokens": ["w3", "w4"], "document": 1}, {"tokens": [], "document": 2}]
    feed(monkeypatch, "".join(json.dumps(row) + "\n" for row in rows))
    found = call(tmp_path / "tagging")
    assert [len(row["tags"]) for row in found] == [1, 2, 0]
    feed(monkeypatch, "".join(json.dumps(row) + "\n" for row in rows[1:2]))
    assert found[1]["scores"] != call(tmp_path / "tagging")[0]["scores"]  # with its neighbour as context, and without

    answering = task_of("qa")
    save_model(random_model(answering, source), answering, source, 24, str(tmp_path / "qa"))
    feed(monkeypatch, '{"id": "q7", "question": "w1", "context": "w5 w6 w7"}\n{"question": "w1", "context": "w8"}')
    first, second = call(tmp_path / "qa")
    assert (first["id"], second["answer"]) == ("q7", "w8")
    assert first["answer"] == "w5 w6 w7"[first["start"] : first["end"]]
