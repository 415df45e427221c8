"""Finetune on GLUE: `composer electra_composer/glue.py yamls/glue.yaml [key=value …]`."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from typing import Any

from composer.utils import dist, reproducibility

from electra_composer.checkpoint import Pretrained, load_source
from electra_composer.config import GlueConfig, load_config_from_command_line
from electra_composer.errors import UserError, report_user_errors
from electra_composer.glue_data import EncodedExamples, build_loader, encode, read_examples, training_examples
from electra_composer.glue_model import build_classifier
from electra_composer.glue_results import (
    add_run,
    describe_source,
    headline,
    is_done,
    load_results,
    save_results,
    table,
)
from electra_composer.glue_tasks import Task, find_task
from electra_composer.optim import parse_time
from electra_composer.runs import build_trainer, device_batch_size, start
from electra_composer.versions import check_versions


def main(config: GlueConfig) -> dict[str, Any]:
    """Finetune one model per task and seed, score each on the task's dev set.

    Args:
        config: see config.py.

    Returns:
        What the results file holds: `tasks` by name, each with `mean`, `std`, `median`, `best` and `runs`; `average`
        over the real tasks; `config`, `source`, `versions`. Scores are multiplied by 100.

    Raises:
        UserError: anything about the configuration, the source or the data that the caller can mend. The results of
            the runs before it are on disk.
    """
    check_versions()
    tasks = check_config(config)
    cpu_autocast = start(config)
    source = load_source(config.model.source)
    if config.data.max_seq_length > source.encoder.max_positions:
        raise UserError(
            f"data.max_seq_length is {config.data.max_seq_length}, but {source.name} has "
            f"{source.encoder.max_positions} positions; expected no more than these"
        )
    results = _from_first_process(lambda: load_results(config, describe_source(source, config.model.random_init)))
    todo = {task: [seed for seed in config.seeds if not is_done(results, task, seed)] for task in tasks}
    total, count = sum(map(len, todo.values())), 0
    say(f"{len(tasks)} tasks × {len(config.seeds)} seeds: {total} runs to do; results in {config.results}")
    # All files are read before the first run: what is wrong with the last task shows now, not in some hours.
    examples = {task: read_task(config, task) for task, seeds in todo.items() if seeds}
    for task, (train, dev) in examples.items():
        progress = config.trainer.progress_bar and dist.get_local_rank() == 0
        data = [encode(task, part, source.tokenizer, config.data.max_seq_length, progress) for part in (train, dev)]
        for seed in todo[task]:
            count += 1
            say(f"\nrun {count} of {total}: {task.folder}, seed {seed}: {len(train)} training, {len(dev)} dev examples")
            add_run(results, task, finetune(config, source, task, seed, data[0], data[1], cpu_autocast))
            if dist.get_global_rank() == 0:
                save_results(results, config.results)
    say(f"\n{headline(results)}\n\n{table(results)}\n\nwritten to {config.results}")
    return results


def finetune(
    config: GlueConfig,
    source: Pretrained,
    task: Task,
    seed: int,
    train: EncodedExamples,
    dev: EncodedExamples,
    cpu_autocast: bool,
) -> dict[str, Any]:
    """One run: a fresh model from `source`, trained on `train`, scored on `dev`.

    Returns:
        `seed`, `metrics` (name → score × 100), steps, sizes, seconds of training and of the whole run.
    """
    started = time.monotonic()
    name = f"{task.name}-seed{seed}"
    run_config = dataclasses.replace(
        config,
        run_name=f"{config.run_name}-{name}",
        seed=seed,
        checkpoints=dataclasses.replace(config.checkpoints, folder=os.path.join(config.checkpoints.folder, name)),
    )
    reproducibility.seed_all(seed)  # the same on every process: the head and random weights must start equal
    model = build_classifier(source, task, config.model, cpu_autocast)
    pad_id, workers = source.tokenizer.pad_token_id, config.data.num_workers
    trainer = build_trainer(
        run_config,
        model,
        build_loader(train, pad_id, device_batch_size(config.trainer), workers, shuffle_seed=seed),
        build_loader(dev, pad_id, config.trainer.device_eval_batch_size, workers, shuffle_seed=None),
        config.trainer.max_duration or f"{task.epochs}ep",
    )
    trainer.fit()
    timestamp, metrics = trainer.state.timestamp, trainer.state.eval_metrics["eval"]
    assert all(metric.update_count for metric in metrics.values())  # `check_config` saw to it
    run = {
        "seed": seed,
        "metrics": {name: 100.0 * float(metric.compute()) for name, metric in metrics.items()},
        "steps": timestamp.batch.value,
        "train_examples": len(train),
        "dev_examples": len(dev),
        "train_seconds": timestamp.total_wct.total_seconds(),
        "examples_per_second": timestamp.sample.value / max(timestamp.total_wct.total_seconds(), 1e-9),
        "seconds": time.monotonic() - started,
    }
    trainer.close()
    del trainer, model, metrics
    gc.collect()  # trainers refer to themselves; without this their models pile up on the device
    return run


def read_task(config: GlueConfig, task: Task) -> tuple[list[Any], list[Any]]:
    """Training examples (sampled and swapped as wanted) and dev examples of a task."""
    train = read_examples(task, "train", config.data.path)
    dev = read_examples(task, "dev", config.data.path)
    return training_examples(task, train, config.max_train_examples, config.seed), dev


def check_config(config: GlueConfig) -> list[Task]:
    """The tasks of the configuration, once each.

    Raises:
        UserError: an unknown task, none at all, or settings that finetuning does not take.
    """
    tasks = list(dict.fromkeys(find_task(name).name for name in config.tasks))
    if not tasks:
        raise UserError("tasks is empty; expected names such as [cola, sst2]")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or not all(0 <= s < 2**32 for s in config.seeds):
        raise UserError(f"seeds is {config.seeds}; expected different whole numbers from 0, one per run")
    if config.max_train_examples is not None and config.max_train_examples < 1:
        raise UserError(f"max_train_examples is {config.max_train_examples}; expected at least 1, or null for all")
    if config.checkpoints.load_path is not None:
        raise UserError("checkpoints.load_path is for pretraining; what is finetuned is model.source")
    if parse_time(config.trainer.eval_interval, "trainer.eval_interval").value == 0:
        raise UserError(
            f"trainer.eval_interval is {config.trainer.eval_interval}: nothing would be scored; expected 1dur"
        )
    if config.trainer.eval_batches is not None:
        raise UserError("trainer.eval_batches is for pretraining; scores are of the whole dev set: set it to null")
    if config.trainer.fsdp is not None:
        raise UserError("trainer.fsdp is for pretraining; finetuning runs on DDP: set it to null")
    found = [find_task(name) for name in tasks]
    if config.regression_targets == "raw":
        found = [dataclasses.replace(task, target_scale=1.0) for task in found]
    return found


def _from_first_process(make: Any) -> Any:
    """The first process's value, on all of them: only its disk is sure to hold the results file."""
    holder = [make() if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def say(text: str) -> None:
    """Print, on the first process alone."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    # Loader processes are forked after the tokenizer has run, and never use it: nothing to be warned of.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    report_user_errors(main)(
        load_config_from_command_line(GlueConfig, "composer electra_composer/glue.py yamls/glue.yaml [key=value …]")
    )
