"""What is counted and kept during training: metrics, milestones, the run's record; and the seed of every batch.

Throughput, MFU, memory and the loader's share of the time are in monitors.py; time left is Composer's
`RuntimeEstimator`, the learning rate its `LRMonitor`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State, Timestamp, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from electra_composer.checkpoints.saving import MilestoneSaver
from electra_composer.errors import UserError
from electra_composer.model.pretraining import RATIOS
from electra_composer.training.optim import parse_time

# The sums that the pretraining model returns with every microbatch, in this order on the wire.
STATS = (
    "masked",  # positions that the generator predicts
    "mlm_correct",  # of these: its most likely token is the original
    "sampled_correct",  # of these: its sample is the original
    "tokens",  # tokens without padding
    "replaced",  # of these: not the original
    "true_positive",  # replaced and called so by the discriminator
    "false_positive",
    "false_negative",
    "true_negative",
    "mlm_loss_sum",  # over masked positions
    "rtd_loss_sum",  # over tokens
)


def rtd_metrics(stats: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Metrics of generator and discriminator from sums over any number of batches.

    Args:
        stats: the sums of :data:`STATS`.

    Returns:
        `mlm_loss`, `mlm_accuracy`, `sampled_accuracy` (per masked position), `rtd_loss`, `rtd_accuracy`,
        `replaced_share` (per token), `rtd_precision`, `rtd_recall` (of "replaced"). What has nothing to be counted over
        (0 / 0, such as precision where nothing was called replaced) is 0.
    """
    sums = {name: float(stats[name]) for name in STATS}
    sums["rtd_correct"] = sums["true_positive"] + sums["true_negative"]
    return {
        name: _ratio(sums[numerator], sum(sums[term] for term in terms)) for name, (numerator, terms) in RATIOS.items()
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class TrainMetrics(Callback):
    """Metrics of pretraining over the batches since the last log, all processes together.

    Reads `outputs["stats"]` (0-d tensors by the names of :data:`STATS`, of one dtype) of every microbatch and sums it
    on the device, by two small kernels and without waiting for it; only a log does. Sums are fp64, in which a count
    stays exact over any number of tokens. Logged: `metrics/train/…` with the names of :func:`rtd_metrics`, and
    `data/fill`, tokens per place of the batch, the rest being padding.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training logs in any case.
    """

    def __init__(self, log_interval: str = "10ba"):
        self.is_due = interval_scheduler(log_interval, "log_interval")
        self.batch_sums: list[torch.Tensor] = []  # one vector per microbatch
        self.batch_places = 0
        self.sums: torch.Tensor | None = None
        self.places = 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.batch_sums, self.batch_places = [], 0  # also when a batch that ran out of memory starts over

    def after_loss(self, state: State, logger: Logger) -> None:
        stats = state.outputs["stats"]
        # A copy: what a compiled forward returns may lie where its next call writes.
        self.batch_sums.append(torch.stack([stats[name] for name in STATS]))
        self.batch_places += state.batch["input_ids"].numel()

    def batch_end(self, state: State, logger: Logger) -> None:
        for sums in self.batch_sums:
            if self.sums is None:
                self.sums = torch.zeros_like(sums, dtype=torch.float64)
            # Those of a checkpoint are on the CPU.
            self.sums = self.sums.to(sums.device) + sums
        self.places += self.batch_places
        self.batch_sums, self.batch_places = [], 0
        if self.is_due(state, Event.BATCH_END):
            self._log(logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END):
            self._log(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._log(logger)

    def state_dict(self) -> dict[str, Any]:
        """What each process has summed up since the last log, as text: one value, whatever is in it."""
        mine = None if self.sums is None else [*self.sums.tolist(), self.places]
        return {"sums": json.dumps(dist.all_gather_object(mine))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks = [sums for sums in json.loads(state["sums"]) if sums is not None]
        if not ranks:
            return
        if len(ranks) == dist.get_world_size():
            mine = ranks[dist.get_global_rank()]
        else:  # another number of processes: the first has all, the rest nothing
            mine = [sum(values) * (dist.get_global_rank() == 0) for values in zip(*ranks, strict=True)]
        *sums, self.places = mine
        self.sums = torch.tensor(sums, dtype=torch.float64)

    def _log(self, logger: Logger) -> None:
        if self.sums is None:
            return
        vector = torch.cat([self.sums, self.sums.new_tensor([self.places])])
        dist.all_reduce(vector, reduce_operation="SUM")
        *sums, places = vector.tolist()
        self.sums, self.places = None, 0
        metrics = rtd_metrics(dict(zip(STATS, sums, strict=True)))
        logger.log_metrics({f"metrics/train/{name}": value for name, value in metrics.items()})
        logger.log_metrics({"data/fill": _ratio(sums[STATS.index("tokens")], places)})


EVALUATION = 1  # the last of the numbers that its seed follows from, where a batch has none


class BatchSeed(Callback):
    """Masks, samples and dropout of a batch follow from the seed, the process and the batch's number alone.

    Without it they follow from all that ever drew from torch's generator: each evaluation draws (a loader's iterator
    takes a number), and Composer 0.32 does not restore the generator when a Streaming data set resumes in the middle of
    an epoch. With it a resumed run continues as if nothing had happened, and evaluation changes nothing in training.
    What an evaluation masks follows from the same numbers, so that one that is done again gives the same.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        self._set([self.seed, dist.get_global_rank(), state.timestamp.batch.value])

    def eval_start(self, state: State, logger: Logger) -> None:
        self._set([self.seed, dist.get_global_rank(), state.timestamp.batch.value, EVALUATION])

    def _set(self, numbers: list[int]) -> None:
        sequence = np.random.SeedSequence(numbers)
        seed = int(sequence.generate_state(1, np.uint64)[0])
        # The generators of the CPU and of this process's GPU. `torch.manual_seed` also records, for each device that is
        # not in use, from where it was called: up to a millisecond a batch.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)


def interval_scheduler(text: str, key: str) -> Callable[[State, Event], bool]:
    """Whether an interval between logs is over: `(state, event) → bool`, to be asked at the end of a batch or epoch.

    Args:
        text: a Composer time such as `10ba`.
        key: what the interval is called in the configuration.

    Raises:
        UserError: not a positive Composer time.
    """
    interval = parse_time(text, key)
    if interval.value <= 0:
        raise UserError(f"{key}: {text!r}: expected more than nothing, such as 10ba")
    if interval.unit == TimeUnit.BATCH:
        # At every batch, for every callback: a division, where Composer's scheduler takes 30 µs of arithmetic on times.
        return lambda state, event: event == Event.BATCH_END and state.timestamp.batch.value % interval.value == 0
    return create_interval_scheduler(
        text, checkpoint_events=False, final_events={Event.BATCH_END}, include_end_of_training=True
    )


def milestone_saver(
    folder: str, fractions: Sequence[float], latest_filename: str | None = None, **arguments: Any
) -> MilestoneSaver:
    """A saver of checkpoints at fixed fractions of training, which stay for good.

    A fraction fires at the end of the first batch that reaches it. That is told from the clock before and after the
    batch alone, so each fires once, a resumed run included. It works for durations in batches, samples, tokens, and in
    epochs if the loader has a length.

    Args:
        folder: where they go, as `milestone-ba{batch}-rank0.pt`.
        fractions: above 0 and at most 1, such as 0.0625.
        latest_filename: a symlink that is to point to the newest, such as `latest-rank{rank}.pt`.
        arguments: of the saver; a run that resumes from before a milestone needs `overwrite`.

    Raises:
        UserError: a fraction out of range.
    """
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"checkpoints.milestones: {fraction} is no share of training; expected above 0, at most 1")

    def is_due(state: State, event: Event) -> bool:
        if event != Event.BATCH_CHECKPOINT or state.previous_timestamp is None:
            return False
        before, now = elapsed_fraction(state, state.previous_timestamp), elapsed_fraction(state, state.timestamp)
        return any(before < fraction <= now for fraction in fractions)

    return MilestoneSaver(folder, "milestone-ba", latest_filename, save_interval=is_due, **arguments)


def elapsed_fraction(state: State, timestamp: Timestamp) -> float:
    """How much of `state.max_duration` is over at `timestamp`; epochs are counted in batches.

    Raises:
        UserError: a duration in epochs of a loader that has no length.
    """
    duration = state.max_duration
    assert duration is not None
    if duration.unit != TimeUnit.EPOCH:
        return timestamp.get(duration.unit).value / duration.value
    if state.dataloader_len is None:
        raise UserError("the loader has no length, so milestones need trainer.max_duration in ba, sp or tok")
    return timestamp.batch.value / (duration.value * int(state.dataloader_len))


class RunRecord(Callback):
    """Keeps what made the run beside it and inside its checkpoints: the configuration and the tokenizer.

    When training starts, the first process prints the configuration, and writes `config.yaml` and `tokenizer/` into
    the run's folder; each appears whole or not at all. The loggers get the configuration as hyperparameters. Every
    checkpoint holds the record under `["state"]["callbacks"]["RunRecord"]` (`config`, `tokenizer_files`), so that it
    suffices for export and finetuning. A resumed run keeps its own record, not the checkpoint's.

    Args:
        config: the resolved configuration, plain dictionaries and lists.
        config_yaml: the same as YAML text.
        run_folder: the run's folder.
        tokenizer_files: name of file → its text; empty if there is none.
        print_config: whether to print the YAML.
    """

    def __init__(
        self,
        config: dict[str, Any],
        config_yaml: str,
        run_folder: str,
        tokenizer_files: Mapping[str, str] | None = None,
        print_config: bool = True,
    ):
        self.config = config
        self.config_yaml = config_yaml
        self.run_folder = run_folder
        self.tokenizer_files = dict(tokenizer_files or {})
        self.print_config = print_config

    def fit_start(self, state: State, logger: Logger) -> None:
        logger.log_hyperparameters(self.config)
        if dist.get_global_rank() != 0:
            return
        if self.print_config:
            print(self.config_yaml, flush=True)
        os.makedirs(self.run_folder, exist_ok=True)
        _write_whole(os.path.join(self.run_folder, "config.yaml"), self.config_yaml)
        if self.tokenizer_files:
            _write_folder(os.path.join(self.run_folder, "tokenizer"), self.tokenizer_files)

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer_files": self.tokenizer_files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # the record is of the run that is running


def _write_whole(path: str, text: str) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def _write_folder(path: str, files: Mapping[str, str]) -> None:
    """Write a folder of files beside its place and move it there when it is complete."""
    for left_over in (f"{path}.tmp", f"{path}.old"):
        shutil.rmtree(left_over, ignore_errors=True)
    os.makedirs(f"{path}.tmp")
    for name, text in files.items():
        with open(os.path.join(f"{path}.tmp", name), "w", encoding="utf-8") as file:
            file.write(text)
    if os.path.isdir(path):
        os.rename(path, f"{path}.old")
    os.rename(f"{path}.tmp", path)
    shutil.rmtree(f"{path}.old", ignore_errors=True)
