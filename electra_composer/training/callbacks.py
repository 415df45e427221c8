"""Callbacks of every run: training metrics, the seed of each batch, and the record of the run.

Throughput, MFU, memory and data waiting time are in monitors.py. The time left is Composer's `RuntimeEstimator`, the
learning rate its `LRMonitor`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist

from electra_composer.atomic_files import replaced_folder, write_file
from electra_composer.model.losses import in_order, ratios_of, with_derived
from electra_composer.training.times import IntervalCallback


def pretraining_metrics(stats: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Compute the metrics of an objective from sums over any number of batches.

    Args:
        stats: sums named as in :data:`~electra_composer.model.losses.STATS`, those that the objective has.

    Returns:
        The metrics of :data:`~electra_composer.model.losses.RATIOS` that follow from them. For ELECTRA `mlm_loss`,
        `mlm_accuracy`, `sampled_accuracy` (per masked position), `rtd_loss`, `rtd_accuracy`, `replaced_share` (per
        token), `rtd_precision`, `rtd_recall` (of the class "replaced"). 0 / 0 is 0, such as precision if nothing was
        predicted as replaced.
    """
    sums = {name: float(value) for name, value in with_derived(stats).items()}
    return {
        name: _ratio(sums[numerator], sum(sums[term] for term in terms))
        for name, (numerator, terms) in ratios_of(stats).items()
    }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


class TrainMetrics(IntervalCallback):
    """Logs pretraining metrics over the batches since the last log, summed over ranks.

    Adds `outputs["stats"]` (0-d tensors of one dtype, the same names in every batch) of every microbatch on the device
    with two small kernels, and waits for the device only to log. Sums are fp64, in which counts stay exact for any
    number of tokens. Logs `metrics/train/…` with the names of :func:`pretraining_metrics`, and `data/fill`, the
    fraction of positions in the batch that are not padding.

    Args:
        log_interval: a Composer time such as `10ba`; the end of training also logs.
        names: of the sums, in the order of :data:`~electra_composer.model.losses.STATS`; by default those of the first
            batch.
    """

    def __init__(self, log_interval: str = "10ba", names: Sequence[str] = ()) -> None:
        super().__init__(log_interval)
        self.batch_sums: list[torch.Tensor] = []  # one vector per microbatch
        self.batch_places = 0
        self.names = tuple(names)
        self.sums: torch.Tensor | None = None
        self.places = 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self.batch_sums, self.batch_places = [], 0  # also when a batch restarts after running out of memory

    def after_loss(self, state: State, logger: Logger) -> None:
        stats = state.outputs["stats"]
        # Copied, because the outputs of a compiled forward may be overwritten by its next call.
        self.names = self.names or in_order(stats)
        self.batch_sums.append(torch.stack([stats[name] for name in self.names]))
        self.batch_places += state.batch["input_ids"].numel()

    def after_recording(self) -> Callable[[], None]:
        """See :class:`~electra_composer.training.step_graph.RecordedCallback`."""
        batch_sums, batch_places = self.batch_sums, self.batch_places

        def show() -> None:
            self.batch_sums, self.batch_places = batch_sums, batch_places

        return show

    def batch_end(self, state: State, logger: Logger) -> None:
        for sums in self.batch_sums:
            if self.sums is None:
                self.sums = torch.zeros_like(sums, dtype=torch.float64)
            self.sums = self.sums.to(sums.device) + sums  # sums from a checkpoint are on the CPU
        self.places += self.batch_places
        self.batch_sums, self.batch_places = [], 0
        super().batch_end(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END):
            self.log(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of each rank since the last log."""
        mine = None if self.sums is None else [*self.sums.tolist(), self.places]
        # Workaround (torch 2.7): a sharded checkpoint is loaded by the names of its nested values, which must not
        # differ between runs, so this is one JSON string; goes when torch.distributed.checkpoint loads changed keys.
        return {"sums": json.dumps(dist.all_gather_object(mine))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ranks = [sums for sums in json.loads(state["sums"]) if sums is not None]
        if not ranks:
            return
        if len(ranks) == dist.get_world_size():
            mine = ranks[dist.get_global_rank()]
        else:  # another number of ranks: rank 0 gets the total, the others zeros
            mine = [sum(values) * (dist.get_global_rank() == 0) for values in zip(*ranks, strict=True)]
        *sums, self.places = mine
        self.sums = torch.tensor(sums, dtype=torch.float64)

    def log(self, state: State, logger: Logger) -> None:
        if self.sums is None:
            return
        vector = torch.cat([self.sums, self.sums.new_tensor([self.places])])
        dist.all_reduce(vector, reduce_operation="SUM")
        *sums, places = vector.tolist()
        self.sums, self.places = None, 0
        named = dict(zip(self.names, sums, strict=True))
        metrics = pretraining_metrics(named)
        logger.log_metrics({f"metrics/train/{name}": value for name, value in metrics.items()})
        logger.log_metrics({"data/fill": _ratio(named["tokens"], places)})


EVALUATION = 1  # last element of the seed sequence of an evaluation; batches have none


class BatchSeed(Callback):
    """Seeds the generators for every batch from the run's seed, the rank and the batch number.

    Masks, samples and dropout of a batch then depend on nothing else: a resumed run continues bit for bit, and
    evaluation does not change training. Evaluations are seeded alike, so a repeated evaluation gives the same result.
    Without it they depend on every earlier draw from torch's generator, and each evaluation draws (the iterator of a
    `DataLoader` takes a seed).

    Args:
        seed: seed of the run.
    """

    # Workaround (composer 0.32): Trainer restores the generators of a checkpoint only at the start of an epoch, or for
    # a data set that cannot resume by itself, not for a Streaming data set in mid-epoch; goes when it does and when
    # training need not be independent of evaluations.

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        self._set(state, [self.seed, dist.get_global_rank(), state.timestamp.batch.value])

    def eval_start(self, state: State, logger: Logger) -> None:
        self._set(state, [self.seed, dist.get_global_rank(), state.timestamp.batch.value, EVALUATION])

    def _set(self, state: State, numbers: list[int]) -> None:
        seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
        # Workaround (torch 2.7): `torch.manual_seed` records a stack trace for every device type that is not in use,
        # which takes up to 1 ms, so only the CPU and this rank's GPU are seeded; goes when it does not.
        torch.default_generator.manual_seed(seed)
        if state.device.name == "gpu":
            torch.cuda.manual_seed(seed)


class RunRecord(Callback):
    """Records the configuration and the tokenizer in the run's folder and in its checkpoints.

    At the start of training rank 0 prints the configuration and writes `config.yaml` and `tokenizer/` atomically. The
    loggers get the configuration as hyperparameters. Every checkpoint has the record under
    `["state"]["callbacks"]["RunRecord"]` (`config`, `tokenizer_files`), which export and finetuning need. A resumed run
    keeps its own record, not the checkpoint's.

    Args:
        config: the resolved configuration as plain dictionaries and lists.
        config_yaml: the same as YAML text.
        run_folder: the run's folder.
        tokenizer_files: file name → text; empty if there is no tokenizer.
        print_config: whether to print the YAML.
    """

    def __init__(
        self,
        config: dict[str, Any],
        config_yaml: str,
        run_folder: str,
        tokenizer_files: Mapping[str, str] | None = None,
        print_config: bool = True,
    ) -> None:
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
        write_file(os.path.join(self.run_folder, "config.yaml"), self.config_yaml)
        if self.tokenizer_files:
            with replaced_folder(os.path.join(self.run_folder, "tokenizer")) as folder:
                for name, text in self.tokenizer_files.items():
                    Path(folder, name).write_text(text, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer_files": self.tokenizer_files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # a resumed run keeps its own record
