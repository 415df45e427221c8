"""What objectives.py compares: configurations, the commands that train and finetune them, and what is read of a run."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_composer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ELECTRA, FLOOR = "electra", "floor"


@dataclass(frozen=True)
class Configuration:
    """An objective, generator or kind of sharing.

    Args:
        stages: overrides of `objectives.yaml` for each run; the runs share the budget equally, and each starts from the
            networks of the one before.
        pretrained: whether to finetune the weights; otherwise random weights of the same sizes.
    """

    stages: tuple[tuple[str, ...], ...] = ((),)
    pretrained: bool = True


CONFIGURATIONS = {
    ELECTRA: Configuration(),
    "mlm": Configuration((("objective.kind=mlm",),)),
    "replace_mlm": Configuration((("objective.kind=replace_mlm",),)),
    "all_tokens_mlm": Configuration((("objective.kind=all_tokens_mlm",),)),
    "electra_15": Configuration((("objective.kind=electra_15",),)),
    "electric": Configuration((("objective.kind=electric",),)),
    "uniform": Configuration((("objective.generator=uniform",),)),
    "unigram": Configuration((("objective.generator=unigram",),)),
    # Paper, section 3.2: the generator is trained first, and the discriminator starts from its weights.
    "two_stage": Configuration(
        (
            ("objective.kind=mlm", "model.generator_size=1.0"),
            ("objective.generator=frozen", "model.sharing=untied", "model.generator_size=1.0"),
        )
    ),
    "untied": Configuration((("model.sharing=untied",),)),
    "gdes": Configuration((("model.sharing=gdes",),)),
    FLOOR: Configuration(pretrained=False),
}
"""In the order of the table. Extend it by a line with overrides of `pretrain.py`."""

BATCH_TOKENS = 1024  # in a short run many steps are worth more than large batches
WARM_STEPS = 150  # of the run that measures the speed
SPEED_WINDOW = 30  # steps; the first window, in which memory is allocated, does not count
FLOOR_STEPS = 2  # of the run that writes the sizes and the tokenizer of the random weights
SMOKE_PRETRAIN = (
    "model.hidden_size=32",
    "model.embedding_size=32",
    "trainer.precision=fp32",
    "trainer.eval_batches=2",
    "trainer.device=cpu",
)
SMOKE_FINETUNE = ("trainer.precision=fp32", "trainer.device=cpu", "trainer.max_duration=1ep")
SMOKE_WARM_STEPS, SMOKE_SPEED_WINDOW = 8, 2
FINETUNE_LENGTH = 64  # tokens: nearly all sentences of CoLA and SST-2
FINETUNE = (
    "data.cache=null",
    "model.dropout=0.1",
    "optimizer.lr=1.0e-3",  # for a network of width 128
    "optimizer.layerwise_decay=null",
    "optimizer.bias_correction=true",  # few steps, see quickstart.yaml
    "trainer.max_duration=3ep",
    "trainer.eval_interval=1dur",
    "trainer.progress_bar=false",
)


def choose(names: Sequence[str]) -> dict[str, Configuration]:
    """Return the named configurations, in the order of :data:`CONFIGURATIONS`.

    Raises:
        UserError: a name is unknown.
    """
    unknown = sorted(set(names) - CONFIGURATIONS.keys())
    if unknown:
        raise UserError(f"--configurations {' '.join(unknown)}: expected some of {', '.join(CONFIGURATIONS)}")
    return {name: configuration for name, configuration in CONFIGURATIONS.items() if name in names}


def steps_within(seconds: float, steps_per_second: float) -> int:
    """Return how many steps fit into the time, at least one."""
    return max(1, int(seconds * steps_per_second))


def pretrain_command(overrides: Sequence[str], folder: Path, steps: int, seed: int, options: Any) -> list[str]:
    """Return the command of a pretraining run with a complete schedule of `steps` steps in a new folder."""
    window = SMOKE_SPEED_WINDOW if options.smoke else SPEED_WINDOW
    command = [sys.executable, "electra_composer/pretrain.py", "benchmarks/objectives.yaml", f"seed={seed}"]
    command += [f"data.path={options.data}", f"data.max_seq_length={options.length}"]
    command += [f"trainer.global_train_batch_size={max(1, BATCH_TOKENS // options.length)}"]
    command += [f"trainer.max_duration={steps}ba", f"checkpoints.folder={folder}"]
    # Not to resume what an interrupted run has left: the time of the rest is not that of the complete run.
    command += ["checkpoints.resume=false", "checkpoints.overwrite=true"]
    command += [f"callbacks.speed_monitor.window_size={window}", f"trainer.log_interval={window}ba"]
    return [*command, *(SMOKE_PRETRAIN if options.smoke else ()), *overrides]


def finetune_command(configuration: Configuration, source: Path, folder: Path, options: Any) -> list[str]:
    """Return the command that finetunes a run on all tasks and seeds."""
    command = [sys.executable, "electra_composer/glue.py", "yamls/glue.yaml", f"model.source={source}"]
    command += [f"model.random_init={'false' if configuration.pretrained else 'true'}", f"data.path={options.tasks}"]
    command += [f"tasks=[{','.join(options.task_names)}]", f"seeds=[{','.join(map(str, options.seeds))}]"]
    command += [f"checkpoints.folder={folder}", f"max_train_examples={options.examples}"]
    command += [f"data.max_seq_length={min(FINETUNE_LENGTH, options.length)}", *FINETUNE]
    return [*command, *(SMOKE_FINETUNE if options.smoke else ())]


def speed_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return medians over the windows of the speed monitor but the first, of `metrics.jsonl`.

    Returns:
        `steps_per_second`, `tokens_per_second`, and `flops_per_step` (the mean: it depends on the batch).

    Raises:
        UserError: the run is too short for two windows.
    """
    prefix = "throughput/"
    windows = [row for row in rows if row.get(f"{prefix}batches_per_sec")][1:]
    if not windows:
        raise UserError("the run ended before its speed was measured; set a larger --budget")
    flops = [row[f"{prefix}flops_per_sec"] / row[f"{prefix}batches_per_sec"] for row in windows]
    return {
        "steps_per_second": statistics.median(row[f"{prefix}batches_per_sec"] for row in windows),
        "tokens_per_second": statistics.median(row[f"{prefix}tokens_per_sec"] for row in windows),
        "flops_per_step": statistics.fmean(flops),
    }


def train_seconds_of(rows: Sequence[dict[str, Any]]) -> float:
    """Return the time of the training loop, without evaluation, of `metrics.jsonl`."""
    return 3600 * [row["time/train"] for row in rows if "time/train" in row][-1]


def losses_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the last evaluation: its metrics' names without their prefix, and values."""
    prefix = "metrics/eval/"
    last: dict[str, float] = {}
    for row in rows:
        last |= {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
    return {name: round(value, 4) for name, value in last.items() if value is not None and math.isfinite(value)}


def scores_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return of a `results.json` of `glue.py`, for each task: the metric, and the scores in the order of the seeds."""
    return {
        name: {"metric": task["metric"], "scores": [round(run["score"], 3) for run in task["runs"]]}
        for name, task in results["tasks"].items()
    }
