"""Tests of config_loading.py: values, overrides, one-line messages for every kind of mistake, and the shipped YAMLs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import ROOT

from electra_composer.config import FSDPConfig, GlueConfig, PretrainConfig, RunConfig
from electra_composer.config_loading import load_config, load_config_from_command_line, nearest, to_dict, to_yaml
from electra_composer.errors import UserError, report_user_errors

SHIPPED = sorted((ROOT / "yamls").rglob("*.yaml"))

COMPLETE = """
run_name: test
data: {path: data/owt, max_seq_length: 128}
model: {num_layers: 2, hidden_size: 32, num_heads: 2, embedding_size: 16, generator_size: 0.5}
optimizer: {lr: 5e-4}
schedule: {warmup: 10ba}
trainer: {max_duration: 100ba, global_train_batch_size: 4, device_eval_batch_size: 4}
checkpoints: {folder: 'runs/${run_name}'}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, *overrides: str, text: str = COMPLETE) -> PretrainConfig:
    return load_config(write(folder, text), list(overrides), PretrainConfig)


def message(folder: Path, *overrides: str, text: str = COMPLETE) -> str:
    """Return the message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        load(folder, *overrides, text=text)
    found = str(caught.value)
    assert "\n" not in found
    return found


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
    assert (model.initializer_range, model.layer_norm_eps, model.tie_embeddings) == (0.02, 1e-12, True)


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


# Mistakes


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("optimzer.lr=1", "unknown key optimzer;", "did you mean optimizer?"),
        ("optimizer.learning_rat=1", "unknown key optimizer.learning_rat;", "optimizer."),
        ("model.hiden_size=1", "unknown key model.hiden_size;", "did you mean model.hidden_size?"),
        ("objective.disc_wieght=1", "unknown key objective.disc_wieght;", "did you mean objective.disc_weight?"),
        ("trainer.fsdp.reshard=true", "unknown key trainer.fsdp.reshard;", "trainer.fsdp.reshard_after_forward?"),
        ("lr=1", "unknown key lr;", "did you mean optimizer.lr?"),
        ("model.compile=true", "unknown key model.compile;", "did you mean trainer.compile?"),
        ("model.xyzzy=1", "unknown key model.xyzzy;", "valid are model.attention_dropout, model.dropout"),
        ("xyzzy=1", "unknown key xyzzy;", "valid are callbacks, checkpoints, data"),
    ],
)
def test_unknown_key_with_its_path_and_the_nearest(tmp_path: Path, override: str, key: str, suggestion: str) -> None:
    """On the command line and in the file."""
    found = message(tmp_path, override)
    assert "the command line" in found
    assert key in found
    assert suggestion in found
    dotted, value = override.split("=")
    nested: Any = value
    for name in reversed(dotted.split(".")):
        nested = {name: nested}
    whole = yaml.safe_load(COMPLETE)
    top = next(iter(nested))
    whole[top] = {**whole.get(top, {}), **nested[top]} if isinstance(nested[top], dict) else nested[top]
    found = message(tmp_path, text=yaml.safe_dump(whole))
    assert "config.yaml" in found
    assert key in found
    assert suggestion in found


def test_nearest() -> None:
    assert nearest("warmpu", ["warmup", "decay"]) == "did you mean warmup?"
    assert nearest("qqq", ["warmup", "decay"]) == "valid are decay, warmup"


@pytest.mark.parametrize(
    ("override", "key", "complaint"),
    [
        ("model.num_layers=two", "model.num_layers", "could not be converted to Integer"),
        ("model.num_layers=2.5", "model.num_layers", "could not be converted to Integer"),
        ("model.num_layers=null", "model.num_layers", "None"),
        ("optimizer.lr=fast", "optimizer.lr", "could not be converted to Float"),
        ("optimizer.lr.x=1", "optimizer.lr", "could not be converted to Float"),
        ("optimizer.betas=0.9", "optimizer.betas", "not a ListConfig"),
        ("optimizer.betas[0]=0.9", "optimizer.betas[0]", "incompatible"),
        ("checkpoints.milestones=[0.1,x]", "checkpoints.milestones[1]", "could not be converted to Float"),
        ("trainer.precision=bf16", "trainer.precision", "['fp32', 'amp_bf16', 'amp_fp16']"),
        ("objective.mask_style=roberta", "objective.mask_style", "['electra', 'bert']"),
        ("trainer.device_train_microbatch_size=2.5", "trainer.device_train_microbatch_size", "float"),
        ("trainer.fsdp.state_dict_type=half", "trainer.fsdp.state_dict_type", "['full', 'sharded']"),
        ("model=3", "model", "int"),
        ("model=null", "model", "not Optional"),
        ("optimizer=[1]", "optimizer", "list"),
        ("callbacks=3", "callbacks", "int"),
    ],
)
def test_wrong_type(tmp_path: Path, override: str, key: str, complaint: str) -> None:
    found = message(tmp_path, override)
    assert found.startswith(f"the command line: {key}: ")
    assert complaint in found


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("num_layers: 2", "num_layers: [2]", "model.num_layers"),
        ("{lr: 5e-4}", "[5e-4]", "optimizer"),
        ("{lr: 5e-4}", "5e-4", "optimizer"),
        ("run_name: test", "run_name: test\ncallbacks: [speed]", "callbacks"),
    ],
)
def test_wrong_type_in_the_file_names_file_and_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    assert old in COMPLETE
    found = message(tmp_path, text=COMPLETE.replace(old, new))
    assert f"config.yaml: {key}: " in found


def test_missing_values_are_all_named(tmp_path: Path) -> None:
    text = COMPLETE.replace("optimizer: {lr: 5e-4}\n", "").replace("num_heads: 2, ", "")
    found = message(tmp_path, text=text)
    assert "no value for model.num_heads, optimizer.lr" in found
    assert "model.num_heads=…" in found


@pytest.mark.parametrize("text", ["", "{}", "null\n", "# only a comment\n"])
def test_an_empty_file_has_everything_missing(tmp_path: Path, text: str) -> None:
    found = message(tmp_path, text=text)
    assert "no value for" in found
    assert "data.path" in found


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.path=${nowhere}", "'nowhere' not found"),
        ("data.path=${model.nowhere}", "'model.nowhere' not found"),
        ("data.path=${oc.env:SURELY_NOT_SET_ANYWHERE}", "SURELY_NOT_SET_ANYWHERE"),
    ],
)
def test_interpolation_that_leads_nowhere(tmp_path: Path, override: str, complaint: str) -> None:
    found = message(tmp_path, override)
    assert "data.path" in found
    assert complaint in found


def test_interpolation_in_a_circle(tmp_path: Path) -> None:
    assert "config.yaml" in message(tmp_path, "data.path=${run_name}", "run_name=${data.path}")


@pytest.mark.parametrize("text", ["- a\n- b\n", "[]"])
def test_a_list_at_the_top(tmp_path: Path, text: str) -> None:
    assert "found a list" in message(tmp_path, text=text)


@pytest.mark.parametrize(
    "text", ["a: [", "\x00", "a: b: c", "5", "? [a]\n: 1\n", "run_name: !!python/object/apply:os.getcwd []\n"]
)
def test_not_yaml(tmp_path: Path, text: str) -> None:
    assert "config.yaml: not a readable YAML file" in message(tmp_path, text=text)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run_name: é".encode("latin-1"))
    with pytest.raises(UserError, match="not a readable YAML file"):
        load_config(str(tmp_path / "latin.yaml"), [], PretrainConfig)


def test_a_key_given_twice(tmp_path: Path) -> None:
    """Plain YAML would silently replace the first `trainer:` by the second."""
    found = message(tmp_path, text=COMPLETE + "trainer: {compile: true}\n")
    assert "duplicate key trainer" in found


@pytest.mark.parametrize("override", ["optimizer.lr", "--optimizer.lr=1", "-x=1", "yamls/small.yaml"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    found = message(tmp_path, override)
    assert override in found
    assert "key=value" in found


@pytest.mark.parametrize("override", ["data.path=[", "data.path={a", "data.path='a b", "data.path=${"])
def test_an_override_whose_value_cannot_be_read(tmp_path: Path, override: str) -> None:
    found = message(tmp_path, override)
    assert override in found or repr(override) in found
    assert "cannot be read" in found


@pytest.mark.parametrize("override", ["=5", "optimizer..lr=1", ".=1", "optimizer.=1"])
def test_an_override_without_a_proper_key(tmp_path: Path, override: str) -> None:
    assert "unknown key" in message(tmp_path, override)


@pytest.mark.parametrize("path", ["none.yaml", "."])
def test_no_such_file(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"no such file; expected a YAML file such as yamls/small\.yaml"):
        load_config(str(tmp_path / path), [], PretrainConfig)


# Entry points


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", write(tmp_path, COMPLETE), "seed=7"])
    assert load_config_from_command_line(PretrainConfig, "usage").seed == 7


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
    """Each file is complete by itself. Names with `glue` are configurations of glue.py."""
    schema: type[RunConfig] = GlueConfig if "glue" in path.name else PretrainConfig
    config = load_config(str(path), [], schema)
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


def test_an_override_is_heard_by_what_points_to_it():
    config = load_config(str(ROOT / "yamls" / "small.yaml"), ["run_name=other"], PretrainConfig)
    assert config.checkpoints.folder == "runs/other"
