"""Finetuning on SST-2 and MRPC, ours against transformers' `Trainer` as it is usually run: one JSON line.

    python benchmarks/glue.py [--tasks sst2,mrpc] [--examples 2000] [--data FOLDER] [--source FOLDER]

One process, in turns: ours (the model, loader and trainer of `glue.py`), then `ElectraForSequenceClassification` with
every example padded to the full length, as `run_glue.py` of transformers does by default. Both start from the same
weights and see the same examples in batches of the same size at the same learning rate. Swapped pairs are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility
from machine import describe

from electra_composer.checkpoints.weights import Pretrained, load_source
from electra_composer.config import GlueConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetune.data import encode, training_examples
from electra_composer.finetune.files import Example, read_examples
from electra_composer.finetune.loader import build_loader
from electra_composer.finetune.metrics import build_metrics
from electra_composer.finetune.model import build_classifier
from electra_composer.finetune.tasks import Task, find_task
from electra_composer.training.devices import choose_attention
from electra_composer.training.startup import start
from electra_composer.training.trainer import build_trainer
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
    """The command line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options with their defaults for this machine filled in.

    Raises:
        UserError: one that cannot be, or a package that is missing.
    """
    parser = argparse.ArgumentParser(prog="benchmarks/glue.py", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", default="sst2,mrpc")
    parser.add_argument(
        "--data", default=str(SHARED / "glue_data"), help="folder of the TSV files, or hub (%(default)s)"
    )
    parser.add_argument(
        "--source", help="folder of ElectraForPreTraining, or its name on the hub; default: random weights"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of random weights (%(default)s)")
    parser.add_argument(
        "--vocab", default=str(SHARED / "bert-base-uncased-vocab.txt"), help="tokenizer of random weights (%(default)s)"
    )
    parser.add_argument("--examples", type=int, default=2000, help="training examples of a task (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with seeds of their own (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="first steps, not timed (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="most tokens; transformers pads to it (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu where there is one")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), help="default: amp_bf16 on gpu, fp32 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.device = options.device or ("gpu" if torch.cuda.is_available() else "cpu")
    options.precision = options.precision or ("amp_bf16" if options.device == "gpu" else "fp32")
    for name in ("examples", "epochs", "repeats", "warmup", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; expected at least 1")
    steps = -(-options.examples // options.batch) * options.epochs
    if steps <= options.warmup:
        raise UserError(f"--examples {options.examples}: {steps} steps, of which --warmup {options.warmup}; take more")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate, which is not installed; pip install accelerate")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every task with both, in turns."""
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
    """Medians over the runs of each, their scores, and the ratio of the speeds."""
    medians = {
        who: {key: round(statistics.median(run[key] for run in found), 3) for key in found[0] if key != "score"}
        for who, found in runs.items()
    }
    rates = [medians[who]["examples_per_second"] for who in ("ours", "transformers")]
    return {
        "train_examples": len(train),
        "dev_examples": len(dev),
        "score": task.metrics[0],
        **{who: {**medians[who], "scores": [round(run["score"], 2) for run in found]} for who, found in runs.items()},
        "speedup": round(rates[0] / rates[1], 3),
    }


def random_source(options: argparse.Namespace, folder: Path) -> str:
    """A folder of `ElectraForPreTraining` with seeded random weights, and its tokenizer."""
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
    """`yamls/glue.yaml` with what both sides share; layerwise decay off, which transformers does not have."""
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


class Clock:
    """When each step ended, and how many examples a second that is without the first steps."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.ends: list[float] = []
        self.started = time.perf_counter()

    def tick(self, step: int, warmup: int, last: int) -> None:
        """Called at the end of every step; waits for the device only where a time is needed."""
        if self.on_gpu and step in (warmup, last):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, examples: int, batch: int, epochs: int, warmup: int, score: float) -> dict[str, float]:
        """What a run is summed up by.

        Args:
            examples: of one epoch, whose last batch may be a smaller one.
            batch: rows.
            warmup: first steps that do not count.
            score: × 100.
        """
        per_epoch = [batch] * (examples // batch) + [examples % batch] * (examples % batch > 0)
        sizes = per_epoch * epochs
        assert len(self.ends) == len(sizes), "a step that was not seen"
        seconds = self.ends[-1] - self.ends[warmup - 1]
        return {
            "examples_per_second": sum(sizes[warmup:]) / seconds,
            "train_seconds": seconds,
            "whole_seconds": time.perf_counter() - self.started,
            "score": score,
        }


class ComposerClock(Callback):
    """A :class:`Clock` for Composer."""

    def __init__(self, clock: Clock, warmup: int, last: int):
        self.clock, self.warmup, self.last = clock, warmup, last

    def batch_end(self, state: State, logger: Logger) -> None:
        self.clock.tick(int(state.timestamp.batch), self.warmup, self.last)


class TransformersClock(transformers.TrainerCallback):
    """A :class:`Clock` for transformers."""

    def __init__(self, clock: Clock, warmup: int, last: int):
        self.clock, self.warmup, self.last = clock, warmup, last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.tick(state.global_step, self.warmup, self.last)


def run_ours(
    config: GlueConfig,
    pretrained: Pretrained,
    task: Task,
    train: list[Example],
    dev: list[Example],
    options: argparse.Namespace,
    cpu_autocast: bool,
) -> dict[str, float]:
    """One run by what `glue.py` is made of."""
    clock, last = Clock(options.device == "gpu"), -(-len(train) // options.batch) * options.epochs
    reproducibility.seed_all(config.seed)
    model = build_classifier(pretrained, task, config.model, cpu_autocast)
    model.model.attention_path, _ = choose_attention(config.trainer, pretrained.encoder, options.batch, options.length)
    tokenizer = pretrained.tokenizer
    loaders = [
        build_loader(encode(task, examples, tokenizer, options.length), tokenizer.pad_token_id, rows, workers, seed)
        for examples, rows, seed, workers in (
            (train, options.batch, config.seed, config.data.num_workers),
            (dev, config.trainer.device_eval_batch_size, None, config.data.num_workers),
        )
    ]
    trainer = build_trainer(
        config,
        model,
        *loaders,
        config.trainer.max_duration or "",
        callbacks=[ComposerClock(clock, options.warmup, last)],
        static_shapes=False,
    )
    trainer.fit()
    score = 100.0 * float(trainer.state.eval_metrics["eval"][task.metrics[0]].compute())
    result = clock.result(len(train), options.batch, options.epochs, options.warmup, score)
    trainer.close()
    del trainer, model
    gc.collect()
    return result


def run_transformers(
    source: str,
    task: Task,
    train: list[Example],
    dev: list[Example],
    options: argparse.Namespace,
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """One run of transformers' `Trainer` with its defaults, all examples padded to the full length."""
    clock, last = Clock(options.device == "gpu"), -(-len(train) // options.batch) * options.epochs
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head's new weights, as everybody sees them
        model = transformers.ElectraForSequenceClassification.from_pretrained(source, num_labels=task.num_outputs)
    if task.is_regression:
        model.config.problem_type = "regression"
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder / "transformers"),
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=128,
            learning_rate=options.lr,
            warmup_ratio=0.1,
            num_train_epochs=options.epochs,
            use_cpu=options.device == "cpu",
            bf16=options.precision == "amp_bf16",
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=padded(task, train, tokenizer, options.length),
        callbacks=[TransformersClock(clock, options.warmup, last)],
    )
    trainer.train()
    score = score_of(task, trainer.predict(padded(task, dev, tokenizer, options.length)))
    result = clock.result(len(train), options.batch, options.epochs, options.warmup, score)
    del trainer, model
    gc.collect()
    return result


def padded(task: Task, examples: list[Example], tokenizer: Any, length: int) -> Any:
    """Tokenized as `run_glue.py` does it: a `datasets.Dataset` whose rows all have `length` tokens."""
    import datasets

    columns = [list(texts) for texts in zip(*(example.texts for example in examples), strict=True)]
    encoded = tokenizer(*columns, padding="max_length", truncation=True, max_length=length)
    scale = task.target_scale if task.is_regression else 1
    labels = [example.label * scale for example in examples if example.label is not None]
    return datasets.Dataset.from_dict({**encoded, "labels": labels})


def score_of(task: Task, output: Any) -> float:
    """The task's first metric × 100 of what `Trainer.predict` gave."""
    logits, labels = torch.from_numpy(np.asarray(output.predictions)), torch.from_numpy(np.asarray(output.label_ids))
    metric = build_metrics(task)[task.metrics[0]]
    metric.update(logits[:, 0] if task.is_regression else logits.argmax(-1), labels)
    return 100.0 * float(metric.compute())


if __name__ == "__main__":
    report_user_errors(main)()
