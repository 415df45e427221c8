"""Two towers: what each output can see, and the states beside transformers' `ElectraModel` with explicit masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_stand_in import flash_forward
from torch import Tensor, nn
from transformers import ElectraModel

from electra_composer.config import ModelConfig, TrainerConfig
from electra_composer.model.encoder import Embeddings, Layer
from electra_composer.model.heads import MaskedLMHead
from electra_composer.model.kernels import attention
from electra_composer.model.sizes import generator_config, two_tower_parameters
from electra_composer.model.two_towers import TwoTowers
from electra_composer.model.weight_maps import encoder_to_transformers, transformers_config
from electra_composer.training.parallelism import wrap_activations

Batch = dict[str, Tensor]
MakeConfig = Callable[..., ModelConfig]
MakeBatch = Callable[..., Batch]

WIDTH = 16  # hidden size of one tower of the tiny model
PACKED = [[(6, 5), (8, 0), (4, 7)], [(20, 0), (3, 0)], []]
PATHS = ["sdpa", "written", "varlen", "triton"]


class Model(nn.Module):
    """Embeddings and towers as they are in a generator; perturbed, so that biases and norms count."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        sizes = generator_config(model, 99)
        self.embeddings, self.towers = Embeddings(sizes), TwoTowers(sizes)
        for parameter in self.parameters():
            nn.init.normal_(parameter, mean=0.1, std=0.3)

    def forward(self, batch: Batch, path: str = "sdpa", most_examples: int | None = None) -> Tensor:
        return self.towers(self.embeddings, **batch, attention_path=path, most_examples=most_examples)


@pytest.fixture
def use_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Make an implementation of attention available on a CPU, and return the name of its path."""

    def use(name: str) -> str:
        monkeypatch.setattr(attention, "_flash_forward", flash_forward)
        monkeypatch.setattr(attention, "_is_short_bf16", lambda qkv: name == "written")
        return "sdpa" if name == "written" else name

    return use


def seen_by(model: Model, batch: Batch, path: str) -> Tensor:
    """Which tokens have a gradient in each half of each output of one row, booleans `[length, 2, length]`.

    All tokens of the row are different, so each has its own row of the embedding table.
    """
    table, result = model.embeddings.word.weight, []
    halves = model(batch, path)[0].unflatten(-1, (2, WIDTH))
    for of_half in halves.flatten(0, 1):
        (gradient,) = torch.autograd.grad((of_half * torch.randn(WIDTH)).sum(), table, retain_graph=True)
        result.append((gradient[batch["input_ids"][0]] != 0).any(-1))
    return torch.stack(result).view(-1, 2, halves.shape[0])


@pytest.mark.parametrize("name", PATHS)
def test_an_output_depends_on_every_token_of_its_example_but_its_own(
    tiny_model_config: MakeConfig, make_batch: MakeBatch, use_path: Callable[[str], str], name: str
) -> None:
    """Exactly zero gradients elsewhere; the left half sees what is before the token, the right half what is after."""
    batch = make_batch([[(4, 3), (2, 0), (5, 0)]], length=17)
    batch["input_ids"] = torch.randperm(99)[None, :17]
    example = batch["sequence_ids"][0]
    seen = seen_by(Model(tiny_model_config()), batch, use_path(name))
    same, place = example[:, None] == example, torch.arange(17)
    expected = torch.stack([same & (place < place[:, None]), same & (place > place[:, None])], dim=1)
    assert torch.equal(seen[example > 0], expected[example > 0])


def test_with_dropout_no_output_depends_on_its_own_token(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    batch = make_batch([[(12, 0)]], length=12)
    batch["input_ids"] = torch.randperm(99)[None, :12]
    seen = seen_by(Model(tiny_model_config(dropout=0.2, attention_dropout=0.2)), batch, "sdpa").any(1)
    assert not seen.diagonal().any()
    assert seen.float().mean() > 0.8  # all others, as far as dropout lets them


def test_a_changed_token_leaves_its_own_output_as_it_is(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    model, batch = Model(tiny_model_config()), make_batch(PACKED)
    before = model(batch)
    for place in (0, 5, 10, 11, 18, 29):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] += 1
        after, here = model(changed), batch["sequence_ids"][0] == batch["sequence_ids"][0, place]
        differs = (before != after).any(-1)
        assert not differs[1:].any()
        here[place] = False
        assert torch.equal(differs[0], here)


def theirs(model: Model, tower: str, batch: Batch) -> Tensor:
    """Hidden states of transformers' `ElectraModel` on one example `[1, length]`, with an explicit causal mask."""
    encoder = getattr(model.towers, tower)
    reference = ElectraModel(transformers_config(encoder.config, pad_id=0)).eval()
    state = encoder_to_transformers(model.embeddings.state_dict(), encoder.state_dict(), encoder.config)
    reference.load_state_dict(state)
    everything = torch.ones(1, *2 * [batch["input_ids"].shape[1]])
    allowed = everything.tril() if tower == "left" else everything.triu()
    with torch.no_grad():
        return reference(batch["input_ids"], allowed, batch["token_type_ids"]).last_hidden_state[0]


@pytest.mark.parametrize("embedding_size", [16, 24])
def test_states_agree_with_transformers_on_each_example_by_itself(
    tiny_model_config: MakeConfig, make_batch: MakeBatch, embedding_size: int
) -> None:
    """Packed rows against examples alone, with and without a projection; zeros where there is no neighbour."""
    model, batch = Model(tiny_model_config(embedding_size=embedding_size)), make_batch(PACKED)
    assert (model.towers.left.project is None) == (embedding_size == WIDTH)
    found, zeros = model(batch), torch.zeros(1, WIDTH)
    compared = 0
    for row, examples in enumerate(PACKED):
        for number in range(1, len(examples) + 1):
            here = batch["sequence_ids"][row] == number
            alone = {name: tensor[row, here][None] for name, tensor in batch.items()}
            left, right = theirs(model, "left", alone), theirs(model, "right", alone)
            expected = torch.cat([torch.cat([zeros, left[:-1]]), torch.cat([right[1:], zeros])], dim=-1)
            torch.testing.assert_close(found[row, here], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(alone)[0], expected, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == 5


def values_and_gradients(model: Model, *inputs: Any) -> tuple[Tensor, ...]:
    """Outputs at tokens, and gradients of all parameters; every one must have a gradient."""
    torch.manual_seed(3)
    batch = inputs[0]
    model.zero_grad()
    out = model(*inputs)
    assert torch.isfinite(out).all()
    kept = out[batch["sequence_ids"] > 0]
    (kept * torch.linspace(-1, 1, kept.numel()).view_as(kept)).sum().backward()
    return kept.detach(), *(parameter.grad.clone() for parameter in model.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PATHS[1:])
def test_paths_agree(
    tiny_model_config: MakeConfig, make_batch: MakeBatch, use_path: Callable[[str], str], name: str
) -> None:
    """Values and gradients; `varlen` with the tightest bound of its examples, and with none."""
    model, batch = Model(tiny_model_config()).double(), make_batch(PACKED)
    expected = values_and_gradients(model, batch)
    path = use_path(name)
    for most in (None, 8):  # 5 examples and 3 runs of padding
        torch.testing.assert_close(values_and_gradients(model, batch, path, most), expected)
    if path == "varlen":
        with pytest.raises(RuntimeError, match="more than the 7 examples of its bound"):
            model(batch, path, 7)


def test_every_weight_gets_a_gradient(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    model = Model(tiny_model_config(embedding_size=24))
    values_and_gradients(model, make_batch(PACKED))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        part = parameter.grad
        if name.endswith("qkv.bias"):  # a bias of the keys shifts all scores of a query alike
            part = torch.cat(part.chunk(3)[::2])
        used = part.abs() > 0
        assert used.all() if parameter.dim() == 1 else used.any(), name


def test_compiled_towers_are_one_graph(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    torch.compiler.reset()
    model, batch = Model(tiny_model_config(num_layers=1)), make_batch(PACKED)
    expected = values_and_gradients(model, batch)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    torch.testing.assert_close(values_and_gradients(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_towers_with_flash_attention_are_one_graph(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    """The operator itself, forward and backward, on a device that computes nothing."""
    torch.compiler.reset()
    model = Model(tiny_model_config(num_layers=1)).bfloat16().to("meta")
    batch = {name: tensor.to("meta") for name, tensor in make_batch(PACKED).items()}
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(batch, "varlen", 8)
    assert out.shape == (3, 32, 2 * WIDTH)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_recomputed_activations_change_no_bit(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    """With dropout; each layer of both towers runs twice."""
    model, batch = Model(tiny_model_config(dropout=0.1, attention_dropout=0.1)), make_batch(PACKED)
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, Layer):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = values_and_gradients(model, batch)
    assert len(calls) == 4
    wrap_activations(model, TrainerConfig(activation_checkpointing=True))  # type: ignore[arg-type]
    assert all(map(torch.equal, values_and_gradients(model, batch), expected))
    assert len(calls) == 4 + 8


def test_embedding_dropout_is_drawn_for_each_tower(tiny_model_config: MakeConfig, make_batch: MakeBatch) -> None:
    """Towers with the same weights, no layers and no projection, on a row that is its own reversal."""
    model = Model(tiny_model_config(num_layers=1, dropout=0.5))
    model.towers.left.layers, model.towers.right.layers = nn.ModuleList(), nn.ModuleList()
    batch = {name: torch.ones(1, 8, dtype=torch.long) for name in make_batch([])}
    left, right = model(batch).chunk(2, dim=-1)
    assert not torch.equal(left, right.flip(1))
    left, right = model.eval()(batch).chunk(2, dim=-1)
    assert torch.equal(left, right.flip(1))


@pytest.mark.parametrize("embedding_size", [16, 24])
def test_head_and_number_of_parameters(tiny_model_config: MakeConfig, embedding_size: int) -> None:
    sizes = generator_config(tiny_model_config(embedding_size=embedding_size), 99)
    towers = TwoTowers(sizes)
    head = MaskedLMHead(sizes, towers.output_size)
    assert head(torch.randn(2, 3, 2 * WIDTH)).shape == (2, 3, embedding_size)
    assert two_tower_parameters(sizes) == sum(p.numel() for part in (towers, head) for p in part.parameters())
