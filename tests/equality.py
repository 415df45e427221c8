"""Pretraining runs of one process group, one after another, that can be compared with those of another number of them.

The project's own path (`pretrain.main`, real shards), with two things replaced. Masks and samples come from noise that
follows from a row's number and the batch's, not from the process that has the row; so they are the same however the
rows are dealt out. And where `torch.compile` is on, its graphs are run as they are traced, without code generation.

    composer -n 2 tests/equality.py OUT CONFIG.yaml 'ddp' 'fsdp trainer.fsdp={}' …

Each run is a name and overrides; one such as `more@10` starts from a checkpoint after 10 batches, one whose name begins
with `lost` or `infinite` is spoilt.
`OUT/<name>` is its folder; `OUT/<name>/seen.json` holds the loss of every batch and the numbers of its rows.
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
from torch.distributed.tensor import DTensor

from electra_composer import pretrain
from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training import compilation, startup, trainer


class LostUpdates(Callback):
    """The last process keeps its part of the token embeddings as it was, as in pytorch#176076."""

    def _part(self, state: State) -> torch.Tensor:
        (table,) = (p for name, p in state.model.named_parameters() if name.endswith("embeddings.word.weight"))
        return (table.to_local() if isinstance(table, DTensor) else table).detach()

    def batch_start(self, state: State, logger: Logger) -> None:
        self.before = self._part(state).clone()

    def batch_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == dist.get_world_size() - 1:
            self._part(state).copy_(self.before)


class InfiniteLoss(Callback):
    """In its second batch, the loss of the last process is infinite, with a gradient that is not."""

    def before_loss(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 1 and dist.get_global_rank() == dist.get_world_size() - 1:
            state.outputs["mlm_loss"] = state.outputs["mlm_loss"] + float("inf")


class Losses(Callback):
    """Keeps the loss of every batch, that of all processes."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(state.total_loss_dict["loss/train/total"])


class Noise:
    """`ElectraPretraining.count_batch`, which also gives every row of a batch its noise, and records their numbers."""

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


SPOILERS = {"lost": LostUpdates(), "infinite": InfiniteLoss()}


def main(out: str, yaml: str, arrangements: list[str]) -> None:
    torch.set_num_threads(1)
    for arrangement in arrangements:
        name, *overrides = arrangement.split()
        folder = os.path.join(out, name)
        noise, losses = Noise(start=int(name.partition("@")[2] or 0)), Losses()
        callbacks = [losses, *(spoiler for word, spoiler in SPOILERS.items() if name.startswith(word))]
        with contextlib.ExitStack() as patches:
            for place, attribute, replacement in (
                (compilation, "compile_config", traced(compilation.compile_config)),
                (startup, "check_compile", lambda trainer: None),  # no compiler is needed
                (trainer, "build_callbacks", lambda config: callbacks),  # noqa: B023
                (ElectraPretraining, "count_batch", lambda model, batch: noise(model, batch)),  # noqa: B023
            ):
                patches.enter_context(mock.patch.object(place, attribute, replacement))
            pretrain.main(load_config(yaml, [f"checkpoints.folder={folder}", *overrides], PretrainConfig))
        if dist.get_global_rank() == 0:
            seen = {"losses": losses.losses, "rows": noise.rows, "graphs": len(GRAPHS)}
            with open(os.path.join(folder, "seen.json"), "w", encoding="utf-8") as file:
                json.dump(seen, file)
        GRAPHS.clear()
        torch._dynamo.reset()


GRAPHS: list[Any] = []  # that were compiled


def traced(compile_config: Callable[..., Any]) -> Callable[..., Any]:
    """Our arguments of `torch.compile`, with a backend that runs a graph as it is traced, and counts it."""

    def backend(graph: Any, inputs: Any) -> Any:
        GRAPHS.append(graph)
        return torch._dynamo.lookup_backend("eager")(graph, inputs)

    def config(*arguments: Any) -> Any:
        made = compile_config(*arguments)
        return made and {**made, "backend": backend}

    return config


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
