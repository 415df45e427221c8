"""How a model is spread over processes: replicas (DDP), shards (FSDP2) or both (HSDP), and what goes with each.

Composer's `Trainer` does the spreading. Here its configuration is made from ours, and the two things are done that
must be done to the model before it is wrapped: recomputing activations, and compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.distributed.activation_checkpointing import apply_ac
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config

from electra_composer.checkpoints.safe_loading import SafeLoadPlanner
from electra_composer.config import FSDPConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import Layer


class RunFSDP2Config(FSDP2Config):
    """Composer's configuration of FSDP2, which can also say how many replicas there are of the shards.

    Composer 0.32 makes FSDP2's device mesh itself, whatever mesh it is given, from two properties that FSDP1 has and
    that are constants of FSDP2's configuration. With the first of them set, the mesh has two dimensions, and
    `fully_shard` shards over the second and averages over the first.
    """

    replicas: int = 1  # no field of the dataclass: Composer knows nothing of it

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas if self.replicas > 1 else None

    @property
    def load_planner(self) -> SafeLoadPlanner:
        return SafeLoadPlanner()


def fsdp_config(config: FSDPConfig | None, device: str) -> RunFSDP2Config | None:
    """Composer's form of `trainer.fsdp`; None: DDP. Call it when the processes have joined.

    Args:
        config: `trainer.fsdp`.
        device: `cpu` or `gpu`.

    Raises:
        UserError: replicas that the processes cannot be divided into, or on a CPU.
    """
    if config is None:
        return None
    settings = dict(vars(config))
    replicas, processes = settings.pop("data_parallel_replicate_degree"), dist.get_world_size()
    if replicas < 1 or processes % replicas:
        raise UserError(
            f"trainer.fsdp.data_parallel_replicate_degree is {replicas}, and there are {processes} processes; expected "
            f"a divisor of {processes}: each replica is sharded over {processes} / replicas processes"
        )
    if replicas > 1 and device == "cpu":
        # gloo cannot average, and FSDP2 waits for an event that only streams of a device have (torch 2.7).
        raise UserError(
            f"trainer.fsdp.data_parallel_replicate_degree is {replicas}, and PyTorch's FSDP2 cannot add up the "
            "gradients of replicas on a CPU; set it to 1 there (shards over all processes), or trainer.fsdp=null"
        )
    made = RunFSDP2Config(**settings)
    made.replicas = replicas
    return made


def recompute_activations(model: ComposerModel) -> None:
    """Keep of each Transformer layer its input alone, and run the layer again in the backward pass.

    Memory for some 30% more computation (Chen et al. 2016, arXiv 1604.06174). The random numbers of the second run are
    those of the first. Composer does the same under FSDP alone; this is its function, for DDP and one process too.
    """
    apply_ac(model, True, False, lambda module: isinstance(module, Layer))


def compile_config(trainer: TrainerConfig, static_shapes: bool) -> dict[str, Any] | None:
    """Arguments of `torch.compile`; one graph or an error, never a slow remainder."""
    if not trainer.compile:
        return None
    mode = {"mode": trainer.compile} if isinstance(trainer.compile, str) else {}
    return {"fullgraph": True, "dynamic": not static_shapes, **mode}


def compile_model(model: ComposerModel, trainer: TrainerConfig, static_shapes: bool) -> None:
    """Compile what can be one graph, if `trainer.compile` says so; before the trainer wraps the model.

    Composer compiles the wrapped model. One graph then has to hold what DDP and FSDP do between the operators too,
    which it cannot (torch 2.7). So the whole forward is compiled inside of DDP, where the compiler still splits it at
    DDP's buckets, to send gradients while others are computed; and under FSDP each Transformer layer, the unit that is
    gathered before it runs and let go afterwards. The rest (embeddings, heads, losses) runs uncompiled there.

    Args:
        model: the model, not wrapped; its `forward`, or its layers', is replaced.
        trainer: its `compile` and `fsdp`.
        static_shapes: whether all batches of a loader have one length.
    """
    arguments = compile_config(trainer, static_shapes)
    if arguments is None:
        return
    # All layers are one function: two widths, in training and evaluation, with a smaller last batch each, are the eight
    # variants that torch allows before it takes it for a mistake.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    parts = [module for module in model.modules() if isinstance(module, Layer)] if trainer.fsdp is not None else [model]
    for part in parts:
        part.forward = torch.compile(part.forward, **arguments)  # type: ignore[method-assign]
