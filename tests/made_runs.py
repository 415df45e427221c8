"""Folders of runs as pretrain.py leaves them, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tiny import TINY_YAML

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config, to_yaml


def rows_of(count: int, interval: int = 100) -> list[dict[str, Any]]:
    """Rows of a metrics file with a spike of the generator's loss in the middle."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(count):
        step = index * interval
        loss = 3 + 5 * np.exp(-index / count * 5) + 0.1 * random.normal()
        row: dict[str, Any] = {"step": step, "time/token": step * 16384, "lr-AdamW/group0": 5e-4, "gradient/norm": 1.5}
        row |= {"lr-AdamW/group1": 5e-4, "metrics/train/mlm_loss": 99.0 if index == count // 2 else loss}
        row |= {f"metrics/train/{name}": float(random.random()) for name in ("rtd_loss", "rtd_precision", "rtd_recall")}
        row |= {"throughput/tokens_per_sec": 1e5, "data/wait_share": 0.01, "memory/peak_resident_mem": 3.0}
        if index % 5 == 0:
            row["time/total"] = step / 1e5
        if index % 50 == 49:
            row["metrics/eval/rtd_auc"] = 0.5 + index / count / 3
        rows.append(row)
    return rows


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """Write `config.yaml` and `metrics.jsonl`; `changes` are keys of the configuration with `__` for dots."""
    folder.mkdir(parents=True)
    (folder / "given.yaml").write_text(TINY_YAML)
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    config = load_config(str(folder / "given.yaml"), overrides, PretrainConfig)
    (folder / "given.yaml").unlink()
    (folder / "config.yaml").write_text(to_yaml(config))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def results_of(source: str, scores: dict[int, float], random_init: bool = False) -> dict[str, Any]:
    """Return the content of a results file of one task."""
    runs = [{"seed": seed, "score": score} for seed, score in scores.items()]
    return {
        "group": "a",
        "source": source,
        "settings": {"model.random_init": random_init},
        "tasks": {"rte": {"task": "RTE", "metric": "accuracy", "runs": runs}},
    }
