"""Hash what a checkout computes, so that a refactoring can be shown to change nothing.

    git worktree add ../before v0.1
    python benchmarks/fingerprint.py --checkout ../before --folder /tmp/fingerprint-before
    python benchmarks/fingerprint.py --folder /tmp/fingerprint-after

Converts a small corpus, pretrains for 50 steps, exports the model, and finetunes it on two tasks, each by the command
line that users type. Prints one JSON line: SHA-256 hashes of the shards (every file), of the training and evaluation
metrics, of the checkpoint's tensors (weights and optimizer state), of the export (every file), and of the finetuning
results. Times, throughput and versions are excluded. Equal lines mean bitwise identical results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = ("time/", "throughput/", "memory/", "data/wait")
# Keys of results.json that depend on the clock, the machine, the folder or the installed versions.
VOLATILE = re.compile(r"second|finished_at|time|date|version|host|folder|path|machine|at$")

PRETRAIN = [
    "data.max_seq_length=64",
    "data.num_workers=0",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=2",
    "model.embedding_size=32",
    "model.generator_size=0.5",
    "model.max_positions=64",
    "trainer.max_duration=50ba",
    "trainer.global_train_batch_size=16",
    "trainer.device_eval_batch_size=16",
    "trainer.eval_interval=25ba",
    "trainer.log_interval=1ba",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.progress_bar=false",
    "schedule.warmup=5ba",
    "checkpoints.interval=25ba",
]
FINETUNE = [
    "tasks=[sst2,stsb]",
    "seeds=[1,2]",
    "data.cache=null",
    "data.max_seq_length=48",
    "data.num_workers=0",
    "trainer.max_duration=2ep",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.progress_bar=false",
    "optimizer.lr=2e-3",
]


def write_texts(folder: Path) -> None:
    """A corpus and two tasks of an invented language, drawn from a fixed seed."""
    rng = random.Random(0)
    words = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "el")]

    def sentence() -> str:
        start = rng.randrange(len(words))
        return " ".join(words[(start + step) % len(words)] for step in range(rng.randint(4, 20)))

    def pair(score: int) -> tuple[str, str]:
        first = sentence().split()
        return " ".join(first), " ".join(first[:score] + sentence().split())

    folder.mkdir(parents=True)
    documents = ("\n".join(sentence() for _ in range(rng.randint(1, 12))) for _ in range(600))
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    for part, size in (("train", 200), ("dev", 60)):
        labels = [index % 2 for index in range(size)]
        rows = ["sentence\tlabel", *(f"{words[0] + ' ' if label else ''}{sentence()}\t{label}" for label in labels)]
        scores = [index % 6 for index in range(size)]
        pairs = ["index\tsentence1\tsentence2\tscore"]
        pairs += ["\t".join([str(index), *pair(score), f"{score}.000"]) for index, score in enumerate(scores)]
        for task, lines in (("SST-2", rows), ("STS-B", pairs)):
            (folder / "glue" / task).mkdir(parents=True, exist_ok=True)
            (folder / "glue" / task / f"{part}.tsv").write_text("\n".join(lines) + "\n")


def run(checkout: Path, *arguments: str) -> None:
    """Run a program of the checkout, with its own package first on the path."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed with {done.returncode}:\n{done.stderr}")


def hash_folder(folder: Path) -> str:
    """Hash of every file's name and bytes."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hash of plain values, floats to the last digit."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_tensors(value: Any) -> str:
    """Hash of every tensor in nested containers, in their order."""
    digest = hashlib.sha256()

    def add(name: str, item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f"{name} {item.dtype} {tuple(item.shape)}".encode())
            digest.update(item.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key, inner in item.items():
                add(f"{name}.{key}", inner)
        elif isinstance(item, list | tuple):
            for index, inner in enumerate(item):
                add(f"{name}.{index}", inner)

    add("", value)
    return digest.hexdigest()


def metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def without_volatile(value: Any) -> Any:
    """Nested plain values without the keys of :data:`VOLATILE`."""
    if isinstance(value, dict):
        return {key: without_volatile(inner) for key, inner in value.items() if not VOLATILE.search(key)}
    return [without_volatile(inner) for inner in value] if isinstance(value, list) else value


def fingerprint(checkout: Path, folder: Path) -> dict[str, Any]:
    """Run everything and hash it.

    Args:
        checkout: whose programs are run.
        folder: for everything that they write; must not exist. Relative paths inside are the same for every checkout.
    """
    write_texts(folder)
    shards, pretrain, exported, glue = (folder / name for name in ("shards", "pretrain", "export", "finetune"))
    convert = ["data_prep/convert_owt.py", "--source", str(folder / "corpus.txt"), "--out", str(shards)]
    convert += ["--tokenizer", "train", "--vocab-size", "300", "--max-seq-length", "64", "--val-fraction", "0.1"]
    run(checkout, *convert, "--workers", "2", "--no-progress")
    places = [f"data.path={shards}", f"checkpoints.folder={pretrain}"]
    run(checkout, "electra_composer/pretrain.py", "yamls/small.yaml", *PRETRAIN, *places)
    run(checkout, "electra_composer/export.py", str(pretrain), str(exported))
    places = [f"model.source={pretrain}", f"data.path={folder / 'glue'}", f"checkpoints.folder={glue}"]
    run(checkout, "electra_composer/glue.py", "yamls/glue.yaml", *FINETUNE, *places)

    checkpoint = torch.load(pretrain / "latest-rank0.pt", weights_only=False)  # written a moment ago by this program
    rows = metrics(pretrain / "metrics.jsonl")
    results = json.loads((glue / "results.json").read_text())
    return {
        "benchmark": "fingerprint",
        "steps": sum("loss/train/total" in row or "metrics/train/mlm_loss" in row for row in rows),
        "shards": hash_folder(shards),
        "metrics": hash_json(rows),
        "last_losses": {name: value for name, value in rows[-1].items() if "loss" in name},
        "checkpoint": hash_tensors({key: checkpoint["state"][key] for key in ("model", "optimizers")}),
        "export": hash_folder(exported),
        "glue": hash_json(json.loads(json.dumps(without_volatile(results)).replace(str(folder), "FOLDER"))),
        "scores": {name: [run["score"] for run in task["runs"]] for name, task in results["tasks"].items()},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="default: this one")
    parser.add_argument("--folder", type=Path, required=True, help="for everything that is written; must not exist")
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"error: {options.folder} exists; choose another folder")
    print(json.dumps(fingerprint(options.checkout.resolve(), options.folder.resolve())))


if __name__ == "__main__":
    main()
