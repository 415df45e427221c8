"""Tests of config_loading.py: every kind of mistake gives a message of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from complete_config import COMPLETE, load

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, nearest


def message(folder: Path, *overrides: str, text: str = COMPLETE) -> str:
    """Return the message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        load(folder, *overrides, text=text)
    found = str(caught.value)
    assert "\n" not in found
    return found


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
    assert f"config.yaml: {key} is " in found


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
