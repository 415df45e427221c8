"""What is generated from the schema: yamls/schema.json, the tables of docs/configuration.md, first lines of YAMLs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from complete_config import KEYS
from doc_pages import load_script
from jsonschema import Draft7Validator
from omegaconf import OmegaConf
from tiny import ROOT

from electra_composer.ranges import Key, TimeRange

SCHEMA = json.loads((ROOT / "yamls" / "schema.json").read_text(encoding="utf-8"))
SHIPPED = sorted((ROOT / "yamls").glob("*.yaml"))
ONCE = list({key.path: name for name, (_, key) in reversed(KEYS.items()) if Any not in key.kinds}.values())
SELECTS = {"pretrain": {}, "glue": {"tasks": ["rte"]}, "finetune": {"task": {"kind": "qa"}}}
NUMBERS = [-1, 0, 0.5, 1, 1.0000001, 2, 5, 1000, 70000, 2**31, 10**13]
WORDS = [None, True, False, "auto", "google", "word", "${seed}", "${a}/b", "10ba", "0.1dur", "1min", "-1ba", "9gb"]


def errors(config: Any) -> list[str]:
    return [error.message for error in Draft7Validator(SCHEMA).iter_errors(config)]


def test_what_is_generated_from_the_schema_is_current() -> None:
    assert load_script("docs/make_schema.py").main(["--check"]) == 0


def test_it_is_a_json_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_yaml_is_valid_and_names_the_schema(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert errors(config) == []
    assert isinstance(config, dict)
    assert errors({**config, "optimiser": {}})
    assert errors({**config, "trainer": {**config["trainer"], "precision": "fp8"}})


def test_the_kind_of_file_follows_from_its_keys() -> None:
    assert errors({"objective": {"mask_prob": 0.2}}) == []
    assert errors({"tasks": ["rte"], "wnli": "coreference"}) == []
    assert errors({"task": {"kind": "tagging", "scheme": "iob2"}, "seeds": [1]}) == []
    for config in ({"wnli": "coreference"}, {"tasks": ["rte"], "objective": {}}, {"task": {"kind": "ner"}}):
        assert errors(config)
    assert errors({"callbacks": {"speed_monitor": None, "lr_monitor": {}}}) == []
    assert errors({"callbacks": {"speed_monitr": {}}})


def is_valid(key: Key, value: Any) -> bool:
    """Whether the ranges say that a value from YAML is valid; a number is text where text is expected."""
    if isinstance(value, str) and "${" in value:
        return True
    if value is None:
        return key.optional
    if isinstance(value, bool):
        return bool in key.kinds
    if value in key.words:
        return True
    if key.range is not None:
        value = str(value) if key.kind is str else value
        return key.range.contains(value) and not (key.kind is int and isinstance(value, float))
    return str in key.kinds


def placed(key: Key, value: Any) -> dict[str, Any]:
    """Return a configuration with a value at its key."""
    *sections, name = key.path.replace("<name>", "a").split(".")
    if name.endswith("[]"):
        name, value = name[:-2], [value, value]
    config: dict[str, Any] = {name: value}
    for section in reversed(sections):
        config = {section: config}
    return config


@pytest.mark.parametrize("name", ONCE)
def test_the_schema_agrees_with_the_ranges(name: str) -> None:
    kind, key = KEYS[name]
    for value in [*NUMBERS, *WORDS]:
        config = placed(key, value)
        given = {name: part for name, part in SELECTS[kind].items() if name not in config}
        assert (errors({**config, **given}) == []) == is_valid(key, value), value


def test_what_a_pattern_cannot_say_is_left_to_the_program() -> None:
    """A time is a number and a unit; its range is not in the schema."""
    limits = TimeRange()
    for time in ("1.5dur", "0ba", "0.5ba"):
        assert not limits.contains(time)
        assert errors({"trainer": {"eval_interval": time}}) == []
    for time in ("1e3ba", "1_000sp", ".5dur", "5e9tok"):
        assert limits.contains(time)
        assert errors({"trainer": {"eval_interval": time}}) == []
