"""Changes of the configuration between two starts of a run.

A checkpoint has the configuration that it was written with. At the next start every key is compared with it:

- A key in :data:`REFUSED` must stay, since the state in the checkpoint is of its value: the weights, or the position in
  the data.
- A key in :data:`REPORTED` may change, and takes effect from the checkpoint on. One line says so.
- All other keys are free: they concern where and how fast a run computes, and what it logs and saves.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from electra_composer.config import FSDPConfig
from electra_composer.errors import UserError

WEIGHTS = "its weights are of that model"
ORDER = "its position in the data refers to that order of the rows"
FIRST_START = "it applies to the first start of a run"
OPTIMIZER = "the optimizer's state is of that kind"


def _keys(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


# key → reason
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        _keys(
            "model",
            "num_layers hidden_size num_heads embedding_size generator_size generator_layers max_positions "
            "init initializer_range layer_norm_eps sharing generator_embedding_size tie_encoder",
        ),
        WEIGHTS,
    ),
    **dict.fromkeys(_keys("objective", "kind generator"), WEIGHTS),
    "seed": ORDER,
    **dict.fromkeys(_keys("data", "max_seq_length batching_method shuffle num_canonical_nodes"), ORDER),
    "trainer.global_train_batch_size": ORDER,
    **dict.fromkeys(_keys("optimizer", "bias_correction layerwise_decay"), OPTIMIZER),
    **dict.fromkeys(_keys("checkpoints", "load_path load_weights_only"), FIRST_START),
    **dict.fromkeys(_keys("model", "init_from init_generator_from"), FIRST_START),
}

REPORTED: list[str] = [
    *_keys("optimizer", "lr betas eps weight_decay layerwise_variant"),
    *_keys("schedule", "name warmup decay"),
    *_keys("trainer", "max_duration precision gradient_clip eval_batches fsdp.mixed_precision"),
    *_keys("data", "path epoch_size train_split eval_split eval_streams"),
    *_keys("data.streams.<name>", "path proportion repeat choose"),
    *_keys("model", "dropout attention_dropout"),
    *_keys(
        "objective",
        "mask_prob mask_draw mask_style gen_weight disc_weight sampling temperature disallow_correct "
        "mlm_label_smoothing rtd_label_smoothing rtd_label_smoothing_style",
    ),
]


# Values of keys in a section that may be null, or that a checkpoint may lack.
DEFAULTS = {
    "trainer.fsdp.mixed_precision": FSDPConfig().mixed_precision,
    # Before there were others:
    "objective.kind": "electra",
    "objective.generator": "trained",
}

_ABSENT: Any = object()


class Change(NamedTuple):
    """A key with another value than in the checkpoint."""

    key: str
    before: Any
    after: Any


def check_changes(written: dict[str, Any], config: dict[str, Any], checkpoint: str, own: bool) -> str | None:
    """Compare a configuration with the one of the checkpoint that the run starts from.

    Args:
        written: Configuration in the checkpoint; it may lack keys that are newer.
        config: Configuration of this start, as plain dictionaries.
        checkpoint: Path of the checkpoint, for messages.
        own: Whether it is of this run; otherwise it is that of `checkpoints.load_path`.

    Returns:
        One line with the reported changes; None if there are none.

    Raises:
        UserError: A key has changed that must stay.
    """
    first_start = [key for key, reason in REFUSED.items() if reason == FIRST_START]
    # What another run has started from, and what is not given any more, does not matter.
    model = config["model"]
    given = {
        "checkpoints": config["checkpoints"]["load_path"],
        "model": model["init_from"] or model["init_generator_from"],
    }
    ignored = [key for key in first_start if not own or given[key.partition(".")[0]] is None]
    refused = find_changes(written, config, [key for key in REFUSED if key not in ignored])
    if refused:
        raise UserError(_refusal(refused, checkpoint, config["checkpoints"]["folder"], own))
    reported = find_changes(written, config, REPORTED)
    if not reported:
        return None
    changes = ", ".join(f"{key} {_text(before)} → {_text(after)}" for key, before, after in reported)
    return f"changed since {checkpoint} was written: {changes}"


def find_changes(before: dict[str, Any], after: dict[str, Any], keys: list[str]) -> list[Change]:
    """Return which of `keys` differ; `<name>` in a key stands for every name in that section.

    A key that one configuration lacks does not count: it is newer than the checkpoint.
    """
    changes = []
    for key in keys:
        section, _, subkey = key.partition(".<name>.")
        places, absent = [key], DEFAULTS.get(key, _ABSENT)
        if subkey:
            names = {**_lookup(before, section, {}), **_lookup(after, section, {})}
            places, absent = [f"{section}.{name}.{subkey}" for name in names], None
        for place in places:
            change = Change(place, _lookup(before, place, absent), _lookup(after, place, absent))
            if _ABSENT not in change[1:] and change.before != change.after:
                changes.append(change)
    return changes


def _lookup(config: Any, key: str, absent: Any) -> Any:
    """Return the value of a dotted key; `absent` if the configuration lacks it."""
    for name in key.split("."):
        if not isinstance(config, dict) or name not in config:
            return absent
        config = config[name]
    return config


def _text(value: Any) -> str:
    """Format a value as in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _refusal(changes: list[Change], checkpoint: str, folder: str, own: bool) -> str:
    before = ", ".join(f"{change.key}={_text(change.before)}" for change in changes)
    after = ", ".join(f"{change.key}={_text(change.after)}" for change in changes)
    reasons = list(dict.fromkeys(REFUSED[change.key] for change in changes))
    weights_fit = WEIGHTS not in reasons
    if own:
        ways = f"set {before} to continue the run, or another checkpoints.folder to start one"
        if weights_fit and FIRST_START not in reasons:
            ways += f" (from these weights with checkpoints.load_path={folder} checkpoints.load_weights_only=true)"
    else:
        ways = f"set {before}" + (
            ", or checkpoints.load_weights_only=true for its weights alone" if weights_fit else ""
        )
    if {"objective.kind", "objective.generator"} & {change.key for change in changes}:
        ways += f", or start with the networks they have in common (model.init_from={checkpoint})"
    return f"{checkpoint} was written with {before}, but this start has {after}: {'; '.join(reasons)}; {ways}"
