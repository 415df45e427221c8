"""The quickstart's every step, as short as it goes; and that what the README says can be typed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

from electra_composer.config import GlueConfig, PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.quickstart import pretraining_summary, table


@pytest.mark.slow
def test_smoke(tmp_path):
    for name in ("electra_composer", "data_prep", "yamls"):
        shutil.copytree(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "electra_composer.quickstart", "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
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


COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands_name_what_is_there(command):
    words = command.split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    assert words[0] in ("python", "composer")
    assert (ROOT / words[1]).is_file()
    if words[1] in ("electra_composer/pretrain.py", "electra_composer/glue.py"):
        schema = PretrainConfig if words[1].endswith("pretrain.py") else GlueConfig
        load_config(str(ROOT / words[2]), words[3:], schema)


@pytest.mark.parametrize(
    "target", re.findall(r"\]\((?!http|#)([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
)
def test_readme_links_lead_somewhere(target):
    assert (ROOT / target).exists()
