"""Pretraining runs in one process group, to be compared with runs on another number of ranks (test_equality.py).

Runs `pretrain.main` on real shards with two parts replaced. Masks and samples are drawn from the row number and the
batch number instead of the rank, so that they are the same however rows are distributed. With `torch.compile`, graphs
run as traced, without code generation. CUDA graphs have a stand-in (tape.py).

    composer -n 2 tests/equality.py OUT CONFIG.yaml 'ddp' 'fsdp trainer.fsdp={}' …

Each run is a name and overrides. A name such as `more@10` starts from a checkpoint after 10 batches; one that begins
with `lost` or `infinite` has a fault injected. `OUT/<name>` is the run's folder, with the loss and the row numbers of
every batch in `seen.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from tape import Tape
from torch.distributed.tensor import DTensor

from electra_composer import pretrain
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training import compilation, device_graph, startup, trainer


class LostUpdates(Callback):
    """Drops the updates of the last rank's shard of the token embeddings, as in pytorch#176076."""

    def _part(self, state: State) -> torch.Tensor:
        (table,) = (p for name, p in state.model.named_parameters() if name.endswith("embeddings.word.weight"))
        return (table.to_local() if isinstance(table, DTensor) else table).detach()

    def batch_start(self, state: State, logger: Logger) -> None:
        self.before = self._part(state).clone()

    def batch_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == dist.get_world_size() - 1:
            self._part(state).copy_(self.before)


class InfiniteLoss(Callback):
    """Makes the loss of the last rank infinite in the second batch, with a finite gradient."""

    def before_loss(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 1 and dist.get_global_rank() == dist.get_world_size() - 1:
            state.outputs["mlm_loss"] = state.outputs["mlm_loss"] + float("inf")


class Losses(Callback):
    """Records the loss of every batch over all ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(state.total_loss_dict["loss/train/total"])


class Noise:
    """`ElectraPretraining.count_batch` that also adds noise to every row of a batch, and records the row numbers."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.rows: list[list[int]] = []
        self.count_batch = ElectraPretraining.count_batch

    def __call__(self, model: ElectraPretraining, batch: dict[str, Any]) -> dict[str, Any]:
        noise = []
        for row, ids in zip(batch["rows"].tolist(), batch["input_ids"], strict=True):
            generator = torch.Generator().manual_seed(1000 * row + self.start + len(self.rows))
            noise.append(model.model.draw_noise(ids[None], generator))
        self.rows.append(sorted(row for part in dist.all_gather_object(batch["rows"].tolist()) for row in part))
        return self.count_batch(model, {**batch, "noise": torch.cat(noise)})


FAULTS = {"lost": LostUpdates(), "infinite": InfiniteLoss()}


def main(out: str, yaml: str, arrangements: list[str]) -> None:
    torch.set_num_threads(1)
    for arrangement in arrangements:
        name, *overrides = arrangement.split()
        folder = os.path.join(out, name)
        noise, losses = Noise(start=int(name.partition("@")[2] or 0)), Losses()
        callbacks = [losses, *(fault for word, fault in FAULTS.items() if name.startswith(word))]
        with contextlib.ExitStack() as patches:
            for place, attribute, replacement in (
                (compilation, "compile_config", traced(compilation.compile_config)),
                (startup, "check_compile", lambda trainer: None),  # no compiler is needed
                (trainer, "build_callbacks", lambda config: callbacks),  # noqa: B023
                (ElectraPretraining, "count_batch", lambda model, batch: noise(model, batch)),  # noqa: B023
            ):
                patches.enter_context(mock.patch.object(place, attribute, replacement))
            patches.enter_context(mock.patch.dict(device_graph.GRAPHS, {"cpu": Tape}))
            pretrain.main(load_config(yaml, [f"checkpoints.folder={folder}", *overrides], PretrainConfig))
        if dist.get_global_rank() == 0:
            seen = {"losses": losses.losses, "rows": noise.rows, "graphs": len(GRAPHS), "launches": Tape.launches}
            with open(os.path.join(folder, "seen.json"), "w", encoding="utf-8") as file:
                json.dump(seen, file)
        GRAPHS.clear()
        Tape.launches = 0
        torch.compiler.reset()


GRAPHS: list[Any] = []  # compiled graphs


def traced(compile_config: Callable[..., Any]) -> Callable[..., Any]:
    """Add a backend to the arguments of `torch.compile` that runs each graph as traced, and counts it."""

    def backend(graph: Any, inputs: Any) -> Any:
        GRAPHS.append(graph)
        return graph.forward

    def config(*arguments: Any) -> Any:
        original = compile_config(*arguments)
        return original and {**original, "backend": backend}

    return config


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
