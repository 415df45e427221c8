"""Tests of config_loading.py: values, overrides, entry points, saving, and the shipped YAMLs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from complete_config import COMPLETE, KEYS, load, write
from tiny import ROOT, schema_of

from electra_composer.config import FSDPConfig, PretrainConfig
from electra_composer.config_loading import load_config, load_config_from_command_line, to_dict, to_yaml
from electra_composer.errors import UserError, report_user_errors

SHIPPED = sorted((ROOT / "yamls").rglob("*.yaml"))


def test_values_defaults_and_interpolation(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert isinstance(config, PretrainConfig)
    assert config.model.hidden_size == 32
    assert config.optimizer.lr == 5e-4
    assert isinstance(config.optimizer.lr, float)
    assert config.checkpoints.folder == "runs/test"
    assert config.optimizer.betas == [0.9, 0.999]
    assert config.trainer.precision == "amp_bf16"
    assert config.trainer.fsdp is None
    assert config.callbacks == {}


def test_defaults_are_the_recipe(tmp_path: Path) -> None:
    """The defaults are those of the paper's code."""
    config = load(tmp_path)
    optimizer, objective, model = config.optimizer, config.objective, config.model
    assert (optimizer.eps, optimizer.weight_decay, optimizer.bias_correction) == (1e-6, 0.01, False)
    assert config.trainer.gradient_clip == 1.0
    assert config.schedule.name == "electra"
    assert (objective.mask_prob, objective.mask_style) == (0.15, "electra")
    assert (objective.gen_weight, objective.disc_weight, objective.temperature) == (1.0, 50.0, 1.0)
    assert not objective.disallow_correct
    assert objective.mlm_label_smoothing == objective.rtd_label_smoothing == 0.0
    assert model.dropout == model.attention_dropout == 0.1
    assert (model.initializer_range, model.layer_norm_eps, model.sharing) == (0.02, 1e-12, "tied")


# Overrides


def test_the_command_line_wins_and_its_last_word_counts(tmp_path: Path) -> None:
    config = load(tmp_path, "optimizer.lr=1e-3", "run_name=first", "run_name=second", "optimizer.betas=[0.9,0.98]")
    assert config.optimizer.lr == 1e-3
    assert config.run_name == "second"
    assert config.optimizer.betas == [0.9, 0.98]
    assert config.checkpoints.folder == "runs/second"  # interpolations see the overrides
    assert config.model.hidden_size == 32


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("data.path=s3://a=b/c", "data", "path", "s3://a=b/c"),
        ("data.path=${run_name}/x", "data", "path", "test/x"),
        ("trainer.compile=true", "trainer", "compile", True),
        ("trainer.gradient_clip=null", "trainer", "gradient_clip", None),
        ("trainer.device_train_microbatch_size=auto", "trainer", "device_train_microbatch_size", "auto"),
        ("trainer.device_train_microbatch_size=8", "trainer", "device_train_microbatch_size", 8),
        ("checkpoints.milestones=[0.25,1]", "checkpoints", "milestones", [0.25, 1.0]),
        ("model.generator_layers=1", "model", "generator_layers", 1),
        ("objective.sampling=gumbel", "objective", "sampling", "gumbel"),
    ],
)
def test_override(tmp_path: Path, override: str, section: str, key: str, expected: Any) -> None:
    found = getattr(getattr(load(tmp_path, override), section), key)
    assert found == expected
    assert type(found) is type(expected)


def test_a_missing_value_may_come_from_the_command_line(tmp_path: Path) -> None:
    text = COMPLETE.replace("optimizer: {lr: 5e-4}\n", "")
    assert load(tmp_path, "optimizer.lr=2e-4", text=text).optimizer.lr == 2e-4


def test_fsdp_with_its_defaults(tmp_path: Path) -> None:
    """`{}` turns FSDP on and `null` selects DDP, both from the file and from the command line."""
    in_file = COMPLETE.replace("device_eval_batch_size: 4}", "device_eval_batch_size: 4, fsdp: {}}")
    assert load(tmp_path, text=in_file).trainer.fsdp == FSDPConfig()
    assert load(tmp_path, "trainer.fsdp={}").trainer.fsdp == FSDPConfig()
    assert load(tmp_path, "trainer.fsdp.verbose=true").trainer.fsdp == FSDPConfig(verbose=True)
    assert load(tmp_path, "trainer.fsdp=null", text=in_file).trainer.fsdp is None


def test_callbacks_and_loggers_are_free_here(tmp_path: Path) -> None:
    """Their names and arguments are checked later, by the builder."""
    config = load(tmp_path, "callbacks.anything.window=5", "loggers.wandb={}")
    assert config.callbacks == {"anything": {"window": 5}}
    assert config.loggers == {"wandb": {}}


# Entry points


@pytest.mark.parametrize(("first", "last"), [([], []), (["--check"], []), ([], ["--check"])])
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: list[str], last: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *first, write(tmp_path, COMPLETE), "seed=7", *last])
    config, check_only = load_config_from_command_line(PretrainConfig, "usage")
    assert config.seed == 7
    assert check_only == bool(first or last)


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        load_config_from_command_line(PretrainConfig, "composer pretrain.py FILE")
    assert caught.value.code == code
    assert "usage: composer pretrain.py FILE" in capsys.readouterr().out


def test_user_errors_are_one_line_and_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    @report_user_errors
    def main(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main(UserError("first\n  second"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"
    with pytest.raises(ValueError, match="ours"):
        main(ValueError("ours"))


# Saving with the run


def test_round_trip(tmp_path: Path) -> None:
    """The resolved configuration, saved, loads to itself."""
    config = load(tmp_path, "trainer.fsdp={}", "callbacks.speed.window=5", "trainer.device_train_microbatch_size=auto")
    text = to_yaml(config)
    assert "${" not in text
    assert load(tmp_path, text=text) == config
    assert yaml.safe_load(text) == to_dict(config)
    assert to_dict(config)["checkpoints"]["folder"] == "runs/test"


def test_saved_keys_are_in_schema_order(tmp_path: Path) -> None:
    text = to_yaml(load(tmp_path))
    tops = [line.split(":")[0] for line in text.splitlines() if line and not line.startswith((" ", "-"))]
    assert tops[:3] == ["run_name", "seed", "optimizer"]
    assert tops[-3:] == ["data", "model", "objective"]


# What is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_yaml_loads(path: Path) -> None:
    """Each file is complete by itself, but for sizes that `model.init_from` gives."""
    schema = schema_of(path)
    sizes = {"num_layers": 12, "hidden_size": 256, "num_heads": 4, "embedding_size": 128, "generator_size": 1.0}
    of_source = {f"model.{name}": size for name, size in sizes.items()} if path.name == "continue.yaml" else {}
    config = load_config(str(path), [], schema, lambda merged: of_source)
    assert isinstance(config, schema)
    assert config.run_name


PAPER = {  # layers, hidden, embedding, heads, generator fraction; length, batch, lr, steps, mask (tables 6 and 3.3)
    "small": (12, 256, 128, 4, 0.25, 128, 128, 5e-4, "1000000ba", 0.15),
    "base": (12, 768, 768, 12, 1 / 3, 512, 256, 2e-4, "766000ba", 0.15),
    "large": (24, 1024, 1024, 16, 0.25, 512, 2048, 2e-4, "400000ba", 0.25),
}


@pytest.mark.parametrize("name", PAPER)
def test_shipped_sizes_are_the_papers(name: str) -> None:
    path = ROOT / "yamls" / f"{name}.yaml"
    config = load_config(str(path), [], PretrainConfig)
    model, trainer = config.model, config.trainer
    found = (model.num_layers, model.hidden_size, model.embedding_size, model.num_heads)
    assert found == PAPER[name][:4]
    assert model.generator_size == pytest.approx(PAPER[name][4], abs=1e-3)
    assert (config.data.max_seq_length, trainer.global_train_batch_size) == PAPER[name][5:7]
    assert config.optimizer.lr == PAPER[name][7]
    assert (trainer.max_duration, config.schedule.warmup) == (PAPER[name][8], "10000ba")
    assert config.objective.mask_prob == PAPER[name][9]
    assert config.checkpoints.milestones == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert model.max_positions == 512


def test_the_configurations_of_google_and_of_electra_pytorch() -> None:
    """They differ from `small.yaml` in what the table of docs/recipe.md says, and in nothing else of training."""
    small, google, seed = (
        to_dict(load_config(str(ROOT / "yamls" / f"{name}.yaml"), [], PretrainConfig))
        for name in ("small", "small_google", "small_seed")
    )
    sections = ("data", "model", "objective", "optimizer", "schedule")

    def differing(config: dict[str, Any]) -> dict[str, Any]:
        pairs = ((f"{name}.{key}", value, small[name][key]) for name in sections for key, value in config[name].items())
        return {key: value for key, value, other in pairs if value != other}

    gumbel = {"objective.sampling": "gumbel"}
    assert differing(google) == {**gumbel, "objective.mask_draw": "with_replacement"}
    assert differing(seed) == {**gumbel, "objective.mask_draw": "bernoulli", "model.init": "transformers"}
    assert (google["model"]["init"], small["model"]["init"]) == ("google", "google")
    assert seed["objective"]["rtd_label_smoothing_style"] == "one_sided"
    assert google["optimizer"]["bias_correction"] is seed["optimizer"]["bias_correction"] is False
    precisions = {name: config["trainer"].pop("precision") for name, config in (("google", google), ("seed", seed))}
    assert precisions == {"google": "fp32", "seed": "amp_fp16"}
    small["trainer"].pop("precision")
    assert google["trainer"] == seed["trainer"] == small["trainer"]


def test_the_table_of_the_recipe_names_keys_that_exist() -> None:
    """Each row of the table of differences names a key of a schema, or none, and a test."""
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.partition("| detail | paper |")[2].partition("\n\n")[0].splitlines()[2:]
    ]
    assert len(rows) >= 20
    known = {key.path for _, key in KEYS.values()}
    for row in rows:
        assert len(row) == 7, row
        assert row[5] == "–" or all(key.strip("` ") in known for key in row[5].split(",")), row
        assert row[6].startswith("`test_"), row


def test_an_override_is_heard_by_what_points_to_it():
    config = load_config(str(ROOT / "yamls" / "small.yaml"), ["run_name=other"], PretrainConfig)
    assert config.checkpoints.folder == "runs/other"
