"""Every file and folder that the programs write has the permissions that the umask says."""

from __future__ import annotations

import os

import pytest
from converter import main as convert
from finetuning_runs import glue_config
from glue_tiny import settings, write_data, write_source
from tiny import TINY_YAML

from electra_composer import export, glue, pretrain
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config

# The default, a private one, and one that tells 0o640 from 0o644, of the default, and from 0o600, of temporary files.
UMASKS = (0o022, 0o077, 0o027)
# Some of the files that each program writes.
WRITTEN = {
    "shards": ("index.json", "shard.00000.mds", "meta.json", "plan.json", "tokenizer.json", "vocab.txt"),
    "run": ("batch-1-rank0.pt", "milestone-ba1-rank0.pt", "config.yaml", "metrics.jsonl", "tokenizer_config.json"),
    "export": ("model.safetensors", "config.json", "tokenizer.json"),
    "glue": ("results.json", "results.md", "results.csv", "results.png", "runs.jsonl", "submission.zip"),
}


def write_everything(folder):
    """Convert, pretrain, export and finetune in `folder`."""
    texts = [f"--source={folder}/texts.txt", "--tokenizer=train", "--vocab-size=60", "--max-seq-length=32"]
    out = [f"--out={folder}/written/shards", f"--json={folder}/written/summary.json", "--no-progress"]
    convert([*texts, *out, "--val-fraction=0.2"])
    shards, run = f"{folder}/written/shards", f"{folder}/written/run"
    (folder / "tiny.yaml").write_text(TINY_YAML.replace("SHARDS", shards).replace("FOLDER", run))
    short = ["trainer.max_duration=1ba", "schedule.warmup=0ba", "trainer.eval_interval=1ba", "checkpoints.interval=1ba"]
    pretrain.main(load_config(str(folder / "tiny.yaml"), [*short, "checkpoints.milestones=[0.9]"], PretrainConfig))
    export.main([run, f"{folder}/written/export"])
    source, data = write_source(folder / "source"), write_data(folder / "data", tests=True)
    glue.main(
        glue_config(
            *settings(source, data, folder / "written/glue"),
            "tasks=[mnli, rte]",
            "intermediate=true",  # keeps MNLI's weights
            "predict.enabled=true",
            f"data.cache={folder}/written/glue/cache",
            "trainer.max_duration=2ba",
            "max_train_examples=16",
        )
    )


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
def test_permissions_follow_the_umask(tmp_path, umask):
    words = [f"w{number}" for number in range(20)]
    lines = [" ".join(words[(start + i) % 20] for i in range(15)) for start in range(60)]
    (tmp_path / "texts.txt").write_text("\n\n".join(lines))
    written = tmp_path / "written"
    written.mkdir()
    former = os.umask(umask)
    try:
        write_everything(tmp_path)
    finally:
        os.umask(former)
    paths = [path for path in written.rglob("*") if not path.is_symlink()]
    wrong = {
        str(path.relative_to(written)): oct(path.stat().st_mode)
        for path in paths
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
    for place, names in WRITTEN.items():
        found = {path.name for path in (written / place).rglob("*")}
        assert found.issuperset(names), place
    found = {path.suffix for path in (written / "glue").rglob("*")}
    assert found >= {".npz", ".safetensors", ".zip", ".jsonl"}
