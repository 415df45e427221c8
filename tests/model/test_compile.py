"""`torch.compile`: the complete forward is one graph with unchanged results.

Most tests stop after autograd's tracing (`aot_eager`), which detects graph breaks and operators without shapes. The
code generator is tested once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from electra_composer.config import ObjectiveConfig, OptimizerConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training import compilation
from electra_composer.training.builders import build_optimizer
from electra_composer.training.parallelism import use_flat_parameters

Make = Callable[..., Any]
ROWS = [[(10, 12), (5, 0)], [(20, 0)], [(16, 16)], [(5, 3), (4, 4), (3, 0)]]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def losses_and_gradients(model: ElectraPretraining, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    outputs = model(batch)
    model.loss(outputs, batch)["total"].backward()
    losses = torch.stack([outputs["mlm_loss"], outputs["rtd_loss"]]).detach()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def compile_as_composer_does(model: ElectraPretraining, backend: str) -> None:
    arguments = compilation.compile_config(TrainerConfig(compile=True), static_shapes=True)
    assert arguments is not None
    assert arguments["fullgraph"]
    model.forward = torch.compile(model.forward, backend=backend, **arguments)  # type: ignore[method-assign]


@pytest.mark.parametrize("cpu_autocast", [False, True])
@pytest.mark.parametrize("sharing", ["tied", "untied", "gdes"])
def test_one_graph_with_the_same_losses_and_gradients(
    make_model: Make,
    make_batch: Make,
    tiny_model_config: Make,
    sharing: str,
    cpu_autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Compiled attention in bf16 is torch's, which rounds differently from _WrittenAttention.
    monkeypatch.setattr("electra_composer.model.kernels.attention._is_short_bf16", lambda qkv: False)
    model = ElectraPretraining(make_model(tiny_model_config(num_layers=1, sharing=sharing)), cpu_autocast)
    batch = make_batch(ROWS)
    batch["noise"] = model.model.draw_noise(batch["input_ids"])
    batch = model.count_batch(batch)
    expected = losses_and_gradients(model, batch)
    compile_as_composer_does(model, "aot_eager")
    torch.testing.assert_close(losses_and_gradients(model, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(sampling="gumbel"),
        ObjectiveConfig(mask_style="bert", temperature=2.0, disallow_correct=True),
        ObjectiveConfig(mlm_label_smoothing=0.1, rtd_label_smoothing=0.1),
        ObjectiveConfig(mask_draw="with_replacement"),
        ObjectiveConfig(mask_draw="bernoulli"),
    ],
)
def test_every_switch_is_one_graph(
    make_model: Make, make_batch: Make, tiny_model_config: Make, objective: ObjectiveConfig
) -> None:
    """In training, with dropout and noise drawn inside the graph."""
    model = ElectraPretraining(
        make_model(tiny_model_config(num_layers=1, dropout=0.1, attention_dropout=0.1), objective)
    )
    batch = model.count_batch(make_batch(ROWS))
    compile_as_composer_does(model, "aot_eager")
    losses, gradients = losses_and_gradients(model, batch)
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_batches_of_one_shape_are_one_compilation(make_model: Make, make_batch: Make, tiny_model_config: Make) -> None:
    """A batch with other examples in its rows does not recompile."""
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    model = ElectraPretraining(make_model(tiny_model_config(num_layers=1)))
    forward = torch.compile(model.forward, backend=count, fullgraph=True, dynamic=False)
    for rows in (ROWS, ROWS[::-1], [[(2, 0)], [], [(32, 0)], [(4, 4)] * 4]):
        forward(model.count_batch(make_batch(rows)))
    assert len(compiled) == 1


@pytest.mark.long
def test_the_code_generator_takes_it(
    make_model: Make, make_batch: Make, tiny_model_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flat parameters. A second start finds the code in the cache; so does another process (docs/log.md).

    Autograd's part is traced again: torch 2.7 caches none of a graph with a `torch.autograd.Function` in it, as the
    flat parameters have one.
    """
    try:
        compilation.check_compile(TrainerConfig(compile=True, precision="fp32", device="cpu"))
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def build() -> ElectraPretraining:
        torch.manual_seed(0)
        model = ElectraPretraining(make_model(tiny_model_config(num_layers=1)))
        use_flat_parameters(model, build_optimizer(OptimizerConfig(lr=1e-3), model), "fp32")
        return model

    model, batch = build(), make_batch(ROWS)
    batch["noise"] = model.model.draw_noise(batch["input_ids"])
    batch = model.count_batch(batch)
    expected = losses_and_gradients(model, batch)
    for misses in (2, 0):  # of forward and backward
        torch.compiler.reset()
        counters.clear()
        model = build()
        compile_as_composer_does(model, "inductor")
        torch.testing.assert_close(losses_and_gradients(model, batch), expected, rtol=1e-4, atol=1e-4)
        assert counters["inductor"]["fxgraph_cache_miss"] == misses
    assert counters["inductor"]["fxgraph_cache_hit"] == 2


def test_a_cpu_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise exc.InvalidCxxCompiler()

    # Workaround (torch 2.7): the search for a C++ compiler is private; goes when a public call reports a missing one.
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(UserError, match=r"lacks a C\+\+ compiler .*g\+\+.*; install it or set trainer\.compile=false"):
        compilation.check_compile(TrainerConfig(compile=True, precision="fp32", device="cpu"))


def test_a_failure_while_compiling_names_the_switch() -> None:
    """A backend that fails, as a code generator does without its compiler."""

    def fails(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        raise RuntimeError("no kernel of this kind")

    with (
        pytest.raises(UserError, match=r"trainer\.compile: torch\.compile failed: .*set trainer\.compile=false"),
        compilation.explain_compile_errors(),
    ):
        torch.compile(lambda x: x + 1, backend=fails)(torch.ones(2))
