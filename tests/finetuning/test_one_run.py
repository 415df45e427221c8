"""Finetuning runs: their logits and weights, from training to a submission."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_tiny import NLI, settings, write_data, write_source
from safetensors.torch import load_file
from tiny import ROOT

from electra_composer import glue
from electra_composer.checkpoints.weights import load_source
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.finetuning import one_run
from electra_composer.finetuning.data import encode_split
from electra_composer.finetuning.one_run import RunFiles, TaskData, finetune
from electra_composer.finetuning.predictions import format_predictions, load_logits
from electra_composer.finetuning.runs import PlannedRun
from electra_composer.finetuning.tasks import TASKS
from electra_composer.glue_config import GlueConfig
from electra_composer.tasks.encoded import collate
from electra_composer.training.startup import start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_source(folder / "source"), write_data(folder / "data", tests=True)


@pytest.fixture
def make_config(tiny: tuple[str, str], tmp_path: Path) -> Callable[..., GlueConfig]:
    common = ["trainer.max_duration=1ep", "trainer.device_eval_batch_size=4", "predict.enabled=true"]

    def make(*overrides: str) -> GlueConfig:
        overrides = (*settings(*tiny, tmp_path), *common, *overrides)
        return load_config(str(ROOT / "yamls" / "glue.yaml"), list(overrides), GlueConfig)

    return make


class Recorder:
    """Record the runs that `glue.main` trains, and the weights each model is built from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[str] = []
        self.started: dict[str, Any] = {}  # run → weights of its source
        self._build, self._finetune = one_run.build_classifier, finetune
        monkeypatch.setattr(one_run, "build_classifier", self.build)
        monkeypatch.setattr(glue, "finetune", self.finetune)

    def build(self, source: Any, *rest: Any) -> Any:
        if self.trained:  # not the trial build before the first run
            self.started[self.trained[-1]] = source.weights
        return self._build(source, *rest)

    def finetune(self, config: Any, source: Any, run: Any, *rest: Any) -> dict[str, Any]:
        self.trained.append(run.name)
        return self._finetune(config, source, run, *rest)


def predictions(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    return {name: [line.split("\t")[1] for line in text.splitlines()[1:]] for name, text in texts.items()}


@pytest.mark.slow
def test_from_runs_to_a_submission(
    make_config: Callable[..., GlueConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorder = Recorder(monkeypatch)
    trained, started = recorder.trained, recorder.started
    tasks, file = "tasks=[rte, mnli, ax, stsb, sst2]", tmp_path / "run" / "submission.zip"
    results = glue.main(make_config(tasks, "seeds=[1, 2]", "intermediate=true"))
    (group,) = (tmp_path / "run").glob("*/logits")

    # MNLI has both dev sets at every evaluation, both test sets, and AX.
    mnli = results["tasks"]["mnli"]
    assert (
        set(mnli["runs"][0]["metrics"]) == set(mnli["runs"][0]["epochs"][0]["metrics"]) == {"accuracy", "accuracy_mm"}
    )
    assert mnli["runs"][0]["dev_examples"] == 46
    found = predictions(file)
    assert {name: len(lines) for name, lines in found.items()} == dict.fromkeys(
        ["SST-2.tsv", "STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv", "AX.tsv"], 11
    )
    best = max(mnli["runs"], key=lambda run: run["score"])["seed"]
    logits = load_logits(str(group / f"mnli-seed{best}.npz"))
    assert found["AX.tsv"] == [NLI[index] for index in logits["ax-test"].argmax(-1).tolist()]
    out = capsys.readouterr().out
    assert "the GLUE server expects a complete submission: no CoLA.tsv, MRPC.tsv, QQP.tsv, QNLI.tsv, WNLI.tsv" in out

    # RTE and STS-B start from the MNLI run of the same seed, SST-2 from the source.
    for name, started_from in (("rte", "mnli-seed2"), ("stsb", "mnli-seed2"), ("sst2", None)):
        assert results["tasks"][name]["runs"][1]["started_from"] == started_from
    kept = load_file(group.parent / "weights" / "mnli-seed2.safetensors")
    assert started["rte-seed2"].keys() == kept.keys() == started["sst2-seed2"].keys()
    assert all(torch.equal(started["rte-seed2"][name], tensor) for name, tensor in kept.items())
    word = "embeddings.word.weight"
    assert not torch.equal(started["rte-seed2"][word], started["sst2-seed2"][word])

    # Another selection of runs trains nothing.
    count = len(trained)
    glue.main(make_config(tasks, "seeds=[1, 2]", "intermediate=true", "predict.select=ensemble"))
    assert len(trained) == count == 8
    both = [load_logits(str(group / f"rte-seed{seed}.npz"))["rte-test"] for seed in (1, 2)]
    expected = format_predictions(TASKS["rte"], torch.stack(both).mean(0))
    assert predictions(file)["RTE.tsv"] == expected

    # Without the weights from which other runs start, or the logits of finished runs, no run starts.
    (group.parent / "weights" / "mnli-seed1.safetensors").unlink()
    with pytest.raises(UserError, match=r"mnli-seed1.safetensors: no such file, but runs of RTE"):
        glue.main(make_config(tasks, "seeds=[1, 2, 3]", "intermediate=true", "predict.enabled=false"))
    (group / "sst2-seed1.npz").unlink()
    with pytest.raises(UserError, match=r"sst2-seed1.npz: no such file: the run had predict.enabled=false"):
        glue.main(make_config("tasks=[sst2, mnli]", "seeds=[1, 2, 3]", "intermediate=true"))
    assert len(trained) == count


def test_logits_are_in_the_order_of_the_file(
    make_config: Callable[..., GlueConfig], tiny: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are sorted by length; the logits equal those of the model on single rows in the order of the file."""
    config = make_config("optimizer.lr=1e-12")
    start(config)
    task, source = TASKS["sst2"], load_source(config.model.source)
    split = {name: encode_split(task, name, tiny[1], source.tokenizer, 24) for name in ("train", "dev", "test")}
    lengths = split["test"].lengths
    assert sorted(lengths, reverse=True) != list(lengths)
    models: list[Any] = []
    build = one_run.build_classifier

    def kept(*arguments: Any) -> Any:
        models.append(build(*arguments))
        return models[-1]

    monkeypatch.setattr(one_run, "build_classifier", kept)
    files = RunFiles(os.path.join(config.checkpoints.folder, "group"))
    data = TaskData(split["train"], {"dev": split["dev"]}, {"sst2-test": split["test"]})
    record = finetune(config, source, PlannedRun(task, 1, 64), data, files)
    assert json.dumps(record)
    logits = load_logits(files.logits("sst2-seed1"))["sst2-test"]
    with torch.no_grad():
        alone = torch.cat([models[0].eval()(collate([split["test"][i]], 0)) for i in range(len(lengths))])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
