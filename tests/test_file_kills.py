"""Files of runs and of finetuning, interrupted at any call that changes them: complete, and finished the next time."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from composer.core import Timestamp
from finetuning_runs import make_run, settings_of
from kill_points import interrupt_everywhere

from electra_composer.finetuning import results, store, synthetic
from electra_composer.finetuning.cache import write_cache
from electra_composer.finetuning.one_run import _save_weights
from electra_composer.finetuning.predictions import load_logits, save_logits, write_submission
from electra_composer.finetuning.store import RunStore
from electra_composer.finetuning.tasks import TASKS
from electra_composer.training.callbacks import RunRecord
from electra_composer.training.loggers import MetricsFile
from electra_composer.training.numerical_guard import PendingBatch, write_record

SETTINGS = settings_of()
ANSWERS = {"RTE.tsv": (TASKS["rte"], ["entailment", "not_entailment"] * 50)}
EXAMPLES = [synthetic.Labelled(f"sentence {number}", number % 2) for number in range(9)]


def write_run_record(folder: Path) -> None:
    record = RunRecord({"a": 1}, "a: 1\n", str(folder), {"vocab.txt": "[PAD]\n", "tokenizer.json": "{}"}, False)
    record.fit_start(None, SimpleNamespace(log_hyperparameters=lambda config: None))


def write_trouble(folder: Path) -> None:
    batch = PendingBatch(7, 0, {"input_ids": torch.arange(1000)}, loss=torch.tensor(float("nan")))
    torch.manual_seed(0)
    write_record(str(folder), batch, torch.nn.Linear(2, 2), loss=float("nan"), norm=1.0)


def write_metrics(folder: Path, kind: str) -> None:
    """Resume a run of 4 batches; its evaluation adds a column, which rewrites a CSV."""
    file = MetricsFile(str(folder / f"metrics.{kind}"))
    file.load_state_dict({"step": 1, "row": "{}"})
    file.fit_start(SimpleNamespace(timestamp=Timestamp(batch=1)), None)
    for step in range(1, 4):
        file.step = step
        file.keep({"loss": step / 2, **({"accuracy": 1.0} if step == 3 else {})})
        file.write_kept()
    file.close(None, None)


def write_runs(folder: Path) -> None:
    """Record a second run, and write the reports."""
    record = RunStore(str(folder / "runs.jsonl"))
    if not record.is_done("g", "sst2", 2):
        record.add(make_run("sst2", 2, 92.0, settings=SETTINGS))
    results.write_reports(record, "g", str(folder / "results.json"), {})


OPERATIONS = {
    "config.yaml and tokenizer": write_run_record,
    "record of a batch": write_trouble,
    "metrics.jsonl": lambda folder: write_metrics(folder, "jsonl"),
    "metrics.csv": lambda folder: write_metrics(folder, "csv"),
    "logits": lambda folder: save_logits(f"{folder}/a/logits.npz", {"sst2-dev": torch.arange(99.0)[:, None]}),
    "weights": lambda folder: _save_weights(f"{folder}/a/weights.safetensors", {"w": torch.arange(99.0)}),
    "cache": lambda folder: write_cache(f"{folder}/cache/a.npz", {"ids": np.arange(999), "ends": np.arange(9)}),
    "submission": lambda folder: write_submission(f"{folder}/a/submission.zip", ANSWERS),
}


def check_complete(path: Path) -> None:
    """Raise if a file is not complete; rows that are appended may end in an incomplete one, which readers ignore."""
    if path.suffix == ".npz":
        assert load_logits(str(path))
    elif path.suffix == ".safetensors":
        assert safetensors.torch.load_file(path)
    elif path.suffix == ".zip":
        assert zipfile.ZipFile(path).testzip() is None
    elif path.suffix in (".json", ".yaml", ".md", ".txt"):
        text = path.read_text()
        assert text.endswith(("\n", "}"))
        if path.suffix == ".json":
            json.loads(text)


@pytest.mark.parametrize("name", OPERATIONS)
def test_files_are_complete_and_the_same_when_written_again(tmp_path, name):
    def intact(folder):
        for path in folder.rglob("*"):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                check_complete(path)

    calls = interrupt_everywhere(tmp_path, OPERATIONS[name], intact=intact)
    assert any(call.startswith(("before replace ", "before rename ")) for call in calls)


def test_finished_runs_stay_recorded(tmp_path, monkeypatch):
    """Each interrupted record has the run before; reports have no run that the record lacks."""
    monkeypatch.setattr(results, "plot", lambda content: json.dumps(content).encode())  # takes 0.3 s
    monkeypatch.setattr(store, "_versions", dict)

    def intact(folder):
        recorded = len(RunStore(str(folder / "runs.jsonl")).runs())
        assert recorded in (1, 2)
        assert len(json.loads((folder / "results.json").read_text())["tasks"]["sst2"]["runs"]) in (1, recorded)

    def prepare(folder):
        record = RunStore(str(folder / "runs.jsonl"))
        record.add(make_run("sst2", 1, 91.0, settings=SETTINGS))
        results.write_reports(record, "g", str(folder / "results.json"), {})

    calls = interrupt_everywhere(tmp_path, write_runs, prepare, intact=intact)
    assert "in write runs.jsonl" in calls


def test_a_killed_synthetic_task_is_written_again(tmp_path):
    folder_of = os.path.join("glue", synthetic.TASK.folder)

    def write(folder):
        if not (folder / folder_of).exists():
            synthetic.write(str(folder / "glue"), EXAMPLES, EXAMPLES[:3], {"seed": 1})

    def intact(folder):
        if (folder / folder_of).exists():
            assert {path.name for path in (folder / folder_of).iterdir()} == {"train.tsv", "dev.tsv", "about.json"}

    interrupt_everywhere(tmp_path, write, intact=intact)
