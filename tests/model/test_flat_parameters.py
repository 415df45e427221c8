"""Flat parameters: the same gradients, names, shapes and updates as without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from electra_inputs import UNEVEN, gradients, noise_of
from torch._dynamo.backends.debugging import aot_eager

from electra_composer.config import ModelConfig
from electra_composer.model.electra import ElectraForPretraining
from electra_composer.model.encoder import Layer
from electra_composer.model.flat_parameters import ALIGNMENT, FlatParameters
from electra_composer.training.optim import AdamW, leaves, parameter_groups

Make = Callable[..., Any]
BF16 = torch.bfloat16

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"sharing": "untied"},
    "gdes": {"sharing": "gdes"},
    "one encoder": {"tie_encoder": True, "generator_size": 1.0, "num_heads": 1},
}


def backward(model: ElectraForPretraining, batch: dict[str, torch.Tensor], bf16: bool = False) -> None:
    with torch.autocast("cpu", BF16, enabled=bf16):
        outputs = model(**batch, noise=noise_of(model, batch))
    (outputs["mlm_loss"] + 50 * outputs["rtd_loss"]).backward()


def flatten(model: torch.nn.Module, **options: Any) -> FlatParameters:
    """Two groups, with and without weight decay."""
    groups = [group["params"] for group in parameter_groups(model.named_parameters(), 0.01, 1e-3)]
    flat = FlatParameters(model, groups, **options)
    flat.attach(model)
    return flat


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_names_and_shapes_are_the_same(
    name: str, bf16: bool, make_model: Make, make_batch: Make, tiny_model_config: Callable[..., ModelConfig]
) -> None:
    batch = make_batch(UNEVEN)
    plain = make_model(tiny_model_config(dropout=0.0, attention_dropout=0.0, **MODELS[name]))
    model = copy.deepcopy(plain)
    flat = flatten(model, product_dtype=BF16 if bf16 else None)
    for _ in range(2):  # the second accumulates
        backward(plain, batch, bf16)
        backward(model, batch, bf16)
    expected, found = gradients(plain), gradients(model)
    assert list(found) == list(expected)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0.02 if bf16 else 1e-5, atol=2e-2 if bf16 else 1e-5)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert len(flat.flats) == (4 if bf16 else 2)
    flat.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_are_views_and_remain_parameters(make_model: Make, make_batch: Make) -> None:
    """Loading a state dict reaches the buffers, in which every parameter begins at an aligned place."""
    model, other, batch = make_model().eval(), make_model(seed=1).eval(), make_batch(UNEVEN)
    flat = flatten(model)
    model.load_state_dict(other.state_dict())
    found, expected = (one(**batch, noise=noise_of(one, batch)) for one in (model, other))
    assert torch.equal(found["rtd_logits"], expected["rtd_logits"])
    assert found["mlm_loss"].requires_grad
    for buffers in flat.buffers:
        for buffer in buffers:
            for parameter in buffer.parameters:
                assert isinstance(parameter, torch.nn.Parameter)
                assert (parameter.data_ptr() - buffer.flat.data_ptr()) % (4 * ALIGNMENT) == 0


def test_frozen_parameters_stay_out(make_model: Make, make_batch: Make) -> None:
    model = make_model()
    model.embeddings.requires_grad_(False)
    frozen = {id(parameter) for parameter in model.embeddings.parameters()}
    flat = flatten(model)
    inside = {id(parameter) for buffers in flat.buffers for buffer in buffers for parameter in buffer.parameters}
    assert not inside & frozen
    backward(model, make_batch(UNEVEN))
    assert all(parameter.grad is None for parameter in model.embeddings.parameters())
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in flat.flats)


def test_the_modules_get_their_parameters_back_after_an_error(make_model: Make) -> None:
    model = make_model()
    flatten(model)
    parameters = dict(model.named_parameters())
    with pytest.raises(TypeError):
        model(nothing=1)
    assert all(left is right for left, right in zip(model.parameters(), parameters.values(), strict=True))


def test_recomputed_activations_give_the_same_gradients(
    make_model: Make, make_batch: Make, tiny_model_config: Callable[..., ModelConfig]
) -> None:
    """The backward recomputes layers after the forward has taken its views away."""
    from composer.distributed.activation_checkpointing import apply_ac

    plain = make_model(tiny_model_config(dropout=0.0, attention_dropout=0.0))
    model = copy.deepcopy(plain)
    flatten(model, product_dtype=BF16)
    apply_ac(model, True, False, lambda module: isinstance(module, Layer))
    batch = make_batch(UNEVEN)
    backward(plain, batch, bf16=True)
    backward(model, batch, bf16=True)
    for found, expected in zip(gradients(model).values(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=2e-2)


class OneMemory(torch.autograd.Function):
    """Identity whose backward always returns the same memory, as a CUDA graph that is replayed does."""

    @staticmethod
    def forward(ctx: Any, flat: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        ctx.memory = memory
        return flat.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.memory.copy_(gradient).detach(), None


@pytest.mark.slow
def test_compiled_gradients_are_the_same(
    make_model: Make, make_batch: Make, tiny_model_config: Callable[..., ModelConfig]
) -> None:
    """Compiled, one operator concatenates them in the backward; also when they accumulate."""
    batch = make_batch(UNEVEN)
    model = make_model(tiny_model_config(dropout=0.0, attention_dropout=0.0))
    twin = copy.deepcopy(model)
    for one in (model, twin):
        flatten(one)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    twin.forward = torch.compile(twin.forward, fullgraph=True, dynamic=False, backend=count)
    for _ in range(2):
        backward(model, batch)
        backward(twin, batch)
    assert len(graphs) == 1
    expected = gradients(model)
    for key, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copies", [False, True])
def test_gradients_of_microbatches_in_cuda_graphs(copies: bool) -> None:
    """Two microbatches with gradients 1 and 2 in one memory: their sum is 3 only if the first one was copied."""
    parameter = torch.nn.Parameter(torch.zeros(ALIGNMENT))
    module = torch.nn.Module()
    module.register_parameter("weight", parameter)
    flat = FlatParameters(module, [[parameter]])
    if copies:
        flat.use_in_cuda_graphs()
    (leaf,) = flat.flats
    memory = torch.zeros_like(leaf, requires_grad=False)
    for factor in (1.0, 2.0):
        (OneMemory.apply(leaf, memory) * factor).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.unique().tolist() == ([3.0] if copies else [4.0])


# --- the optimizer


def optimizer_of(model: torch.nn.Module, flat: bool, bias_correction: bool = False) -> AdamW:
    groups = parameter_groups(model.named_parameters(), 0.01, 1e-2, layerwise_decay=0.8)
    optimizer = AdamW(groups, lr=1e-2, bias_correction=bias_correction)
    if flat:
        parameters = FlatParameters(model, [group["params"] for group in groups])
        parameters.attach(model)
        optimizer.use_flat(parameters)
    return optimizer


def train(model: ElectraForPretraining, optimizer: AdamW, batch: dict[str, torch.Tensor], steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        backward(model, batch)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
            group["betas"] = (0.95 - 0.05 * step, 0.999)  # as a schedule may
        optimizer.step()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_updates_are_the_same(bias_correction: bool, make_model: Make, make_batch: Make) -> None:
    batch = make_batch(UNEVEN)
    plain, model = make_model(), make_model()
    for one, flat in ((plain, False), (model, True)):
        train(one, optimizer_of(one, flat, bias_correction), batch, 3)
    assert_same(dict(plain.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize(("saved_flat", "loaded_flat"), [(False, True), (True, False), (True, True)])
def test_a_state_is_loaded_with_and_without(
    saved_flat: bool, loaded_flat: bool, make_model: Make, make_batch: Make
) -> None:
    batch = make_batch(UNEVEN)
    whole = make_model()
    train(whole, optimizer := optimizer_of(whole, saved_flat), batch, 2)
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    train(whole, optimizer, batch, 2)
    resumed = make_model(seed=5)
    second = optimizer_of(resumed, loaded_flat)
    resumed.load_state_dict(state[0])
    second.load_state_dict(state[1])
    for group, saved in zip(second.param_groups, state[1]["param_groups"], strict=True):
        group["lr"] = saved["lr"]  # of the schedule, which a state does not change
    train(resumed, second, batch, 2)
    assert_same(dict(whole.named_parameters()), dict(resumed.named_parameters()))
    moments = [{"m": state["exp_avg"], "v": state["exp_avg_sq"]} for state in optimizer.state.values()]
    for left, right in zip(moments, second.state.values(), strict=True):
        assert_same(left, {"m": right["exp_avg"], "v": right["exp_avg_sq"]})


def test_a_flagged_update_changes_nothing(make_model: Make, make_batch: Make) -> None:
    """`found_inf` of the numerical guard reaches the update of the buffers."""
    model = make_model()
    optimizer = optimizer_of(model, True)
    backward(model, make_batch(UNEVEN))
    before = copy.deepcopy(model.state_dict())
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert not any(torch.equal(leaf.detach(), torch.zeros_like(leaf)) for leaf in leaves(optimizer))
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
