"""pretrain.py with each objective: training, metrics by their names, and exact resumption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Kill, weights

from electra_composer.checkpoints.weights import read_checkpoint
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.pretrain import main
from electra_composer.training import trainer as trainer_module

RTD = {"rtd_loss", "rtd_accuracy", "rtd_precision", "rtd_recall", "replaced_share"}
MLM, LM, CLOZE = ({f"{name}_loss", f"{name}_accuracy"} for name in ("mlm", "lm", "cloze"))
SAMPLED = {"sampled_accuracy"}

CASES: dict[str, tuple[list[str], set[str]]] = {
    "mlm": (["objective.kind=mlm"], MLM),
    "replace_mlm": (["objective.kind=replace_mlm", "objective.generator=uniform"], SAMPLED | LM),
    "all_tokens_mlm": (["objective.kind=all_tokens_mlm"], SAMPLED | MLM | LM | {"copied_share"}),
    "electra_15": (["objective.kind=electra_15", "objective.mask_draw=bernoulli"], SAMPLED | MLM | RTD),
    "electric": (["objective.kind=electric", "model.sharing=gdes"], SAMPLED | CLOZE | RTD),
    "unigram": (["objective.generator=unigram"], SAMPLED | RTD),
    "frozen": (["objective.generator=frozen", "model.sharing=untied"], SAMPLED | MLM | RTD),
}
LENGTH = ["trainer.max_duration=6ba", "trainer.eval_interval=6ba", "checkpoints.interval=2ba"]


@pytest.fixture(scope="module")
def generator_run(write_tiny_yaml: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose generator others take."""
    folder = tmp_path_factory.mktemp("generator")
    main(load_config(str(write_tiny_yaml(folder)), [*LENGTH, "model.sharing=untied"], PretrainConfig))
    return folder / "run"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_training_and_exact_resumption(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator_run: Path, name: str
) -> None:
    keys, names = CASES[name]
    if name == "frozen":
        keys = [*keys, f"model.init_from={generator_run}"]

    def start(folder: str) -> Any:
        settings = [*LENGTH, *keys, f"checkpoints.folder={tmp_path / folder}"]
        return main(load_config(str(tiny_yaml), settings, PretrainConfig))

    expected = weights(start("uninterrupted"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "build_callbacks", lambda config: [Kill(after=3)])
        with pytest.raises(KeyboardInterrupt):
            start("interrupted")
    found = weights(start("interrupted"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key

    def metrics_of(split: str) -> dict[str, float]:
        prefix = f"metrics/{split}/"
        last: dict[str, float] = {}
        for row in rows(tmp_path / "uninterrupted"):
            last |= {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
        return last

    train, evaluated = metrics_of("train"), metrics_of("eval")
    assert {*train} >= names
    assert {*evaluated} == names | {"total_loss"} | ({"rtd_auc"} if "rtd_loss" in names else set())
    assert all(math.isfinite(value) for value in (*train.values(), *evaluated.values()))
    losses = [row["loss/train/total"] for row in rows(tmp_path / "uninterrupted") if "loss/train/total" in row]
    assert len(losses) == 6
    if name != "frozen":
        assert losses[-1] < losses[0]
        return
    begin = read_checkpoint(str(generator_run)).state
    kept = {key for key in begin if torch.equal(expected[f"model.{key}"], begin[key])}
    assert kept >= {key for key in begin if key.startswith(("generator", "mlm_head"))}
    assert not {key for key in kept if key.startswith("discriminator") and key.endswith("weight")}
