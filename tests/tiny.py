"""Paths, the tiny pretraining configuration and a listing of files, shared by the tests."""

from __future__ import annotations

from pathlib import Path

from electra_composer.config import PretrainConfig, RunConfig
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.glue_config import GlueConfig

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
SHARED_DATA = ROOT.parent / "shared" / "data"  # real text and GLUE files, if available

TINY_YAML = """
run_name: tiny
seed: 1
report: false
data: {path: SHARDS, max_seq_length: 32, num_workers: 0}
model:
  {num_layers: 1, hidden_size: 32, num_heads: 2, embedding_size: 16, generator_size: 0.5, max_positions: 40,
   dropout: 0.1, attention_dropout: 0.1}
optimizer: {lr: 5.0e-3}
schedule: {warmup: 2ba}
trainer: {max_duration: 16ba, global_train_batch_size: 8, device_eval_batch_size: 8, eval_interval: 16ba,
          precision: fp32, log_interval: 1ba, progress_bar: false}
checkpoints: {folder: FOLDER, interval: 4ba, keep: 1, milestones: [0.0625, 0.125, 0.25, 0.5, 1.0]}
callbacks: {speed_monitor: {window_size: 2}, runtime_estimator: {}, lr_monitor: {}}
loggers: {metrics_file: {}}
"""


def schema_of(path: Path) -> type[RunConfig]:
    """Return the schema of a shipped YAML file: of pretrain.py, glue.py or finetune.py."""
    content = path.read_text(encoding="utf-8")
    if "\ntask:" in content:
        return FinetuneConfig
    return GlueConfig if "\ntasks:" in content else PretrainConfig


def files_of(folder: Path) -> dict[str, int]:
    """Every file and folder with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}
