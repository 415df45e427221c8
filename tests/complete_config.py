"""A complete configuration in a few lines, and how the tests load it."""

from __future__ import annotations

from pathlib import Path

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config

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
