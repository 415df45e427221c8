"""Reading GLUE from the hub, with a stub in place of `datasets.load_dataset`."""

from __future__ import annotations

import pytest

from electra_composer.errors import UserError
from electra_composer.finetuning.files import Example, read_examples
from electra_composer.finetuning.tasks import TASKS


def test_hub_rows_and_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [3.8], "idx": [7]})
    asked = []

    def load(*args: str, split: str) -> datasets.Dataset:
        asked.append((*args, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_examples(TASKS["stsb"], "dev", "hub") == [Example(("a", "b"), 3.8)]
    assert read_examples(TASKS["stsb"], "test", "hub") == [Example(("a", "b"), None, 7)]
    assert asked[0] == ("nyu-mll/glue", "stsb", "validation")
    with pytest.raises(UserError, match="no column 'sentence'; it has sentence1"):
        read_examples(TASKS["sst2"], "dev", "hub")

    def fail(*args: str, split: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="no route to host; check the connection"):
        read_examples(TASKS["sst2"], "dev", "hub")
    with pytest.raises(UserError, match="synthetic-words is not on the hub"):
        read_examples(TASKS["synthetic-words"], "dev", "hub")


HUB = {  # columns and class names as documented by nyu-mll/glue
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    "ax": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
}
HUB_SPLITS = {
    "mnli": ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"],
    "ax": ["test"],
}


@pytest.mark.parametrize("name", HUB)
def test_the_hub_s_columns_splits_and_class_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    columns, names = HUB[name]
    asked = []

    def load(dataset: str, configuration: str, split: str) -> datasets.Dataset:
        asked.append(split)
        labels = [-1] * len(names) if "test" in split else list(range(len(names)))
        rows = {column: [f"{column} {i}" for i in labels] for column in columns}
        features = {column: datasets.Value("string") for column in columns}
        features |= {"label": datasets.ClassLabel(names=names), "idx": datasets.Value("int32")}
        content = {**rows, "label": labels, "idx": [10 + i for i in range(len(labels))]}
        return datasets.Dataset.from_dict(content, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = TASKS[name]
    for split in task.splits:
        examples = read_examples(task, split, "hub")
        if "test" in split:
            assert [example.server_index for example in examples] == [10 + i for i in range(len(names))]
        else:
            assert [example.label for example in examples] == list(range(len(names)))
            assert examples[1].texts == tuple(f"{column} 1" for column in columns)
    assert asked == HUB_SPLITS.get(name, ["train", "validation", "test"])


def test_a_hub_that_numbers_classes_otherwise_or_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(dataset: str, configuration: str, split: str) -> datasets.Dataset:
        names = ["contradiction", "entailment", "neutral"] if configuration == "mnli" else ["negative", "positive"]
        content = {"premise": ["a"], "hypothesis": ["b"], "sentence": ["a"], "label": [-1]}
        rows = datasets.Dataset.from_dict(content)
        return rows.cast_column("label", datasets.ClassLabel(names=names))

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="contradiction, entailment, neutral; expected entailment, neutral, contr"):
        read_examples(TASKS["mnli"], "dev", "hub")
    with pytest.raises(UserError, match="sst2 validation row 0: label -1; expected 0 to 1"):
        read_examples(TASKS["sst2"], "dev", "hub")


@pytest.mark.parametrize("name", ["mnli", "qnli", "rte"])
def test_file_labels_are_numbered_as_on_the_hub(name: str) -> None:
    assert list(TASKS[name].labels) == HUB[name][1]
