"""Artefacts of version 0.1 load with today's code: run, configuration, export, finetuning record, conversion.

`tests/data/v0.1/make.sh` wrote them; all paths in them are relative to their folder.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import get_composer_env_dict
from tiny import ROOT
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import ElectraForMaskedLM, ElectraForPreTraining

from electra_composer import export, glue, pretrain
from electra_composer.checkpoints.safe_loading import read_file
from electra_composer.checkpoints.sharded import is_sharded, read_sharded
from electra_composer.checkpoints.weights import load_source, read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.glue_config import GlueConfig

ARTEFACTS = ROOT / "tests" / "data" / "v0.1"
MAKE = (ARTEFACTS / "make.sh").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a copy of the artefacts."""
    shutil.copytree(ARTEFACTS, tmp_path / "v0.1", symlinks=True)
    monkeypatch.chdir(tmp_path / "v0.1")


def files_in(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def rows_after(batch: int, path: str) -> list[dict[str, Any]]:
    """Rows of a metrics file after `batch`, without the metrics that may depend on the clock or the machine."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "throughput/", "memory/"))}
        for row in rows
        if row["step"] > batch
    ]


def computes_as_recorded(checkpoint: str) -> bool:
    """Whether torch and the CPU are those that wrote the checkpoint. Others may round differently."""
    metadata = read_file(checkpoint)["state"]["metadata"]
    recorded = metadata["torch_version"].split("+")[0], metadata["composer_env_info"]["cpu_model"]
    return recorded == (torch.__version__.split("+")[0], get_composer_env_dict()["cpu_model"])


def resume(*overrides: str) -> Any:
    """Resume pretraining and return the trainer; a state that was not restored is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is not in the state_dict")
        return pretrain.main(load_config("pretrain.yaml", list(overrides), PretrainConfig))


def test_a_pretraining_run_resumes_and_exports() -> None:
    exact = computes_as_recorded("run/batch-4-rank0.pt")
    assert resume().state.timestamp.batch.value == 8
    found, expected = (rows_after(4, path) for path in ("run/metrics.jsonl", "expected_metrics.jsonl"))
    name = "loss/train/total"
    losses, expected_losses = ([row[name] for row in rows if name in row] for rows in (found, expected))
    assert losses == pytest.approx(expected_losses, rel=0.05)
    export.main(["run", "exported"])
    files, expected_files = files_in("exported"), files_in("export")
    del files["README.md"]  # the model card is newer
    assert files.keys() == expected_files.keys()
    for network in ("discriminator", "generator"):  # since then, the tokenizer has the model's length
        name = f"{network}/tokenizer_config.json"
        changed, former = json.loads(files.pop(name)), json.loads(expected_files.pop(name))
        assert changed == {**former, "model_max_length": 32}
    if exact:
        assert found == expected
        assert files == expected_files


def test_the_configuration_of_a_run_loads() -> None:
    defaults = ["trainer.compile=false"]  # of 0.1, where they have changed since
    assert load_config("run/config.yaml", [], PretrainConfig) == load_config("pretrain.yaml", defaults, PretrainConfig)


def test_finished_finetuning_runs_are_not_repeated() -> None:
    runs, results = Path("finetune/runs.jsonl"), Path("finetune/results.json")
    before, expected = runs.read_bytes(), json.loads(results.read_text(encoding="utf-8"))
    results.unlink()
    settings = re.search(r'yamls/glue\.yaml" ((?:.*\\\n)*.*)', MAKE)
    assert settings is not None
    overrides = settings[1].replace("\\\n", "").split()
    glue.main(load_config(str(ROOT / "yamls/glue.yaml"), overrides, GlueConfig))
    assert runs.read_bytes() == before
    assert json.loads(results.read_text(encoding="utf-8")) == expected


def test_an_export_loads() -> None:
    source = load_source("export")
    assert source.rtd_head is not None
    assert source.encoder == read_checkpoint("run").discriminator
    for name, model_class in (("discriminator", ElectraForPreTraining), ("generator", ElectraForMaskedLM)):
        _, report = model_class.from_pretrained(f"export/{name}", output_loading_info=True)
        assert not any(report.values()), name


def test_an_unfinished_conversion_resumes() -> None:
    spec = importlib.util.spec_from_file_location("convert_owt", ROOT / "data_prep/convert_owt.py")
    assert spec is not None
    assert spec.loader is not None
    convert_owt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert_owt)
    record = json.loads(Path("unfinished.partial/records/00000.json").read_text(encoding="utf-8"))
    options = " ".join(re.findall(r"^options\+?=\((.*)\)$", MAKE, re.MULTILINE)).split()
    summary = convert_owt.main([*options, "--out", "unfinished"])
    assert summary.continued_tokens == sum(split["tokens"] for split in record["splits"].values())
    files = files_in("unfinished")
    assert json.loads(files.pop("plan.json"))["max_seq_length"]  # of newer versions
    assert files == files_in("shards")


def test_a_sharded_checkpoint_loads() -> None:
    """Two ranks wrote it. Its weights are those that torch's own converter finds in it."""
    assert is_sharded("sharded/batch-4")
    dcp_to_torch_save("sharded/batch-4", "converted.pt")
    expected = torch.load("converted.pt", weights_only=False)["state"]["model"]
    saved = read_sharded("sharded/batch-4")
    found, record = saved["model"], saved["callbacks"]["RunRecord"]
    assert "optimizers" not in saved
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert record["config"]["trainer"]["fsdp"]["state_dict_type"] == "sharded"
    checkpoint, single_file = read_checkpoint("sharded"), read_checkpoint("run")
    checkpoint.build_model()
    assert checkpoint.tokens == single_file.tokens > 0
    assert checkpoint.state.keys() == single_file.state.keys()
    assert checkpoint.tokenizer.get_vocab() == single_file.tokenizer.get_vocab()
