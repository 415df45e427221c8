r"""Finetuning on your own tasks compared with transformers' `Trainer`; prints one JSON line.

    python benchmarks/finetune.py --classification train.csv dev.csv --tagging train.conll dev.conll \
        --qa train.json dev.json

Both run alternately in one process: ours (the parts of `electra_composer/finetune.py`), then transformers' `Trainer`
with `ElectraForSequenceClassification`, `ForTokenClassification` or `ForQuestionAnswering`. Both start from the same
weights and get the same rows, batch size and learning rate. Rows are padded as transformers' examples do by default:
`run_glue.py` and `run_qa.py` to the full length, `run_ner.py` to the longest of a batch. Scores are those of the task.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from composer.utils import reproducibility
from glue import SIZES, compare, random_source
from glue_runs import Clock, ComposerClock, TransformersClock, training_arguments
from machine import describe, require_positive

from electra_composer.checkpoints.weights import Pretrained, load_source
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError, report_user_errors
from electra_composer.finetune_config import FinetuneConfig
from electra_composer.finetuning.fit import fitted
from electra_composer.finetuning.task_data import Rows, open_splits, read_rows
from electra_composer.tasks.base import Task
from electra_composer.tasks.encoded import EncodedRows, collate
from electra_composer.tasks.kinds import build_task
from electra_composer.tasks.model import build_task_model
from electra_composer.training.startup import start

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
LENGTHS = {"classification": 128, "tagging": 128, "qa": 384}
MODELS = {
    "classification": transformers.ElectraForSequenceClassification,
    "tagging": transformers.ElectraForTokenClassification,
    "qa": transformers.ElectraForQuestionAnswering,
}
EVAL_ROWS = 128
INPUTS = {"input_ids": "input_ids", "attention_mask": "sequence_ids", "token_type_ids": "token_type_ids"}
HOW = (
    "rows per second of the training loop, from the end of the last warm-up step to the end of the last step: loading, "
    "forward, backward, clipping, optimizer; whole_seconds: with building the model and the evaluation"
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
    parser = argparse.ArgumentParser(prog="benchmarks/finetune.py", description=__doc__.split("\n")[0])
    for option in ("--classification", "--tagging", "--qa"):
        parser.add_argument(option, nargs=2, metavar=("TRAIN", "VALIDATION"), help="files of the data")
    parser.add_argument("--source", help="ElectraForPreTraining: folder or name on the hub; default: random weights")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the random weights (%(default)s)")
    parser.add_argument("--vocab", default=str(SHARED / "bert-base-uncased-vocab.txt"), help="for random weights")
    parser.add_argument("--examples", type=int, default=2000, help="training examples per task (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each, with different seeds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="untimed first steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if available")
    parser.add_argument("--precision", choices=("fp32", "amp_bf16"), help="default: amp_bf16 on gpu, fp32 on cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.device = options.device or ("gpu" if torch.cuda.is_available() else "cpu")
    options.precision = options.precision or ("amp_bf16" if options.device == "gpu" else "fp32")
    require_positive(options, "examples", "epochs", "repeats", "warmup", "batch")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("transformers' Trainer needs accelerate, which is not installed; pip install accelerate")
    if not any(getattr(options, kind) for kind in LENGTHS):
        raise UserError("no data; expected --classification, --tagging or --qa with two files each")
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train every task with both, alternately."""
    source = options.source or random_source(options, folder / "source")
    pretrained = load_source(source)
    tasks = {}
    for kind, length in LENGTHS.items():
        if getattr(options, kind) is None:
            continue
        config = read_config(kind, length, options, source, folder / kind)
        cpu_autocast = start(config)
        task = build_task(config.task, config.model)
        splits = open_splits(task, config.data, say)
        positions = pretrained.encoder.max_positions
        rows = read_rows(task, config, splits, pretrained.tokenizer, positions, False, say)
        steps = -(-len(rows.train) // options.batch) * options.epochs
        if steps <= options.warmup:
            raise UserError(f"--{kind}: {steps} steps; expected more than --warmup {options.warmup}")
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for seed in range(options.seed, options.seed + options.repeats):
            say(f"{kind}, seed {seed}: ours")
            runs["ours"].append(run_ours(config, pretrained, task, rows, options, seed, cpu_autocast))
            say(f"{kind}, seed {seed}: transformers")
            runs["transformers"].append(run_transformers(source, task, rows, options, seed, folder))
        tasks[kind] = summary(runs, task, rows)
    files = {kind: [Path(file).name for file in getattr(options, kind)] for kind in tasks}
    return {
        "benchmark": "finetune",
        "options": {**vars(options), **files, "vocab": Path(options.vocab).name}
        | {"source": Path(options.source).name if options.source else f"random weights, {options.size}"},
        "tasks": tasks,
        "counted": HOW,
        "machine": describe(),
        "accelerate": metadata.version("accelerate"),
    }


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def read_config(kind: str, length: int, options: argparse.Namespace, source: str, folder: Path) -> FinetuneConfig:
    """Load the YAML file of a task with the shared settings, without layerwise decay, which transformers lacks."""
    train, validation = getattr(options, kind)
    overrides = [
        f"model.source={source}",
        f"data.train={train}",
        f"data.validation={validation}",
        f"data.max_seq_length={length}",
        f"max_train_examples={options.examples}",
        f"optimizer.lr={options.lr}",
        "optimizer.layerwise_decay=null",
        "optimizer.bias_correction=true",
        f"trainer.max_duration={options.epochs}ep",
        f"trainer.global_train_batch_size={options.batch}",
        f"trainer.device={options.device}",
        f"trainer.precision={options.precision}",
        "trainer.eval_interval=1dur",
        "trainer.progress_bar=false",
        "epoch=last",
        f"checkpoints.folder={folder}",
    ]
    return load_config(str(ROOT / "yamls" / f"{kind}.yaml"), overrides, FinetuneConfig)


def run_ours(
    config: FinetuneConfig,
    pretrained: Pretrained,
    task: Task,
    rows: Rows,
    options: argparse.Namespace,
    seed: int,
    cpu_autocast: bool,
) -> dict[str, float]:
    """Train and score with the parts of `electra_composer/finetune.py`."""
    clock, last = Clock(options.device == "gpu"), -(-len(rows.train) // options.batch) * options.epochs
    reproducibility.seed_all(seed)
    model = build_task_model(pretrained, task, config.model, rows.validation, cpu_autocast)
    callbacks: list[Any] = [ComposerClock(clock, options.warmup, last)]
    pad_id = pretrained.tokenizer.pad_token_id
    with fitted(config, model, rows.train, {"": rows.validation}, pad_id, "sdpa", callbacks) as (trainer, _):
        score = 100.0 * float(trainer.state.eval_metrics["eval"][task.score].compute())
    del trainer, model
    gc.collect()
    return clock.result(len(rows.train), options.batch, options.epochs, options.warmup, score)


def run_transformers(
    source: str, task: Task, rows: Rows, options: argparse.Namespace, seed: int, folder: Path
) -> dict[str, float]:
    """Train and score with transformers' `Trainer` and its defaults."""
    clock, last = Clock(options.device == "gpu"), -(-len(rows.train) // options.batch) * options.epochs
    transformers.set_seed(seed)
    transformers.utils.logging.set_verbosity_error()  # that the head is newly initialized
    labels = {} if task.kind == "qa" else {"num_labels": len(task.labels)}  # type: ignore[attr-defined]
    model: Any = MODELS[task.kind].from_pretrained(source, **labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    multiple = 8 if options.precision == "amp_bf16" else None  # as run_ner.py does with half precision
    collator = transformers.DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=multiple)
    trainer = transformers.Trainer(
        model,
        training_arguments(options, seed, folder),
        train_dataset=dataset(task, rows.train, rows.max_seq_length),
        data_collator=collator if task.kind == "tagging" else None,
        callbacks=[TransformersClock(clock, options.warmup, last)],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    trainer.train()
    score = (
        100.0
        * task.scores(rows.validation, outputs_of(model.eval(), task, rows.validation, tokenizer.pad_token_id))[
            task.score
        ]
    )
    result = clock.result(len(rows.train), options.batch, options.epochs, options.warmup, score)
    del trainer, model
    gc.collect()
    return result


def dataset(task: Task, rows: EncodedRows, length: int) -> Any:
    """Convert rows to a `datasets.Dataset` for transformers' models, padded to `length` except for tagging."""
    import datasets

    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    for index in range(len(rows)):
        row = rows[index]
        count = len(row.input_ids)
        padding = [0] * (0 if task.kind == "tagging" else length - count)
        columns["input_ids"].append([*row.input_ids.tolist(), *padding])
        columns["attention_mask"].append([1] * count + padding)
        columns["token_type_ids"].append([0] * row.first_length + [1] * (count - row.first_length) + padding)
        for name, value in {**row.per_row, **row.per_token}.items():
            columns.setdefault(name, []).append(np.asarray(value).tolist())
    return datasets.Dataset.from_dict(columns)


@torch.no_grad()
def outputs_of(model: torch.nn.Module, task: Task, rows: EncodedRows, pad_id: int) -> list[Any]:
    """Run a model of transformers on rows, and keep what the task keeps of its own model."""
    found: dict[int, Any] = {}
    order = np.argsort(-rows.lengths, kind="stable").tolist()
    for start_row in range(0, len(order), EVAL_ROWS):
        batch = collate([rows[index] for index in order[start_row : start_row + EVAL_ROWS]], pad_id)
        inputs = {name: batch[key].to(model.device) for name, key in INPUTS.items()}  # type: ignore[union-attr]
        output = model(**inputs)
        logits = torch.stack([output.start_logits, output.end_logits], dim=-1) if task.kind == "qa" else output.logits
        found |= dict(zip(batch["indices"].tolist(), task.keep(logits, batch), strict=True))
    return [found[index] for index in range(len(rows))]


def summary(runs: dict[str, list[dict[str, float]]], task: Task, rows: Rows) -> dict[str, Any]:
    """Summarize the runs of each: medians, scores, and the ratio of the speeds."""
    medians, speedup = compare(runs)
    return {
        "train_rows": len(rows.train),
        "validation_rows": len(rows.validation),
        "max_seq_length": rows.max_seq_length,
        "score": task.score,
        **{who: {**medians[who], "scores": [round(run["score"], 2) for run in found]} for who, found in runs.items()},
        "speedup": speedup,
    }


if __name__ == "__main__":
    report_user_errors(main)()
