"""Gradient of one batch on two ranks under DDP, each in two microbatches with Composer's weights; test_pretraining.py.

    composer -n 2 tests/gradient_of_ranks.py FOLDER

`FOLDER/inputs.pt` has a list of objectives, each with its sizes, weights and batch and, for each case, the number of
rows of the first rank. Gradients are written to `FOLDER/<objective>_<rows of the first rank>_<rank>.pt`.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from composer.utils import dist, get_device
from torch.nn.parallel import DistributedDataParallel

from electra_composer.model.objectives import build_pretraining_model
from electra_composer.model.pretraining import ElectraPretraining


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.initialize_dist(get_device("cpu"))
    rank = dist.get_global_rank()
    for number, inputs in enumerate(torch.load(f"{folder}/inputs.pt", weights_only=False)):
        for first_rows, found in gradients_of(inputs, rank).items():
            torch.save(found, f"{folder}/{number}_{first_rows}_{rank}.pt")


def gradients_of(inputs: dict[str, Any], rank: int) -> dict[int, dict[str, torch.Tensor]]:
    """Return the gradients of each case, by the rows of the first rank."""
    batch, found = inputs["batch"], {}
    model = ElectraPretraining(build_pretraining_model(*inputs["arguments"]))
    model.model.load_state_dict(inputs["weights"])
    wrapped = DistributedDataParallel(model)
    for first_rows in inputs["shares"]:
        model.zero_grad()
        mine = {name: t[:first_rows] if rank == 0 else t[first_rows:] for name, t in batch.items()}
        counted = model.count_batch(mine)
        halves = [{name: tensor[half::2] for name, tensor in counted.items()} for half in range(2)]
        for half, context in zip(halves, (wrapped.no_sync(), contextlib.nullcontext()), strict=True):
            with context:
                weight = len(half["input_ids"]) / (len(batch["input_ids"]) / 2)  # over the mean of the processes' rows
                (model.loss(wrapped(half), half)["total"] * weight).backward()
        found[first_rows] = gradients(model.model)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
