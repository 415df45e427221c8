"""Rows and helpers shared by the tests of the joint forward."""

from __future__ import annotations

import torch

from electra_composer.model.electra import ElectraForPretraining

Batch = dict[str, torch.Tensor]
VOCAB_SIZE, LENGTH = 99, 32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

UNEVEN = [[(10, 12)], [(20, 0)], [(3, 29)], [(5, 0)]]  # two segments, padding, a full row, a short one


def noise_of(model: ElectraForPretraining, batch: Batch, seed: int = 3) -> torch.Tensor:
    return model.draw_noise(batch["input_ids"], torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> Batch:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
