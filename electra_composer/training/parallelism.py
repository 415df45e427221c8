"""Distribution of a model over ranks: DDP, FSDP2 or HSDP, and activation checkpointing.

Composer's `Trainer` wraps the model. This module creates its configuration from ours, and applies activation
checkpointing, which must precede the wrapping.
"""

from __future__ import annotations

import warnings

import torch
from composer.distributed.activation_checkpointing import apply_ac
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from electra_composer.checkpoints.safe_loading import SafeLoadPlanner
from electra_composer.config import FSDPConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import Layer
from electra_composer.model.flat_parameters import FlatParameters
from electra_composer.training.optim import AdamW


class RunFSDP2Config(FSDP2Config):
    """FSDP2Config with hybrid sharding (HSDP) and a load planner."""

    # Workaround (composer 0.32): State creates its own device mesh and ignores `device_mesh`; the number of replicas
    # and the load planner are read from properties that are constants in FSDP2Config and fields in FSDPConfig. With
    # replicas the mesh has two dimensions: `fully_shard` shards over the second and averages over the first. Goes when
    # they are fields of FSDP2Config.

    replicas: int = 1  # a class attribute: this subclass is not a dataclass, so FSDP2Config's fields stay as they are

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas if self.replicas > 1 else None

    @property
    def load_planner(self) -> SafeLoadPlanner:
        return SafeLoadPlanner()


def fsdp_config(config: FSDPConfig | None, device: str) -> RunFSDP2Config | None:
    """Convert `trainer.fsdp` to Composer's form; None: DDP. Call after the process group is initialised.

    Args:
        config: `trainer.fsdp`.
        device: `cpu` or `gpu`.

    Raises:
        UserError: a number of replicas that does not divide the number of ranks, or replicas on a CPU.
    """
    if config is None:
        return None
    settings = {**vars(config), "activation_checkpointing": False, "activation_cpu_offload": False}  # wrap_activations
    replicas, ranks = settings.pop("data_parallel_replicate_degree"), dist.get_world_size()
    if ranks % replicas:
        raise UserError(
            f"trainer.fsdp.data_parallel_replicate_degree is {replicas}, and there are {ranks} ranks; expected "
            f"a divisor of {ranks}: each replica is sharded over {ranks} / replicas ranks"
        )
    if replicas > 1 and device == "cpu":
        # Workaround (torch 2.7): gloo has no average, and FSDP2 waits for an event of a device stream, so HSDP does not
        # run on CPUs; goes when it does.
        raise UserError(
            f"trainer.fsdp.data_parallel_replicate_degree is {replicas}, and PyTorch's FSDP2 cannot reduce the "
            "gradients of replicas on a CPU; set it to 1 (shards over all ranks), or trainer.fsdp=null"
        )
    # Workaround (composer 0.32): its settings of FSDP2 warn that they are experimental; goes when they do not.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        composer_config = RunFSDP2Config(**settings)
    composer_config.replicas = replicas
    return composer_config


def wrap_activations(model: ComposerModel, trainer: TrainerConfig) -> None:
    """Apply activation checkpointing and offloading to each Transformer layer, if the configuration asks for them.

    Checkpointing keeps only the input of a layer and recomputes it in the backward. Saves memory for about 30% more
    computation (Chen et al. 2016, arXiv 1604.06174). The recomputation draws the same random numbers.
    """
    # Workaround (composer 0.32): Trainer applies this function under FSDP only, and after sharding, when layers are
    # sharded inside of their wrappers (see `ElectraPretraining`); goes when it does so under DDP too, and before.
    fsdp = trainer.fsdp
    recompute = trainer.activation_checkpointing or (fsdp is not None and fsdp.activation_checkpointing)
    offload = fsdp is not None and fsdp.activation_cpu_offload
    if recompute or offload:
        apply_ac(model, recompute, offload, lambda module: isinstance(module, Layer))


def can_be_flat(trainer: TrainerConfig, sharded: bool) -> bool:
    """Return whether parameters are stored in flat buffers (see model/flat_parameters.py).

    Not under FSDP, which has flat shards of its own. On several ranks not with fp16 or automatic microbatches either:
    Composer's step for these relies on DDP to average gradients.
    """
    if sharded:
        return False
    needs_ddp = trainer.precision == "amp_fp16" or trainer.device_train_microbatch_size == "auto"
    return dist.get_world_size() == 1 or not needs_ddp


PRODUCT_DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def use_flat_parameters(model: ComposerModel, optimizer: AdamW, precision: str) -> FlatParameters:
    """Store the trainable parameters of `model` in flat buffers, which `optimizer` updates. All ranks get rank 0's.

    Args:
        model: on its device, not compiled yet; its `forward` is replaced.
        optimizer: over parameters of `model`, before its first step.
        precision: `trainer.precision`.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    flat = FlatParameters(model, groups, PRODUCT_DTYPES.get(precision))
    if dist.get_world_size() > 1:
        for leaf in flat.flats:
            dist.broadcast(leaf.detach(), src=0)
    flat.attach(model)
    optimizer.use_flat(flat)
    return flat
