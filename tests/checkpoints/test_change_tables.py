"""What is said of a changed value of every key, without a run."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import yaml
from changed_keys import REFUSED, REPORTED, SETTINGS, TABLES, cases, leaf_keys, overrides_of
from tiny import TINY_YAML

from electra_composer.checkpoints.changes import FIRST_START, WEIGHTS, check_changes, find_changes
from electra_composer.checkpoints.changes import REFUSED as REFUSED_KEYS
from electra_composer.checkpoints.changes import REPORTED as REPORTED_KEYS
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config, to_dict
from electra_composer.errors import UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The configuration as it is, with a stream, and with FSDP."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "tiny.yaml").write_text(TINY_YAML.replace("SHARDS", "shards").replace("FOLDER", str(folder / "run")))
    overrides = {
        "": [],
        "data.streams.": ["data.path=", "data.streams.a.path=x"],
        "trainer.fsdp.": ["trainer.fsdp={}"],
    }
    return {
        name: to_dict(load_config(str(folder / "tiny.yaml"), [*SETTINGS, *of], PretrainConfig))
        for name, of in overrides.items()
    }


def changed(base: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Faster than load_config, which test_each_key_alone uses."""
    config = copy.deepcopy(base)
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, config)[name] = yaml.safe_load(value)
    return config


def test_every_key_is_in_one_of_the_tables():
    """A new key must be entered in changed_keys.py, and in checkpoints/changes.py unless it may change silently."""
    in_tables = [key for table in TABLES.values() for key in table]
    assert sorted(in_tables) == sorted({*leaf_keys(), "trainer.fsdp"})
    assert sorted(REPORTED_KEYS) == sorted(REPORTED)
    assert sorted([*REFUSED_KEYS, "optimizer.name"]) == sorted(REFUSED)


@pytest.mark.parametrize(("kind", "key", "value"), cases(), ids=lambda value: value.split(" ")[0])
def test_what_is_said_of_a_changed_key(bases, kind, key, value):
    """In both directions: from the value of the configuration to the one of the table, and back."""
    base = bases[next((prefix for prefix in bases if prefix and key.startswith(prefix)), "")]
    other = changed(base, overrides_of(key, value))
    name = key.replace("<name>", "a")
    for before, after in ((base, other), (other, base)):
        if REFUSED_KEYS.get(key) == FIRST_START and after is base:
            assert check_changes(before, after, "batch-2", own=True) is None  # no longer given
        elif kind == "refused":
            for own, way in ((True, "another checkpoints.folder"), (False, "checkpoints.load_weights_only=true")):
                if not own and REFUSED_KEYS[key] == FIRST_START:
                    continue
                with pytest.raises(UserError) as error:
                    check_changes(before, after, "batch-2", own)
                message = str(error.value)
                assert message.count(f"{name}=") >= 3, message  # before, after, and what to set
                assert (way in message) == (own or REFUSED_KEYS[key] != WEIGHTS)
                assert "\n" not in message
        else:
            line = check_changes(before, after, "batch-2", own=True)
            assert (line is None) == (kind == "free"), line
            assert line is None or (line.startswith(f"changed since batch-2 was written: {name} ") and " → " in line)


def test_keys_that_a_configuration_lacks_have_not_changed():
    """An older checkpoint has fewer keys; a section may be null, which is its defaults."""
    keys = ["seed", "trainer.fsdp.mixed_precision", "data.streams.<name>.repeat"]
    sharded = {"seed": 1, "trainer": {"fsdp": {"mixed_precision": "PURE"}}}
    assert find_changes({"trainer": {"fsdp": None}}, sharded, keys) == [(keys[1], "DEFAULT", "PURE")]
    with_stream = {"data": {"streams": {"a": {"repeat": 2.0}}}}
    assert find_changes({"data": {"streams": {}}}, with_stream, keys) == [("data.streams.a.repeat", None, 2.0)]
    assert find_changes(with_stream, {}, keys) == [("data.streams.a.repeat", 2.0, None)]
