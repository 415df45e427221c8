"""Finetuning on SST-2 and MRPC compared with transformers' `Trainer` and its defaults; prints one JSON line.

    python benchmarks/glue.py [--tasks sst2,mrpc] [--examples 2000] [--data FOLDER] [--source FOLDER]

Both run alternately in one process: ours (the model, loader and trainer of `electra_composer/glue.py`), then
`ElectraForSequenceClassification` with every example padded to the full length, as transformers' `run_glue.py` does by
default. Both start from the same weights and get the same examples, batch size and learning rate. Pairs are not
swapped.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from glue_runs import run_ours, run_transformers
from machine import describe, require_positive

from electra_composer.checkpoints.weights import load_source
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetuning.data import training_examples
from electra_composer.finetuning.files import Example, read_examples
from electra_composer.finetuning.tasks import Task, find_task
from electra_composer.glue_config import GlueConfig
from electra_composer.training.startup import start
from electra_composer.vocabulary import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SIZES = {  # layers, hidden size, heads, embedding size
    "tiny": (2, 32, 2, 16),
    "small": (12, 256, 4, 128),
    "base": (12, 768, 12, 768),
}
HOW = (
    "examples per second of the training loop, from the end of the last warm-up step to the end of the last step: "
    "loading, forward, backward, clipping, optimizer; whole_seconds: from texts to the dev score, tokenizing and "
    "building the model included"
)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print one JSON line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the options and fill in the defaults for this machine.

    Raises:
        UserError: an option is out of range, or accelerate is not installed.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/glue.py", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default="sst2,mrpc")
    parser.add_argument("--data", default=str(SHARED / "glue_data"), help="folder of TSV files, or hub (%(default)s)")
    parser.add_argument("--source", help="ElectraForPreTraining: folder or name on the hub; default: random weights")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the random weights (%(default)s)")
    parser.add_argument(
        "--vocab",
        default=str(SHARED / "bert-base-uncased-vocab.txt"),
        help="for random weights (%(default)s)",
    )
    parser.add_argument("--examples", type=int, default=2000, help="training examples per task (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with different seeds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed first steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="maximum tokens; transformers pads to it (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if available")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), help="default: amp_bf16 on gpu, fp32 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.device = options.device or ("gpu" if torch.cuda.is_available() else "cpu")
    options.precision = options.precision or ("amp_bf16" if options.device == "gpu" else "fp32")
    require_positive(options, "examples", "epochs", "repeats", "warmup", "batch")
    steps = -(-options.examples // options.batch) * options.epochs
    if steps <= options.warmup:
        raise UserError(
            f"--examples {options.examples} gives {steps} steps; expected more than --warmup {options.warmup}"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate, which is not installed; pip install accelerate")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train every task with both, alternately."""
    source = options.source or random_source(options, folder / "source")
    config = read_config(options, source, folder / "runs")
    cpu_autocast = start(config)
    pretrained = load_source(source)
    if options.length > pretrained.encoder.max_positions:
        raise UserError(f"--length is {options.length}; {source} has {pretrained.encoder.max_positions} positions")
    tasks = {}
    for name in options.tasks.split(","):
        task = dataclasses.replace(find_task(name), swap_augmentation=False)
        train = training_examples(task, read_examples(task, "train", options.data), options.examples, options.seed)
        dev = read_examples(task, "dev", options.data)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for seed in range(options.seed, options.seed + options.repeats):
            seeded = dataclasses.replace(config, seed=seed)
            print(f"{task.folder}, seed {seed}: ours", file=sys.stderr, flush=True)
            runs["ours"].append(run_ours(seeded, pretrained, task, train, dev, options, cpu_autocast))
            print(f"{task.folder}, seed {seed}: transformers", file=sys.stderr, flush=True)
            runs["transformers"].append(run_transformers(source, task, train, dev, options, seed, folder))
        tasks[task.name] = summary(runs, task, train, dev)
    return {
        "benchmark": "glue",
        "options": {**vars(options), "data": Path(options.data).name, "vocab": Path(options.vocab).name}
        | {"source": Path(options.source).name if options.source else f"random weights, {options.size}"},
        "tasks": tasks,
        "counted": HOW,
        "machine": describe(),
        "accelerate": metadata.version("accelerate"),
    }


def summary(
    runs: dict[str, list[dict[str, float]]], task: Task, train: list[Example], dev: list[Example]
) -> dict[str, Any]:
    """Summarize the runs of each: medians, scores, and the ratio of the speeds."""
    medians, speedup = compare(runs)
    return {
        "train_examples": len(train),
        "dev_examples": len(dev),
        "score": task.metrics[0],
        **{who: {**medians[who], "scores": [round(run["score"], 2) for run in found]} for who, found in runs.items()},
        "speedup": speedup,
    }


def compare(runs: dict[str, list[dict[str, float]]]) -> tuple[dict[str, dict[str, float]], float]:
    """Return the medians of each value but the score, of ours and of transformers, and the ratio of the speeds."""
    medians = {
        who: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0] if key != "score"}
        for who, found in runs.items()
    }
    rates = [medians[who]["examples_per_second"] for who in ("ours", "transformers")]
    return medians, round(rates[0] / rates[1], 3)


def random_source(options: argparse.Namespace, folder: Path) -> str:
    """Save an `ElectraForPreTraining` with seeded random weights and its tokenizer to a folder."""
    tokenizer = load_tokenizer(options.vocab)
    layers, hidden, heads, embedding = SIZES[options.size]
    torch.manual_seed(options.seed)
    model = transformers.ElectraForPreTraining(
        transformers.ElectraConfig(
            vocab_size=len(tokenizer),
            embedding_size=embedding,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_config(options: argparse.Namespace, source: str, folder: Path) -> GlueConfig:
    """Load `yamls/glue.yaml` with the shared settings, without layerwise decay, which transformers lacks."""
    overrides = [
        f"model.source={source}",
        f"data.path={options.data}",
        f"data.max_seq_length={options.length}",
        f"data.num_workers={1 if options.device == 'gpu' else 0}",
        f"optimizer.lr={options.lr}",
        "optimizer.layerwise_decay=null",
        "optimizer.bias_correction=true",
        f"trainer.max_duration={options.epochs}ep",
        f"trainer.global_train_batch_size={options.batch}",
        f"trainer.device={options.device}",
        f"trainer.precision={options.precision}",
        "trainer.eval_interval=1dur",
        "trainer.progress_bar=false",
        f"checkpoints.folder={folder}",
    ]
    return load_config(str(ROOT / "yamls" / "glue.yaml"), overrides, GlueConfig)


if __name__ == "__main__":
    report_user_errors(main)()
