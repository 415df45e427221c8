"""Differences between the configurations of runs and the shipped YAML file that is nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config, to_dict
from electra_composer.errors import UserError
from electra_composer.next_steps import REPOSITORY

LOCAL = ("run_name", "data.path", "data.remote", "checkpoints.folder", "checkpoints.remote")  # of every run its own
ABSENT = "—"


class Difference(NamedTuple):
    """A key whose value differs between the shipped file and a run, or between runs; values as text."""

    key: str
    shipped: str
    values: list[str]  # of each run


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return dotted keys and values as text. An empty section is a value."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = "null" if value is None else str(value)
    return flat


def shipped_configs() -> dict[str, dict[str, str]]:
    """Return the shipped YAML files of pretraining, resolved and flattened, by their names."""
    configs = {}
    for path in sorted((REPOSITORY / "yamls").glob("*.yaml")):
        try:
            configs[path.name] = flatten(to_dict(load_config(str(path), [], PretrainConfig)))
        except UserError:  # of another program, or without sizes, which follow from `model.init_from`
            continue
    return configs


def nearest(run: Mapping[str, str], shipped: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return the name of the shipped file with the fewest differences; None if no file is there."""

    def distance(name: str) -> int:
        other = shipped[name]
        return sum(run.get(key) != other.get(key) for key in run.keys() | other.keys() if key not in LOCAL)

    return min(shipped, key=distance, default=None)


def differences(runs: Sequence[Mapping[str, Any]], shipped: Mapping[str, str] | None) -> list[Difference]:
    """Compare configurations with each other and with a flattened shipped one, in the order of their keys."""
    flat = [flatten(run) for run in runs]
    compared = [*flat, *([dict(shipped)] if shipped is not None else [])]
    rows = []
    for key in dict.fromkeys(key for each in compared for key in each):
        if len({each.get(key, ABSENT) for each in compared}) > 1:
            before = ABSENT if shipped is None else shipped.get(key, ABSENT)
            rows.append(Difference(key, before, [each.get(key, ABSENT) for each in flat]))
    return rows
