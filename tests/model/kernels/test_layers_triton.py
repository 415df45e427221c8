"""Triton kernels of layers and embeddings against PyTorch: values, gradients, dropout, and a complete model.

Without a GPU, `test_triton_under_the_interpreter` runs them in another process, in Triton's interpreter.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from masked_lm_inputs import OPERATOR_CHECKS, distance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from triton_interpreter import DEVICE, KERNEL_MARKS, run_interpreted

from electra_composer.config import ModelConfig, ObjectiveConfig
from electra_composer.errors import UserError
from electra_composer.model.electra import ElectraForPretraining, SpecialIds
from electra_composer.model.encoder import Embeddings, EncoderConfig
from electra_composer.model.kernels import dropout, fused_layers
from electra_composer.model.two_towers import TwoTowers

SHAPES = [  # rows and width: odd ones, and the widths of the YAMLs
    (9, 40, torch.float32),
    (9, 40, torch.bfloat16),
    (70, 64, torch.float32),
    (5, 256, torch.bfloat16),
    (3, 768, torch.float32),
    (2, 1024, torch.bfloat16),
]


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    run_interpreted([__file__], at_least=25)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def assert_same(actual: Tensor, expected: Tensor, low: bool = False) -> None:
    assert distance(actual, expected) < (1e-2 if low else 2e-6)


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], low: bool = False) -> None:
    """Compare the gradients of two scalars; ours have the dtypes of the inputs."""
    for actual, expected, tensor in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), inputs, strict=True
    ):
        assert actual.dtype == tensor.dtype
        assert_same(actual, expected, low)


class TestKernel:
    """Tests that the other process runs: names begin with `test_kernel_`."""

    pytestmark = KERNEL_MARKS

    @pytest.fixture(autouse=True)
    def _seeded(self) -> None:
        torch.manual_seed(0)

    @pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES)
    def test_kernel_norm(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """`LayerNorm(residual + x + bias)`, with a gradient for each of its two results."""
        from electra_composer.model.kernels.layers_triton import add_norm

        x, residual, bias = (rand(*shape, dtype=dtype) for shape in ((1, rows, width), (1, rows, width), (width,)))
        weight, shift = rand(width), rand(width)
        stream, product, _, _ = add_norm(x, bias, residual, weight, shift, None, 0.0, 1e-12)
        total = residual.float() + (x.float() + bias.float())
        expected = F.layer_norm(total, (width,), weight, shift, 1e-12)
        low, (first, second) = dtype != torch.float32, (torch.randn_like(expected) for _ in range(2))
        assert stream.dtype == product.dtype == dtype
        assert torch.equal(stream, product)
        assert_same(stream, expected, low)
        ours, theirs = (stream * first + product * second).sum(), (expected * (first + second)).sum()
        assert_same_gradients(ours, theirs, [x, residual, bias, weight, shift], low)

    def test_kernel_norm_alone_and_of_two_dtypes(self) -> None:
        from electra_composer.model.kernels.layers_triton import add_norm

        x, weight, shift = rand(7, 48), rand(48), rand(48)
        product = add_norm(x, None, None, weight, shift, None, 0.0, 1e-5)[1]
        expected = F.layer_norm(x, (48,), weight, shift, 1e-5)
        assert_same(product, expected)
        upstream = torch.randn_like(expected)
        assert_same_gradients((product * upstream).sum(), (expected * upstream).sum(), [x, weight, shift])
        stream, product = add_norm(x.bfloat16(), None, x, weight, shift, None, 0.0, 1e-5)[:2]
        assert (stream.dtype, product.dtype) == (torch.float32, torch.bfloat16)

    @pytest.mark.parametrize(("rows", "width", "dtype"), SHAPES)
    def test_kernel_gelu(self, rows: int, width: int, dtype: torch.dtype) -> None:
        from electra_composer.model.kernels.layers_triton import gelu_bias

        x, bias, low = rand(rows, width, dtype=dtype), rand(width, dtype=dtype), dtype != torch.float32
        out, expected = gelu_bias(x, bias), F.gelu(x.float() + bias.float())
        assert out.dtype == dtype
        assert_same(out, expected, low)
        upstream = torch.randn_like(expected)
        assert_same_gradients((out * upstream).sum(), (expected * upstream).sum(), [x, bias], low)

    @pytest.mark.parametrize(("entries", "width"), [(70, 40), (40, 128), (512, 16)])
    def test_kernel_embeddings(self, entries: int, width: int) -> None:
        """Ids that repeat, packed positions, 51 tokens in more than one block; entries without tokens get zeros."""
        from electra_composer.model.kernels.embeddings_triton import embed

        tables = [rand(count, width) for count in (64, entries, 2)]
        ids = [torch.randint(count, (3, 17), device=DEVICE) for count in (20, 40, 2)]
        weight, shift = rand(width), rand(width)
        stream, product, _, _ = embed(*tables, *ids, weight, shift, None, 0.0, 1e-12, torch.float32)
        summed = sum(F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
        expected = F.layer_norm(summed, (width,), weight, shift, 1e-12)
        assert_same(stream, expected)
        first, second = torch.randn_like(expected), torch.randn_like(expected)
        ours, theirs = (stream * first + product * second).sum(), (expected * (first + second)).sum()
        assert_same_gradients(ours, theirs, [*tables, weight, shift])

    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_kernel_dropout_rate_and_factor(self, p: float) -> None:
        kept = self._factors(p, rows=40, width=512)
        assert kept[kept != 0].tolist() == pytest.approx([dropout.scale(p)] * int((kept != 0).sum()))
        share = (kept == 0).double().mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        # Neighbours, which share a call of Philox, and rows are independent.
        for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(2, 1)):
            both = ((kept == 0) & (other == 0)).double().mean().item()
            assert abs(both - p * p) < 5 * (p * p / kept.numel()) ** 0.5

    def test_kernel_dropout_of_the_backward_is_that_of_the_forward(self) -> None:
        from electra_composer.model.kernels.layers_triton import add_norm

        x, bias, residual, weight, shift = rand(6, 40), rand(40), rand(6, 40), rand(40), rand(40)
        seed, p = torch.tensor([3], device=DEVICE), 0.4
        out = add_norm(x, bias, residual, weight, shift, seed, p, 1e-12)[0]
        kept = self._factors(p, 6, 40, seed)
        expected = F.layer_norm(residual + (x + bias) * kept, (40,), weight, shift, 1e-12)
        assert_same(out, expected)
        upstream = torch.randn_like(out)
        inputs = [x, bias, residual, weight, shift]
        assert_same_gradients((out * upstream).sum(), (expected * upstream).sum(), inputs)

    def test_kernel_dropout_of_embeddings(self) -> None:
        from electra_composer.model.kernels.embeddings_triton import embed

        tables, ids = [rand(16, 40) for _ in range(3)], [torch.randint(16, (2, 5), device=DEVICE) for _ in range(3)]
        weight, shift, seed = rand(40), rand(40), torch.tensor([2**40 + 1], device=DEVICE)
        out = embed(*tables, *ids, weight, shift, seed, 0.3, 1e-12, torch.float32)[1]
        kept = self._factors(0.3, 10, 40, seed).view(2, 5, 40)
        summed = sum(F.embedding(index, table) for index, table in zip(ids, tables, strict=True))
        expected = F.layer_norm(summed, (40,), weight, shift, 1e-12) * kept
        assert_same(out, expected)
        upstream = torch.randn_like(out)
        ours, theirs = (out * upstream).sum(), (expected * upstream).sum()
        assert_same_gradients(ours, theirs, [*tables, weight, shift])

    def test_kernel_everything_dropped(self) -> None:
        assert (self._factors(1.0, 3, 40) == 0).all()

    @staticmethod
    def _factors(p: float, rows: int, width: int, seed: Tensor | None = None) -> Tensor:
        """Factors of dropout, from the gradient of `x`, whose LayerNorm's gradient is the residual's."""
        from electra_composer.model.kernels.layers_triton import add_norm

        x, residual = rand(rows, width), rand(rows, width)
        seed = torch.tensor([1], device=DEVICE) if seed is None else seed
        out = add_norm(x, None, residual, torch.ones_like(x[0]), torch.zeros_like(x[0]), seed, p, 1e-12)[0]
        of_x, of_residual = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, residual])
        return of_x / of_residual

    def test_kernel_seeds(self) -> None:
        """torch's seed determines the seeds, and they the bits."""
        torch.manual_seed(5)
        first, second = fused_layers.draw_seeds(2, torch.device(DEVICE))
        torch.manual_seed(5)
        again, _ = fused_layers.draw_seeds(2, torch.device(DEVICE))
        one, two, three = (self._factors(0.5, 4, 64, seed) > 0 for seed in (first, second, again))
        assert torch.equal(one, three)
        assert not torch.equal(one, two)

    def test_kernel_operators_are_registered_as_torch_wants_them(self) -> None:
        from electra_composer.model.kernels.embeddings_triton import embed
        from electra_composer.model.kernels.layers_triton import add_norm, gelu_bias

        x, vector, seed = rand(3, 16), rand(16), torch.tensor([1], device=DEVICE)
        ids = torch.tensor([[1, 0, 1]], device=DEVICE)
        for operator, arguments in (
            (add_norm, (x, vector, rand(3, 16), rand(16), rand(16), seed, 0.1, 1e-12)),
            (gelu_bias, (x, vector)),
            (embed, (rand(4, 16), rand(4, 16), rand(2, 16), *[ids] * 3, vector, vector, seed, 0.1, 1e-12, x.dtype)),
        ):
            torch.library.opcheck(operator, arguments, test_utils=OPERATOR_CHECKS)

    @pytest.mark.parametrize(
        ("embedding_size", "sharing", "autocast"),
        [(16, "tied", False), (32, "tied", False), (16, "tied", True), (16, "gdes", True)],
    )
    def test_kernel_model_is_its_twin(self, embedding_size: int, sharing: str, autocast: bool) -> None:
        """Losses and all gradients of a tiny model without dropout, with and without a projection."""
        (theirs, of_theirs), (ours, of_ours) = (
            step(tiny_model(0.0, embedding_size, name, sharing), autocast) for name in ("torch", "triton")
        )
        tolerance = 2e-2 if autocast else 1e-5
        assert distance(ours, theirs) < tolerance
        assert list(of_ours) == list(of_theirs)
        for name, gradient in of_theirs.items():
            assert (of_ours[name] - gradient).norm() <= 5 * tolerance * gradient.norm() + 1e-6, name

    def test_kernel_model_repeats_its_bits(self) -> None:
        """The same seed gives the same losses and gradients; another gives others."""
        model = tiny_model(0.1, 16, "triton")
        runs = [step(model, autocast=True, seed=seed) for seed in (1, 1, 2)]
        assert torch.equal(runs[0][0], runs[1][0])
        assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
        assert not torch.equal(runs[0][0], runs[2][0])

    def test_kernel_model_recomputes_the_same_dropout(self) -> None:
        """Activation checkpointing changes no bit."""
        model = tiny_model(0.1, 16, "triton")
        loss, gradients = step(model)
        for layer in (*model.discriminator.layers, *model.encoder_of_generator.layers):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        again, recomputed = step(model)
        assert torch.equal(again, loss)
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in gradients.items())

    @pytest.mark.parametrize("embedding_size", [16, 24])
    def test_kernel_two_towers_are_their_twin(self, embedding_size: int) -> None:
        """States and all gradients, with and without a projection."""
        sizes = EncoderConfig(99, embedding_size, 16, 1, 2, 32, 20, 0.0, 0.0, 0.02, 1e-12)
        model = nn.ModuleDict({"embeddings": Embeddings(sizes), "towers": TwoTowers(sizes)}).to(DEVICE)
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=0.05, std=0.2)
        numbers = torch.arange(16, device=DEVICE).expand(2, 16)
        ids = (7 * numbers, (numbers > 5).long(), numbers % 9, 1 + numbers // 9)
        results = []
        for name in ("torch", "triton"):
            fused_layers.use_layer_kernels(model, name)
            out = model["towers"](model["embeddings"], *ids, "triton")
            results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
        for theirs, ours in zip(*results, strict=True):
            assert (ours - theirs).norm() <= 5e-5 * theirs.norm()

    def test_kernel_model_compiles_without_a_graph_break(self) -> None:
        model = tiny_model(0.1, 16, "triton")
        loss, gradients = step(model)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
        compiled_loss, compiled_gradients = step(model)
        torch.testing.assert_close(compiled_loss, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def tiny_model(p: float, embedding_size: int, name: str, sharing: str = "tied") -> ElectraForPretraining:
    torch.manual_seed(0)
    sizes = ModelConfig(1, 32, 2, embedding_size, 0.5, max_positions=20, dropout=p, attention_dropout=0.0)
    sizes.sharing = sharing  # type: ignore[assignment]
    model = ElectraForPretraining(sizes, ObjectiveConfig(masked_lm="chunked"), 99, SpecialIds(0, 1, 2, 3), 16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.2)
    fused_layers.use_layer_kernels(model, fused_layers.resolve_layer_kernels(name, DEVICE))
    return model.to(DEVICE).train()


def step(model: ElectraForPretraining, autocast: bool = False, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses, and gradients of every parameter, on rows of two examples; masks are the same in every call."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 99, (3, 16), generator=generator).to(DEVICE)
    numbers = torch.arange(16, device=DEVICE).expand(3, 16)
    noise = model.draw_noise(ids.cpu(), generator).to(DEVICE)
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        outputs = model(ids, (numbers > 5).long(), numbers % 9, 1 + numbers // 9, noise)
    losses = torch.stack([outputs["mlm_loss"], outputs["rtd_loss"]])
    losses.sum().backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "device", "expected"), [("auto", "cuda", "triton"), ("auto", "cpu", "torch"), ("torch", "cuda", "torch")]
)
def test_choice(name: str, device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "HAS_TRITON", True)
    assert fused_layers.resolve_layer_kernels(name, device) == expected


def test_choice_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"needs CUDA: set trainer\.layer_kernels=torch"):
        fused_layers.resolve_layer_kernels("triton", "cpu")
    with pytest.raises(UserError, match="expected one of auto, torch, triton"):
        fused_layers.resolve_layer_kernels("apex", "cuda")
    monkeypatch.setattr(fused_layers, "HAS_TRITON", False)
    with pytest.raises(UserError, match="the package triton is missing"):
        fused_layers.resolve_layer_kernels("auto", "cuda")
