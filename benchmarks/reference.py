"""Reference pretraining step: ELECTRA built from transformers' modules.

`ElectraForMaskedLM` and `ElectraForPreTraining` in a custom training loop, as in richarddwang/electra_pytorch: eager
attention, one example per row padded to the full length, generator logits and cross entropy at all positions, Gumbel
noise over the whole vocabulary at the masked ones. The recipe is the paper's (arXiv 2003.10555). The weights are copied
from our model by `weight_maps.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from electra_composer.config import OptimizerConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.weight_maps import (
    discriminator_to_transformers,
    generator_to_transformers,
    transformers_config,
)
from electra_composer.training.optim import parameter_groups

IGNORED = -100
"""Label of positions that the masked-LM loss ignores (transformers' convention)."""

KEPT = 0.15
"""Fraction of the masked positions that keep their token; the others become `[MASK]`."""

OPTIMIZER = "torch.optim.AdamW with its defaults (with bias correction; foreach on CUDA), torch's clip_grad_norm_"


class Losses(NamedTuple):
    """Losses of one forward pass, fp32 scalars."""

    mlm: Tensor  # mean over the masked tokens
    rtd: Tensor  # mean over the tokens other than padding
    total: Tensor


class ReferenceElectra(nn.Module):
    """Generator and discriminator of transformers with tied embeddings and the joint objective.

    Args:
        model: our model; sizes, weights and device are copied from it. Its objective must be the paper's.

    Raises:
        ValueError: the reference does not implement the model's objective.
    """

    def __init__(self, model: ElectraForPretraining):
        super().__init__()
        objective = model.objective
        if (objective.mask_style, objective.temperature, objective.disallow_correct) != ("electra", 1.0, False):
            raise ValueError("the reference only masks 85/15 and samples at temperature 1; keep the defaults")
        if objective.mask_draw != "exact":
            raise ValueError("the reference has no repeated positions and no other draws; keep the defaults")
        if objective.mlm_label_smoothing or objective.rtd_label_smoothing or model.generator_embeddings is not None:
            raise ValueError("the reference has model.sharing=tied and no label smoothing; keep the defaults")
        self.objective = objective
        self.special_ids = model.special_ids
        sizes = model.encoder_of_generator.config, model.discriminator.config
        configs = [transformers_config(size, self.special_ids.pad) for size in sizes]
        self.generator = AutoModelForMaskedLM.from_config(configs[0], attn_implementation="eager")
        self.discriminator = AutoModelForPreTraining.from_config(configs[1], attn_implementation="eager")
        state = model.state_dict()
        self.generator.load_state_dict(generator_to_transformers(state, sizes[0]))
        self.discriminator.load_state_dict(discriminator_to_transformers(state, sizes[1]))
        # One module of token, position and token-type embeddings and LayerNorm, as in richarddwang/electra_pytorch.
        self.discriminator.electra.embeddings = self.generator.electra.embeddings
        self.generator.generator_lm_head.weight = self.generator.electra.embeddings.word_embeddings.weight
        device = model.embeddings.word.weight.device
        self.to(device)
        self.gumbel = torch.distributions.Gumbel(torch.zeros((), device=device), torch.ones((), device=device))

    def mask(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mask tokens other than special ones with probability `mask_prob`; 85% become `[MASK]`, 15% keep their token.

        Args:
            input_ids, attention_mask: integers `[rows, length]`.

        Returns:
            The generator's input, `[rows, length]`, and its labels: the original token, or -100 where not masked.
        """
        special = self.special_ids
        allowed = attention_mask.bool()
        for special_id in (special.cls, special.sep, special.mask):
            allowed = allowed & (input_ids != special_id)
        uniform = torch.rand(2, *input_ids.shape, device=input_ids.device)
        masked = allowed & (uniform[0] < self.objective.mask_prob)
        labels = torch.where(masked, input_ids, IGNORED)
        return torch.where(masked & (uniform[1] >= KEPT), special.mask, input_ids), labels

    def sample(self, logits: Tensor) -> Tensor:
        """Draw one id per row from `softmax(logits)` by Gumbel-max: `[masked, vocabulary]` → `[masked]`."""
        return (logits.float() + self.gumbel.sample(logits.shape)).argmax(dim=-1)

    def forward(
        self,
        batch: dict[str, Tensor],
        masked_ids: Tensor | None = None,
        labels: Tensor | None = None,
        corrupted_ids: Tensor | None = None,
    ) -> Losses:
        """Compute the losses of one step.

        Args:
            batch: `input_ids`, `token_type_ids`, `attention_mask`, integers `[rows, length]`, one example per row.
            masked_ids, labels, corrupted_ids: integers `[rows, length]` drawn by another model, to compare losses with
                it; drawn here by default.
        """
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        shared = {"attention_mask": attention_mask, "token_type_ids": batch["token_type_ids"]}
        if masked_ids is None or labels is None:
            masked_ids, labels = self.mask(input_ids, attention_mask)
        generated = self.generator(input_ids=masked_ids, labels=labels, **shared)
        if corrupted_ids is None:
            is_masked = labels != IGNORED
            with torch.no_grad():
                corrupted_ids = input_ids.clone()
                corrupted_ids[is_masked] = self.sample(generated.logits[is_masked])
        replaced = (corrupted_ids != input_ids).long()
        discriminated = self.discriminator(input_ids=corrupted_ids, labels=replaced, **shared)
        mlm, rtd = generated.loss.float(), discriminated.loss.float()
        return Losses(mlm, rtd, self.objective.gen_weight * mlm + self.objective.disc_weight * rtd)


class Unpacking:
    """Map packed examples to one row each, padded to the length of the packed rows.

    Args:
        batch: packed batch, `[rows, length]`; `position_ids` restart at every example.
    """

    def __init__(self, batch: dict[str, Tensor]):
        sequence_ids, self.length = batch["sequence_ids"], batch["sequence_ids"].shape[1]
        self.is_token = sequence_ids > 0
        rows = torch.arange(len(sequence_ids), device=sequence_ids.device)[:, None]
        keys = (rows * (self.length + 1) + sequence_ids)[self.is_token]  # one for each example, in ascending order
        examples, self.example = torch.unique_consecutive(keys, return_inverse=True)
        self.rows = len(examples)
        self.place = batch["position_ids"][self.is_token]

    def __call__(self, values: Tensor, fill: int) -> Tensor:
        """Unpack values of the batch: `[rows, length]` → `[examples, length]`, with `fill` as padding."""
        unpacked = values.new_full((self.rows, self.length), fill)
        unpacked[self.example, self.place] = values[self.is_token]
        return unpacked


def unpack(batch: dict[str, Tensor], pad_id: int) -> dict[str, Tensor]:
    """Convert a packed batch to transformers' inputs: the same examples, one per row, with `attention_mask`."""
    unpacking = Unpacking(batch)
    return {
        "input_ids": unpacking(batch["input_ids"], pad_id),
        "token_type_ids": unpacking(batch["token_type_ids"], 0),
        "attention_mask": unpacking(torch.ones_like(batch["input_ids"]), 0),
    }


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.AdamW:
    """Build torch's AdamW (:data:`OPTIMIZER`) with the recipe's hyperparameters and parameter groups."""
    named = [(name.replace("LayerNorm", "norm"), parameter) for name, parameter in model.named_parameters()]
    groups = parameter_groups(named, config.weight_decay, config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps)


def flops(model: ReferenceElectra, rows: int, length: int) -> int:
    """Count the floating-point operations of one reference step on `rows` rows of `length` tokens, padding included.

    A multiply-add counts as two, the backward pass as twice the forward; only matrix products and attention count, as
    in `ElectraPretraining.flops_per_batch`. Unlike there, padding and the vocabulary at all positions count, because
    the reference computes them.
    """
    tokens = rows * length
    total = 0
    for config in (model.generator.config, model.discriminator.config):
        width, depth = config.hidden_size, config.num_hidden_layers
        weights = depth * (4 * width * width + 2 * width * config.intermediate_size)
        if config.embedding_size != width:
            weights += config.embedding_size * width
        total += 6 * tokens * weights
        total += 3 * depth * 2 * (2 * tokens * length * width)  # scores, and values weighted by them
    generator, discriminator = model.generator.config, model.discriminator.config
    mlm_weights = generator.embedding_size * (generator.hidden_size + generator.vocab_size)
    rtd_weights = discriminator.hidden_size * (discriminator.hidden_size + 1)
    return total + 6 * tokens * (mlm_weights + rtd_weights)
