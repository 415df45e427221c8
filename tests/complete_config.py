"""Complete configurations of all schemas, their keys, and how the tests load them."""

from __future__ import annotations

from pathlib import Path

from tiny import ROOT

from electra_composer.config import PretrainConfig, RunConfig
from electra_composer.config_loading import load_config
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.glue_config import GlueConfig
from electra_composer.ranges import Key, keys

SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "glue": GlueConfig, "finetune": FinetuneConfig}
KEYS = {f"{name}:{key.path}": (name, key) for name, schema in SCHEMAS.items() for key in keys(schema)}

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


def load_kind(folder: Path, kind: str, overrides: list[str]) -> RunConfig:
    """Load a complete configuration of one of the schemas."""
    if kind == "pretrain":
        return load(folder, *overrides)
    yaml, given = {"glue": ("glue", "model.source=x"), "finetune": ("classification", "data.train=x.csv")}[kind]
    return load_config(str(ROOT / "yamls" / f"{yaml}.yaml"), ["optimizer.lr=1e-4", given, *overrides], SCHEMAS[kind])


def override(key: Key, text: str) -> list[str]:
    """Return the words of a command line that set a key, such as `data.streams.a.repeat=2`."""
    path = key.path.replace("<name>", "a")
    overrides = ["data.path=", "data.streams.a.path=x"] if path.startswith("data.streams") else []
    if path == "optimizer.betas[]":
        text = f"{text}, 0.5"
    return [*overrides, f"{path[:-2]}=[{text}]" if path.endswith("[]") else f"{path}={text}"]
