"""Sources of finetuning: every kind gives the same weights; unsuitable ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_tiny import write_source
from safetensors.torch import load_file, save_file
from tiny import TINY_YAML
from transformers import ElectraForMaskedLM, ElectraForPreTraining, ElectraForSequenceClassification, ElectraModel

from electra_composer.checkpoints.weights import Pretrained, load_source, read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.pretrain import main


def assert_same(found: Pretrained, expected: Pretrained) -> None:
    assert found.encoder == expected.encoder
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in expected.weights.items())
    assert found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


# --- checkpoints and exports of this package


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY_YAML.replace("SHARDS", str(shards)).replace("FOLDER", str(folder / "run")))
    overrides = ["trainer.max_duration=2ba", "schedule.warmup=1ba", "checkpoints.milestones=[1.0]"]
    main(load_config(str(folder / "tiny.yaml"), overrides, PretrainConfig))
    return folder / "run"


def test_checkpoint_run_folder_and_export_are_one_source(run_folder: Path, tmp_path: Path) -> None:
    expected = load_source(str(run_folder / "latest-rank0.pt"))
    export(read_checkpoint(str(run_folder)), str(tmp_path / "exported"))
    assert_same(load_source(str(run_folder)), expected)
    assert_same(load_source(str(tmp_path / "exported")), expected)
    assert_same(load_source(str(tmp_path / "exported" / "discriminator")), expected)


# --- models of transformers


def test_a_model_without_a_head_is_a_source(tmp_path: Path) -> None:
    expected = load_source(write_source(tmp_path / "whole"))
    ElectraForPreTraining.from_pretrained(tmp_path / "whole").electra.save_pretrained(write_source(tmp_path / "body"))
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == ["ElectraModel"]
    found = load_source(str(tmp_path / "body"))
    assert_same(found, expected)


def test_weights_in_a_pickle_in_half_precision_and_with_the_old_table_of_positions(tmp_path: Path) -> None:
    """Formats of google/electra-*-discriminator on the hub."""
    folder = tmp_path / "a"
    expected = load_source(write_source(folder))
    state = load_file(folder / "model.safetensors")
    state["electra.embeddings.position_ids"] = torch.arange(32)[None]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert_same(load_source(str(folder)), expected)
    (folder / "pytorch_model.bin").unlink()
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in state.items()}, folder / "model.safetensors"
    )
    found = load_source(str(folder))
    assert all(tensor.dtype == torch.float32 for tensor in found.weights.values())
    torch.testing.assert_close(found.weights, expected.weights, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda state: state.pop("electra.encoder.layer.1.output.dense.bias"),
            r"1 missing, such as .*layer.1.output.dense.bias\)",
        ),
        (
            lambda state: state.update({"electra.extra": torch.zeros(1)}),
            r"1 unexpected, such as electra.extra\)",
        ),
    ],
)
def test_missing_and_unexpected_weights(tmp_path: Path, spoil: Callable[[Any], None], message: str) -> None:
    folder = tmp_path / "a"
    write_source(folder)
    state = load_file(folder / "model.safetensors")
    spoil(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"not an ELECTRA discriminator \(weights: {message}"):
        load_source(str(folder))


def test_a_generator_is_no_discriminator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an ELECTRA generator \(ElectraForMaskedLM\), not a discriminator; expected"):
        load_source(write_source(tmp_path / "a", ElectraForMaskedLM))


def test_the_head_of_a_finetuned_model_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_source(tmp_path / "a", ElectraForSequenceClassification)
    found = load_source(source)
    assert found.rtd_head is None
    assert not [name for name in found.weights if not name.startswith(("embeddings.", "encoder."))]
    assert f"{source}: a finetuned model; its head (classifier) is not used" in caplog.text


def test_the_source_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    """Finetuning trains a copy of the source."""
    from electra_composer.finetuning.model import body_weights, build_classifier
    from electra_composer.finetuning.tasks import TASKS
    from electra_composer.glue_config import GlueModelConfig

    path = write_source(tmp_path / "a")
    source, again = load_source(path), load_source(path)
    model = build_classifier(source, TASKS["sst2"], GlueModelConfig(source=path))
    kept = body_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_same(source, again)
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.weights.items())
    assert ElectraModel.from_pretrained(path) is not None
