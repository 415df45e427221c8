"""One finetuning run each by the package and by transformers' `Trainer`, timed alike; for glue.py."""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility

from electra_composer.checkpoints.weights import Pretrained
from electra_composer.finetuning.data import encode
from electra_composer.finetuning.files import Example
from electra_composer.finetuning.loader import build_loader
from electra_composer.finetuning.metrics import build_metrics
from electra_composer.finetuning.model import build_classifier
from electra_composer.finetuning.tasks import Task
from electra_composer.glue_config import GlueConfig
from electra_composer.training.attention_path import choose_attention
from electra_composer.training.trainer import build_trainer


class Clock:
    """Record the end of each training step and compute the speed without the warm-up steps."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.ends: list[float] = []
        self.started = time.perf_counter()

    def tick(self, step: int, warmup: int, last: int) -> None:
        """Record the end of a step; synchronise with the device only after the last and the last warm-up step."""
        if self.on_gpu and step in (warmup, last):
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, examples: int, batch: int, epochs: int, warmup: int, score: float) -> dict[str, float]:
        """Summarize the run.

        Args:
            examples: examples per epoch; the last batch of an epoch may be smaller.
            batch: rows per batch.
            warmup: number of first steps to leave out.
            score: dev score × 100.
        """
        per_epoch = [batch] * (examples // batch) + [examples % batch] * (examples % batch > 0)
        sizes = per_epoch * epochs
        assert len(self.ends) == len(sizes), "a step was not recorded"
        seconds = self.ends[-1] - self.ends[warmup - 1]
        return {
            "examples_per_second": sum(sizes[warmup:]) / seconds,
            "train_seconds": seconds,
            "whole_seconds": time.perf_counter() - self.started,
            "score": score,
        }


class ComposerClock(Callback):
    """Drives a :class:`Clock` in Composer's trainer."""

    def __init__(self, clock: Clock, warmup: int, last: int):
        self.clock, self.warmup, self.last = clock, warmup, last

    def batch_end(self, state: State, logger: Logger) -> None:
        self.clock.tick(int(state.timestamp.batch), self.warmup, self.last)


class TransformersClock(transformers.TrainerCallback):
    """Drives a :class:`Clock` in transformers' trainer."""

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
    """Train and score with the parts of `electra_composer/glue.py`."""
    clock, last = Clock(options.device == "gpu"), -(-len(train) // options.batch) * options.epochs
    reproducibility.seed_all(config.seed)
    model = build_classifier(pretrained, task, config.model, cpu_autocast)
    encoders = (pretrained.encoder,)
    model.model.attention_path, _ = choose_attention(config.trainer, encoders, options.batch, options.length)
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
    """Train and score with transformers' `Trainer` and its defaults, all examples padded to the full length."""
    clock, last = Clock(options.device == "gpu"), -(-len(train) // options.batch) * options.epochs
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the head is newly initialized
        model = transformers.ElectraForSequenceClassification.from_pretrained(source, num_labels=task.num_outputs)
    if task.is_regression:
        model.config.problem_type = "regression"
    trainer = transformers.Trainer(
        model,
        training_arguments(options, seed, folder),
        train_dataset=padded(task, train, tokenizer, options.length),
        callbacks=[TransformersClock(clock, options.warmup, last)],
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it prints to stdout
    trainer.train()
    score = score_of(task, trainer.predict(padded(task, dev, tokenizer, options.length)))
    result = clock.result(len(train), options.batch, options.epochs, options.warmup, score)
    del trainer, model
    gc.collect()
    return result


def training_arguments(options: argparse.Namespace, seed: int, folder: Path) -> transformers.TrainingArguments:
    """Return the settings of transformers' `Trainer` for the options of a benchmark; the rest are its defaults."""
    return transformers.TrainingArguments(
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
    )


def padded(task: Task, examples: list[Example], tokenizer: Any, length: int) -> Any:
    """Tokenize as `run_glue.py` does: a `datasets.Dataset` with `length` tokens in every row."""
    import datasets

    columns = [list(texts) for texts in zip(*(example.texts for example in examples), strict=True)]
    encoded = tokenizer(*columns, padding="max_length", truncation=True, max_length=length)
    scale = task.target_scale if task.is_regression else 1
    labels = [example.label * scale for example in examples if example.label is not None]
    return datasets.Dataset.from_dict({**encoded, "labels": labels})


def score_of(task: Task, output: Any) -> float:
    """Compute the task's first metric × 100 from the output of `Trainer.predict`."""
    logits, labels = torch.from_numpy(np.asarray(output.predictions)), torch.from_numpy(np.asarray(output.label_ids))
    metric = build_metrics(task)[task.metrics[0]]
    metric.update(logits[:, 0] if task.is_regression else logits.argmax(-1), labels)
    return 100.0 * float(metric.compute())
