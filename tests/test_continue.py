"""Continued pretraining end to end on tiny shards: `model.init_from` an export, without sizes in the YAML."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from comparison import Kill, weights

from electra_composer import pretrain
from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.export import export
from electra_composer.training import trainer as trainer_module
from electra_composer.training.preparation import initial_sizes

Load = Callable[..., PretrainConfig]


@pytest.fixture(scope="module")
def released(write_tiny_yaml: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrain and export, as the networks that somebody has released."""
    folder = tmp_path_factory.mktemp("released")
    path = write_tiny_yaml(folder)
    pretrain.main(load_config(str(path), ["trainer.max_duration=60ba", "checkpoints.interval=60ba"], PretrainConfig))
    export(read_checkpoint(str(folder / "run")), str(folder / "export"))
    return folder / "export" / "discriminator"


@pytest.fixture
def load(released: Path, tiny_yaml: Path) -> Load:
    """Return `load("key=value", …)`, the configuration of a run that continues from `released`."""
    content = yaml.safe_load(tiny_yaml.read_text(encoding="utf-8"))
    content["model"] = {"init_from": str(released)}
    tiny_yaml.write_text(yaml.safe_dump(content), encoding="utf-8")

    def make(*overrides: str) -> PretrainConfig:
        return load_config(str(tiny_yaml), list(overrides), PretrainConfig, initial_sizes)

    return make


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss/train/mlm"] for row in rows if "loss/train/mlm" in row]


def test_a_run_continues_where_the_released_networks_are(
    load: Load, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load()
    sizes = (config.model.num_layers, config.model.hidden_size, config.model.generator_size, config.model.max_positions)
    assert sizes == (1, 32, 0.5, 40)
    pretrain.main(config)
    line = f"initial weights: discriminator from {released}; generator from {released.parent / 'generator'}\n"
    assert line in capsys.readouterr().out
    before, after = losses(released.parents[1] / "run"), losses(tmp_path / "run")
    assert abs(after[0] - before[-1]) < 0.3 < before[0] - before[-1]  # where the other ended, not where it began
    assert "hidden_size: 32" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")


def test_a_killed_run_resumes_from_its_own_checkpoint(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = weights(pretrain.main(load(f"checkpoints.folder={tmp_path / 'uninterrupted'}")))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "build_callbacks", lambda config: [Kill(after=10)])
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(load())
    capsys.readouterr()
    continued = pretrain.main(load())
    assert "initial weights" not in capsys.readouterr().out
    for name, tensor in weights(continued).items():
        assert torch.equal(tensor, uninterrupted[name]), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.init_from=nowhere/at/all", "nowhere/at/all: no such file or folder"),
        ("model.hidden_size=64", r"has model\.hidden_size 32, this model 64; leave the sizes under model: out"),
        ("model.init_generator_from=nowhere/at/all", "nowhere/at/all"),
    ],
)
def test_what_does_not_fit_is_refused(load: Load, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pretrain.main(load(override))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
