"""Compare the losses of our model and the reference on the same batch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import reference
import torch
from variants import Setup, to_device

from electra_composer.model import masking
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.pretraining import ElectraPretraining

TOLERANCE = {"fp32": 1e-4, "amp_bf16": 2e-2, "amp_fp16": 2e-2}


@dataclass
class Agreement:
    """Mean losses of one batch, without dropout, on the same masked tokens and samples."""

    ours: dict[str, float]
    reference: dict[str, float]
    tolerance: float

    @property
    def relative_difference(self) -> float:
        """Largest relative difference of any loss; NaN if a loss is NaN."""
        return max(
            abs(self.ours[name] - value) / abs(value) if value == value else value
            for name, value in self.reference.items()
        )

    def check(self) -> None:
        """Raise SystemExit, which ends a program with status 1, if the losses differ by more than the tolerance."""
        if not self.relative_difference <= self.tolerance:  # also true for NaN
            raise SystemExit(
                f"error: the losses do not agree to {self.tolerance}: ours {self.ours}, reference {self.reference}; "
                "step times are comparable only if they do"
            )


@torch.no_grad()
def magnify(model: ElectraForPretraining, factor: float = 4.0) -> None:
    """Scale the weight matrices as if after some training.

    A newly initialized discriminator gives every token the same logit, so its loss is ln 2 whatever it computes.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)


@torch.no_grad()
def compare_losses(
    setup: Setup, ours: ElectraPretraining, theirs: reference.ReferenceElectra, batch: dict[str, Any]
) -> Agreement:
    """Compute the losses of both on one packed batch, with our masked tokens and samples given to the reference."""
    ours.eval()
    theirs.eval()
    batch = to_device(ours.count_batch(batch), setup.device)
    model, input_ids = ours.model, batch["input_ids"]
    noise = model.draw_noise(input_ids, torch.Generator(setup.device).manual_seed(setup.config.seed))
    with contextlib.nullcontext() if setup.cpu_autocast else setup.autocast():
        outputs = ours({**batch, "noise": noise})
        losses = ours.loss(outputs, batch)
    positions, weights = outputs["masked_positions"], outputs["masked_weights"]
    originals = input_ids.gather(1, positions)
    _, replace_noise, random_noise, _ = masking.split_noise(noise, model.slots)
    masked = masking.mask_tokens(
        originals,
        weights,
        model.objective.mask_style,
        model.special_ids.mask,
        model.vocab_size,
        replace_noise,
        random_noise,
    )
    targets = torch.where(weights > 0, originals, reference.IGNORED)
    labels = torch.full_like(input_ids, reference.IGNORED).scatter(1, positions, targets)
    unpacking, pad = reference.Unpacking(batch), model.special_ids.pad
    with setup.autocast():
        expected = theirs(
            reference.unpack(batch, pad),
            masked_ids=unpacking(input_ids.scatter(1, positions, masked), pad),
            labels=unpacking(labels, reference.IGNORED),
            corrupted_ids=unpacking(outputs["corrupted_ids"], pad),
        )
    return Agreement(
        {name: losses[name].item() for name in ("mlm", "rtd")},
        {"mlm": expected.mlm.item(), "rtd": expected.rtd.item()},
        TOLERANCE[setup.config.trainer.precision],
    )
