"""Tests of quickstart.py: all steps at the smallest size, and its summary tables."""

from __future__ import annotations

import os
import re
import shutil
import sys

import programs
import pytest
from tiny import ROOT

from electra_composer.quickstart import pretraining_summary, table


@pytest.mark.slow
def test_smoke(tmp_path):
    for name in ("electra_composer", "data_prep", "yamls"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = programs.run(
        [sys.executable, "-m", "electra_composer.quickstart", "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", programs.WARM_CHILDREN: "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in (
        "pretrained weights",
        "random weights",
        "gain from pretraining",
        "logits of both models within",
        "RTD AUC",
        "report     runs/quickstart/pretrain/report.html",
    ):
        assert said in done.stdout, said
    assert "synthetic" in done.stdout
    assert (tmp_path / "runs/quickstart/export/discriminator/model.safetensors").is_file()


def test_the_table_shows_the_difference_of_the_means():
    def results(*scores):
        return {"tasks": {"synthetic-words": {"runs": [{"metrics": {"accuracy": score}} for score in scores]}}}

    text = table({"pretrained": results(80.0, 84.0), "random": results(60.0, 62.0)})
    assert re.search(r"pretrained weights +82\.0 +2\.8 +80\.0 84\.0", text)
    assert re.search(r"random weights +61\.0 +1\.4 +60\.0 62\.0", text)
    assert "+21.0" in text


def test_the_summary_takes_first_and_last():
    rows = [
        {"metrics/train/mlm_loss": 9.0, "metrics/train/rtd_loss": 0.6, "time/token": 10},
        {"throughput/tokens_per_sec": 100.0, "time/token": 20},
        {"metrics/train/mlm_loss": 6.0, "metrics/train/rtd_loss": 0.3, "metrics/eval/rtd_auc": 0.75, "time/token": 30},
    ]
    text = pretraining_summary(rows, 5.37)
    for said in ("9.00 → 6.00", "without context: 5.37", "0.600 → 0.300", "0.750", "30"):
        assert said in text
