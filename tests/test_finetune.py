"""finetune.py from files to results, models and predictions, for each kind of task; what is refused."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glue_tiny import WORDS, write_source
from tiny import ROOT
from transformers import pipeline

from electra_composer import finetune
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetune_config import FinetuneConfig

KINDS = ("classification", "regression", "tagging", "qa")


def sentence(rng: random.Random) -> list[str]:
    return rng.choices(WORDS, k=rng.randint(3, 9))


def write_kind(folder: Path, kind: str, rows: int, name: str, seed: int) -> str:
    """Write a data set that a tiny model can learn: `good` and `film` decide all labels."""
    rng = random.Random(seed)
    texts = [sentence(rng) for _ in range(rows)]
    if kind == "tagging":
        path = folder / f"{name}.conll"
        tags = {"film": "B-WORK", "plot": "B-WORK"}
        lines = ("".join(f"{word}\t{tags.get(word, 'O')}\n" for word in text) + "\n" for text in texts)
        path.write_text("".join(lines))
        return str(path)
    if kind == "qa":
        path = folder / f"{name}.jsonl"
        records = []
        for number, text in enumerate(texts):
            context = " ".join([*text, "film"])
            start = context.index("film")
            answers = {"text": ["film"], "answer_start": [start]}
            records.append({"id": str(number), "question": "the film", "context": context, "answers": answers})
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for text in texts:
            count = text.count("good")
            writer.writerow([" ".join(text), count if kind == "regression" else ("yes" if count else "no")])
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def make_config(source: str, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """`make_config(kind, *overrides)`: 64 training and 23 validation examples, one epoch, no layerwise decay."""

    def make(kind: str, *overrides: str) -> FinetuneConfig:
        settings = [
            f"model.source={source}",
            f"data.train={write_kind(tmp_path, kind, 64, 'train', 0)}",
            f"data.validation={write_kind(tmp_path, kind, 23, 'validation', 1)}",
            f"checkpoints.folder={tmp_path / 'run'}",
            "seeds=[1, 2]",
            "trainer.max_duration=2ep",
            "trainer.global_train_batch_size=8",
            "trainer.precision=fp32",
            "trainer.progress_bar=false",
            "optimizer.lr=1e-2",
            "optimizer.layerwise_decay=null",
        ]
        return load_config(str(ROOT / "yamls" / f"{kind}.yaml"), [*settings, *overrides], FinetuneConfig)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_from_files_to_a_model_of_transformers(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The best seed's model is kept, predicts the test set, and is what the second call finds done."""
    test = write_kind(tmp_path, kind, 11, "test", 2)
    config = make_config(kind, f"data.test={test}")
    results = finetune.main(config)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    row = results["tasks"][kind]
    assert [run["seed"] for run in row["runs"]] == [1, 2]
    assert all(len(run["epochs"]) == 2 for run in row["runs"])
    scores = [run["score"] for run in row["runs"]]
    assert row["mean"] == pytest.approx(sum(scores) / 2)
    best = max(row["runs"], key=lambda run: run["score"])
    assert [model["seed"] for model in results["models"]] == [best["seed"]]
    assert best["score"] == max(each["metrics"][row["metric"]] for each in best["epochs"])
    folder = tmp_path / "run" / results["models"][0]["folder"]
    assert {path.name for path in folder.parent.iterdir() if path.is_dir()} == {folder.name, "claims"}
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [prediction["index"] for prediction in predictions] == list(range(11))
    assert same_as_pipeline(kind, str(folder), test, predictions)
    assert (tmp_path / "run" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "seed 1" in (tmp_path / "run" / "results.md").read_text()
    capsys.readouterr()
    assert finetune.main(config)["tasks"] == results["tasks"]
    assert "2 of 2 runs done" in capsys.readouterr().out


def same_as_pipeline(kind: str, folder: str, test: str, predictions: list[dict[str, Any]]) -> bool:
    """Compare with transformers' pipeline on the first rows of the test set."""
    if kind == "tagging":
        blocks = Path(test).read_text().split("\n\n")[:3]
        found = pipeline("ner", folder, ignore_labels=[])
        for block, prediction in zip(blocks, predictions, strict=False):
            words = [line.split("\t")[0] for line in block.splitlines()]
            if [each["entity"] for each in found(" ".join(words))] != prediction["tags"]:
                return False
        return True
    if kind == "qa":
        records = [json.loads(line) for line in Path(test).read_text().splitlines()[:3]]
        found = pipeline("question-answering", folder, max_seq_len=32, doc_stride=8)
        answers = [found(question=record["question"], context=record["context"]) for record in records]
        return [answer["answer"] for answer in answers] == [each["answer"] for each in predictions[:3]]
    with open(test, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    found = pipeline("text-classification", folder)(texts)
    if kind == "regression":
        return [each["score"] for each in found] == pytest.approx([each["label"] for each in predictions], abs=1e-4)
    ours = [each["probabilities"][its["label"]] for its, each in zip(found, predictions, strict=True)]
    return [each["score"] for each in found] == pytest.approx(ours, abs=1e-5)


def test_all_models_are_kept_for_an_ensemble(make_config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    test = write_kind(tmp_path, "classification", 5, "test", 2)
    settings = [f"data.test={test}", "save=all", "predict.select=ensemble", "predict.calibrate=true", "epoch=last"]
    results = finetune.main(make_config("classification", *settings))
    assert {model["seed"] for model in results["models"]} == {1, 2}
    assert results["models"][0]["score"] >= results["models"][1]["score"]
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 5


def test_a_finetuned_model_is_a_source(
    make_config: Callable[..., FinetuneConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its head is left out, and said: two tasks one after the other."""
    first = finetune.main(make_config("classification", "seeds=[1]", "trainer.max_duration=1ep"))
    folder = tmp_path / "run" / first["models"][0]["folder"]
    second = make_config("tagging", f"model.source={folder}", f"checkpoints.folder={tmp_path / 'second'}", "seeds=[1]")
    assert finetune.main(second)["source"] == str(folder)
    assert f"{folder}: a finetuned model; its head (classifier) is not used" in caplog.text


def test_validation_is_drawn_from_training(
    make_config: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """By one order: a smaller sample of the training rows does not change the validation rows."""
    sizes = []
    for limit in ("null", "20"):
        config = make_config("classification", "data.validation=null", f"max_train_examples={limit}", "seeds=[1]")
        run = finetune.main(config)["tasks"]["classification"]["runs"][0]
        sizes.append((run["train_examples"], run["dev_examples"]))
    assert sizes == [(58, 6), (20, 6)]
    assert "6 of 64 rows of data.train, drawn by seed 42" in capsys.readouterr().out


def test_training_ends_when_the_score_stops_improving(make_config: Callable[..., FinetuneConfig]) -> None:
    stopper = "callbacks.early_stopper={monitor: accuracy, dataloader_label: eval, patience: 1ep}"
    config = make_config("classification", stopper, "trainer.max_duration=30ep", "seeds=[1]")
    run = finetune.main(config)["tasks"]["classification"]["runs"][0]
    assert run["epoch"] <= len(run["epochs"]) < 30


def test_a_check_writes_nothing(make_config: Callable[..., FinetuneConfig], tmp_path: Path) -> None:
    config = make_config("classification")
    assert finetune.main(config, check_only=True) == {}
    assert not (tmp_path / "run").exists()


REFUSED = {
    "data.columns.label=stars": "data.columns.label=stars: train.csv has no such column",
    "data.columns.lable=label": "data.columns.lable: no such column of this task",
    "task.metric=f1": "task.metric is 'f1'; expected one of accuracy",
    "task.scheme=iob2": "task.scheme is 'iob2', and task.kind is classification",
    "model.head=joint": "model.head is joint, which only qa has",
    "data.train=none.csv": "data.train none.csv: no such file",
    "predict.select=ensemble": "needs the models of all seeds; set save=all",
    "predict.select=7": "predict.select is '7'; expected best, ensemble, or one of the seeds",
    "trainer.max_duration=null": "trainer.max_duration is null",
    "data.max_seq_length=64": "data.max_seq_length is 64, but the model has 32 positions",
    "seeds=[1,1]": "seeds is",
    "callbacks.early_stopper={monitor: loss, dataloader_label: eval}": "monitor is 'loss'; expected one of accuracy",
    "data.validation_fraction=0.001 data.validation=null": "too few for data.validation_fraction",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_is_refused(make_config: Callable[..., FinetuneConfig], tmp_path: Path, words: str) -> None:
    config = make_config("classification", *([words] if "{" in words else words.split(" ")))
    with pytest.raises(UserError) as caught:
        finetune.main(config)
    assert REFUSED[words] in str(caught.value).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "run").exists()
