"""Differences between the configurations of runs and the shipped YAML file that is nearest to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config, to_dict
from electra_composer.shipped import configurations

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


def nearest_shipped(config: Mapping[str, Any]) -> tuple[str, dict[str, str]] | None:
    """Return the name and the resolved, flattened content of the shipped YAML file that is nearest to a run.

    Returns:
        None if the files are not installed.
    """
    run = flatten(config)
    best: tuple[int, Path] | None = None
    for path in configurations().values():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "model" not in content or {"task", "tasks"} & content.keys():
            continue  # of finetune.py and glue.py
        distance = sum(run.get(key) != value for key, value in flatten(content).items() if key not in LOCAL)
        if best is None or distance < best[0]:
            best = distance, path
    if best is None:
        return None
    name, chosen = best[1].name, str(best[1])
    return name, flatten(to_dict(load_config(chosen, [], PretrainConfig, lambda partial: _missing(partial, config))))


def _missing(partial: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that follow from `model.init_from`, as the run has them."""
    sizes = config.get("model", {})
    names = {key: key.removeprefix("model.") for key in OmegaConf.missing_keys(partial)}
    return {key: sizes[name] for key, name in names.items() if name in sizes}


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
