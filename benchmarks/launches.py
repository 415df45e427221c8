"""Operators of one training step as a GPU would run them, counted without one; prints one JSON line.

    python benchmarks/launches.py [--size small] [--layer-kernels triton] [--skip-inductor] [key=value …]

Eager: forward, loss, backward, gradient norm, clipping, non-finite flag, AdamW and zeroing run on fake CPU tensors,
which have shapes and no data, under bf16 autocast. A dispatch mode counts every operator that reaches the device. What
the model does on CUDA alone is selected by :func:`as_on_cuda`: Triton kernels, one operator each for dropout and
attention, LayerNorm in fp32 as CUDA's autocast has it, and lists of tensors processed together. (Fake CUDA tensors
would need a driver: their backward asks for the device.) An operator computes unless it is a view, an allocation or
without elements. Operators of this project count as many as they launch kernels (`KERNELS`), except the masked-LM head,
which is one, as in `BEFORE`.

Inductor: kernels of the compiled forward and backward after fusion, matrix products and operators of this project
included, by its scheduler for Triton. Nothing is compiled to machine code.

`BEFORE` is commit 61ce48b, counted with LayerNorm in bf16, as the CPU's autocast has it: 1,451 computing operators in
forward and backward, for which this method finds 1,453 then. With LayerNorm as under CUDA's autocast it finds 1,601.
The exit status is 1 if there are more than half as many computing operators as before.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from composer.core import Precision
from cuda_paths import as_on_cuda, yes
from sizes import SIZES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from variants import AUTOCAST
from workload import read_config

from electra_composer.compilers import describe_operators_briefly
from electra_composer.config import PretrainConfig
from electra_composer.errors import report_user_errors
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.kernels.fused_layers import use_layer_kernels
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training.builders import build_optimizer
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.parallelism import use_flat_parameters

BEFORE = {
    "all": 3400,
    "computing": 1516,
    "casts": 420,
    "products": 303,
    "bias_sums": 101,
    "layer_norm": 102,
    "dropout": 100,
    "gelu": 52,
    "attention": 48,
}
"""Forward and backward together; the rest of `computing` is everything else."""

KERNELS = {"add_norm_backward": 2, "gelu_bias_backward": 2, "embed_backward": 5}
"""Kernels launched by operators of this project, where there is more than one."""

NOT_COMPUTING = {"_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"}

KINDS = {
    "casts": ("_to_copy",),
    "products": ("addmm", "mm", "bmm", "baddbmm"),
    "layer_norm": ("native_layer_norm", "add_norm", "embed"),
    "gelu": ("gelu", "gelu_bias"),
    "dropout": ("native_dropout",),
    "attention": ("_scaled_dot_product_efficient_attention", "attention_triton"),
    "masked_lm": ("masked_lm_triton",),
    "embedding": ("embedding", "embedding_dense"),
    "optimizer": ("_fused_adamw_", "_foreach_add_"),
}


class OperatorCount(TorchDispatchMode):
    """Count operators by phase of the step and name."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.all: collections.Counter[tuple[str, str]] = collections.Counter()
        self.computing: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace not in ("prim", "profiler"):
            name = func._schema.name.split("::")[1]
            self.all[self.phase, name] += 1
            if computes(func, name, result):
                self.computing[self.phase, name] += KERNELS.get(name, 1)
        return result


def computes(func: Any, name: str, result: Any) -> bool:
    """Return whether an operator runs a kernel."""
    returns = func._schema.returns
    is_view = returns and all(out.alias_info is not None and not out.alias_info.is_write for out in returns)
    is_empty = isinstance(result, Tensor) and result.numel() == 0
    return not (is_view or is_empty or name in NOT_COMPUTING)


def build(config: PretrainConfig, layer_kernels: str, attention: str) -> ElectraPretraining:
    """Build the model in training mode, with BERT's vocabulary size; its weights are never read."""
    special, length = SpecialIds(0, 1, 2, 3), config.data.max_seq_length
    with mock.patch.object(torch.nn.init, "trunc_normal_"):  # reads numbers back, which fake tensors have not
        electra = ElectraForPretraining(config.model, config.objective, 30522, special, length)
    electra.attention_path = attention
    use_layer_kernels(electra, layer_kernels)
    return ElectraPretraining(electra).train()


def make_batch(config: PretrainConfig) -> dict[str, Tensor]:
    rows, length = config.trainer.global_train_batch_size, config.data.max_seq_length
    names = ("input_ids", "token_type_ids", "position_ids", "sequence_ids")
    return {name: torch.ones(rows, length, dtype=torch.int64) for name in names} | {"loss_scale": torch.ones(rows, 2)}


def count_step(config: PretrainConfig, layer_kernels: str, attention: str) -> OperatorCount:
    """Count the operators of one eager step."""
    precision = config.trainer.precision
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True):
        model = build(config, layer_kernels, attention)
        optimizer = build_optimizer(config.optimizer, model)
        use_flat_parameters(model, optimizer, precision)
        guard = NumericalGuard("", config.trainer.gradient_clip)
        batch = make_batch(config)
        state: Any = SimpleNamespace(
            optimizers=[optimizer],
            precision=Precision(precision),
            batch=batch,
            timestamp=SimpleNamespace(batch=SimpleNamespace(value=0), epoch=SimpleNamespace(value=0)),
        )
        guard.batch_start(state, None)  # type: ignore[arg-type]
        with OperatorCount() as counted:
            with torch.autocast("cpu", AUTOCAST[precision]):
                state.loss = model.loss(model(batch), batch)
            guard.after_loss(state, None)  # type: ignore[arg-type]
            counted.phase = "backward"
            state.loss["total"].backward()
            counted.phase = "update"
            guard.after_train_batch(state, None)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
    return counted


def breakdown(counted: OperatorCount) -> dict[str, int]:
    """Sum the computing operators by kind; `bias_sums`: sums of the backward over rows."""
    kinds: collections.Counter[str] = collections.Counter()
    names = {name: kind for kind, members in KINDS.items() for name in members}
    for (phase, name), count in counted.computing.items():
        kind = names.get(name.removesuffix("_backward"), "other")
        if phase == "backward" and name == "sum":
            kind = "bias_sums"
        kinds[kind] += count
    return dict(kinds.most_common())


class _Counted(Exception):
    """Raised once the kernels of a graph are counted, before they are written."""


def count_inductor(config: PretrainConfig, layer_kernels: str, attention: str) -> dict[str, int]:
    """Count the kernels of the compiled forward and backward, in this order."""
    # Workaround (torch 2.7): the scheduler, the choice of Triton for CPU tensors and the function that compiles one
    # graph are private; goes when inductor reports the kernels of a graph.
    import torch._inductor.config
    from functorch.compile import make_boxed_func
    from torch._inductor import compile_fx, ir
    from torch._inductor.scheduler import NopKernelSchedulerNode, Scheduler

    describe_operators_briefly()
    counts: list[int] = []

    def count(scheduler: Scheduler) -> None:
        launched = [node for node in scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        names = [str(getattr(node.node, "op_overload", "")) for node in launched]
        kernels = [KERNELS.get(name.removeprefix("electra_composer.").removesuffix(".default"), 1) for name in names]
        counts.append(
            sum(n for n, node in zip(kernels, launched, strict=True) if not isinstance(node.node, ir.MultiOutput))
        )
        raise _Counted

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        before = len(counts)
        try:
            return compile_fx.compile_fx_inner(graph, inputs, **options)
        except Exception:
            if len(counts) == before:
                raise
        nodes = graph.graph.output_node().args[0]
        outputs = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in nodes]
        return make_boxed_func(lambda *inputs: [_like(output) for output in outputs])

    settings = {"cpu_backend": "triton", "force_disable_caches": True}
    with (
        as_on_cuda(),
        torch._inductor.config.patch(settings),
        mock.patch.object(Scheduler, "codegen", count),
        mock.patch.object(ir, "is_gpu", yes),  # copies into one gradient are one kernel
    ):
        model, batch = build(config, layer_kernels, attention), make_batch(config)
        use_flat_parameters(model, build_optimizer(config.optimizer, model), config.trainer.precision)

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            return compile_fx.compile_fx(graph, inputs, inner_compile=compile_graph)

        compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
        with torch.autocast("cpu", AUTOCAST[config.trainer.precision]):
            loss = model.loss(compiled(batch), batch)["total"]
        loss.backward()  # compiles the backward
    forward, backward = counts
    return {"forward": forward, "backward": backward, "all": forward + backward}


def _like(value: Any) -> Any:
    """Make a tensor with the shape of a fake one; its memory is never written."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def main(arguments: list[str] | None = None) -> None:
    """Count and print one JSON line; exit with status 1 if more than half of before is left."""
    parser = argparse.ArgumentParser(prog="benchmarks/launches.py", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=128, help="rows (%(default)s)")
    parser.add_argument("--layer-kernels", choices=("torch", "triton"), default="triton")
    parser.add_argument("--attention", default="triton", help="attention path (%(default)s)")
    parser.add_argument("--skip-inductor", action="store_true", help="count the eager step only")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    fixed = {"device": "cpu", "precision": "amp_bf16", "length": None, "seed": 0, "compile": "false"}
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(argparse.Namespace(**{**vars(options), **fixed}), Path(folder))
    counted = count_step(config, options.layer_kernels, options.attention)
    phases = ("forward", "backward", "update")
    result = {
        "benchmark": "launches",
        "size": options.size,
        "layer_kernels": options.layer_kernels,
        "attention": options.attention,
        "before": BEFORE,
        "all": counted.all.total(),
        "computing": counted.computing.total(),
        "fraction_of_before": round(counted.computing.total() / BEFORE["computing"], 3),
        "by_phase": {
            name: sum(count for (phase, _), count in counted.computing.items() if phase == name) for name in phases
        },
        "by_kind": breakdown(counted),
    }
    if not options.skip_inductor:
        result["inductor"] = count_inductor(config, options.layer_kernels, options.attention)
    print(json.dumps(result), flush=True)
    if counted.computing.total() > BEFORE["computing"] / 2:
        sys.exit(1)


if __name__ == "__main__":
    report_user_errors(main)()
