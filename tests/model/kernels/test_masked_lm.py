"""The masked-LM head against plain PyTorch, its sampler against NumPy and the softmax, Triton against its twin.

Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before Triton is imported: in a
process of its own, started by `test_triton_under_the_interpreter`.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import BENCHMARKS
from torch import Tensor

from electra_composer.errors import UserError
from electra_composer.model.kernels import masked_lm as module
from electra_composer.model.kernels import masked_lm_chunked
from electra_composer.model.kernels.masked_lm import MaskedLM, masked_lm, resolve_implementation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

# Shapes are static here: torch's fourth check, of dynamic ones, takes as long as these together.
OPERATOR_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def _inputs(
    count: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> dict[str, Tensor]:
    """Every argument of `masked_lm`: padding rows hold garbage, some rows have weight 0."""
    generator = torch.Generator().manual_seed(seed)
    padded = -(-vocab_size // 64) * 64
    weight = torch.randn(padded, width, generator=generator) * (2.0 / math.sqrt(width))
    weight[vocab_size:] = 1e4
    bias = torch.randn(padded, generator=generator)
    bias[vocab_size:] = 1e6
    inputs = {
        "features": torch.randn(count, width, generator=generator).to(dtype),
        "weight": weight,
        "bias": bias,
        "targets": torch.randint(vocab_size, (count,), generator=generator),
        "row_weights": (torch.rand(count, generator=generator) > 0.2).float(),
        "noise": torch.rand(count, generator=generator),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    for name in ("features", "weight", "bias"):
        inputs[name].requires_grad_()
    return inputs


def _gradients(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of 3.7 × `loss`: a loss is never the end of the graph."""
    return list(torch.autograd.grad(loss * 3.7, [inputs[name] for name in ("features", "weight", "bias")]))


def _plain(inputs: dict[str, Tensor], vocab_size: int, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, token losses and logits of the same, with all logits at once and autograd."""
    logits = F.linear(inputs["features"], inputs["weight"][:vocab_size], inputs["bias"][:vocab_size]).float()
    losses = F.cross_entropy(logits, inputs["targets"], reduction="none", label_smoothing=label_smoothing)
    return (losses * inputs["row_weights"]).sum(), losses, logits


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# ---------------------------------------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize(
    ("count", "width", "vocab_size", "smoothing"), [(70, 16, 99, 0.0), (33, 128, 1000, 0.1), (40, 24, 512, 0.0)]
)
@pytest.mark.parametrize("rows_per_chunk", [16, 1024])
def test_loss_and_gradients_are_those_of_plain_pytorch(
    count: int, width: int, vocab_size: int, smoothing: float, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(count, width, vocab_size)
    monkeypatch.setattr(masked_lm_chunked, "CHUNK_BYTES", rows_per_chunk * 4 * inputs["weight"].shape[0])
    actual = masked_lm(**inputs, vocab_size=vocab_size, label_smoothing=smoothing)
    loss, losses, logits = _plain(inputs, vocab_size, smoothing)
    assert _distance(actual.loss, loss) < 1e-5
    assert _distance(actual.token_losses, losses) < 1e-5
    assert torch.equal(actual.correct, logits.argmax(1) == inputs["targets"])
    for ours, theirs in zip(_gradients(actual.loss, inputs), _gradients(loss, inputs), strict=True):
        assert _distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bf16_autocast_is_plain_pytorch_under_autocast_but_for_rounding(smoothing: float) -> None:
    inputs = _inputs(70, 128, 1000)
    expected_loss, _, _ = _plain(inputs, 1000, smoothing)
    expected = _gradients(expected_loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = masked_lm(**inputs, vocab_size=1000, label_smoothing=smoothing)
        theirs_loss, _, _ = _plain(inputs, 1000, smoothing)
    assert actual.loss.dtype == actual.token_losses.dtype == torch.float32
    theirs = _gradients(theirs_loss, inputs)
    for ours, bf16, fp32 in zip(_gradients(actual.loss, inputs), theirs, expected, strict=True):
        assert ours.dtype == torch.float32
        # As near to the exact gradient as plain PyTorch is in bf16.
        assert _distance(ours, fp32) < max(1.5 * _distance(bf16, fp32), 2e-3)


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    """Mixed precision of FSDP2: the parameters themselves are bf16."""
    inputs = _inputs(40, 32, 99, torch.bfloat16)
    expected = _gradients(
        _plain({k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}, 99)[0], inputs
    )
    low = {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("features", "weight", "bias")}
    actual = _gradients(masked_lm(**{**inputs, **low}, vocab_size=99).loss, low)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert _distance(ours, theirs) < 2e-2


def test_rows_of_weight_zero_and_padding_rows_of_the_table_get_no_gradient() -> None:
    inputs = _inputs(70, 16, 99)
    grad_features, grad_weight, grad_bias = _gradients(masked_lm(**inputs, vocab_size=99).loss, inputs)
    unused = inputs["row_weights"] == 0
    assert 0 < unused.sum() < 70
    assert grad_features[unused].abs().max() == 0
    assert grad_features[~unused].abs().amin(0).min() > 0
    assert grad_weight[99:].abs().max() == 0
    assert grad_bias[99:].abs().max() == 0


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = _inputs(40, 16, 99)
    expected = masked_lm(**inputs, vocab_size=99)
    with torch.no_grad():
        actual = masked_lm(**inputs, vocab_size=99)
    assert not actual.loss.requires_grad
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs.detach())


def test_only_the_loss_has_a_gradient() -> None:
    outputs = masked_lm(**_inputs(20, 16, 99), vocab_size=99)
    assert [tensor.requires_grad for tensor in outputs] == [True, False, False, False]


def test_operator_is_registered_as_torch_wants_it() -> None:
    inputs = _inputs(20, 16, 99)
    arguments = (*inputs.values(), 99, 1.0, False, 0.1, False, True)
    torch.library.opcheck(masked_lm_chunked.masked_lm_chunked, arguments, test_utils=OPERATOR_CHECKS)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_a_graph_break(autocast: bool) -> None:
    inputs = _inputs(20, 16, 99)
    compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = (call(**inputs, vocab_size=99) for call in (masked_lm, compiled))
    assert torch.equal(actual.sampled, expected.sampled)
    for ours, theirs in zip(_gradients(actual.loss, inputs), _gradients(expected.loss, inputs), strict=True):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------- sampling


def _one_distribution(
    draws: int, vocab_size: int, spread: float = 1.5, target: int = 3
) -> tuple[dict[str, Tensor], Tensor]:
    """`draws` rows of the same logits `[vocab_size]`, which are the bias, and evenly spaced noise in random order."""
    padded = -(-vocab_size // 64) * 64
    bias = torch.full((padded,), 1e6)
    bias[:vocab_size] = torch.randn(vocab_size) * spread
    inputs = {
        "features": torch.zeros(draws, 16),
        "weight": torch.zeros(padded, 16),
        "bias": bias,
        "targets": torch.full((draws,), target),
        "row_weights": torch.ones(draws),
        "noise": torch.rand(draws),
    }
    return inputs, bias[:vocab_size]


def test_sample_is_the_inverse_of_the_cumulative_distribution() -> None:
    inputs = _inputs(4000, 16, 1000)
    sampled = masked_lm(**inputs, vocab_size=1000).sampled.numpy()
    logits = _plain(inputs, 1000)[2].detach().double().numpy()
    cumulative = np.cumsum(np.exp(logits - logits.max(1, keepdims=True)), axis=1)
    cumulative /= cumulative[:, -1:]
    noise = inputs["noise"].double().numpy()[:, None]
    expected = (cumulative <= noise).sum(1)
    assert (sampled == expected).mean() >= 0.999
    # Where they differ, the number lies on the boundary between two tokens, to fp32.
    clear = np.abs(cumulative - noise).min(1) > 1e-6
    assert clear.sum() > 3500
    assert (sampled == expected)[clear].all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ends_of_the_noise_are_the_first_and_the_last_token_that_is_possible(temperature: float) -> None:
    inputs, _ = _one_distribution(4, 99)
    inputs["bias"][[0, 1, 97, 98]] = -1e9  # impossible: their exponential is zero
    inputs["noise"] = torch.tensor([0.0, 1e-30, 1.0 - 2.0**-24, 1.0])
    assert masked_lm(**inputs, vocab_size=99, temperature=temperature).sampled.tolist() == [2, 2, 96, 96]


@pytest.mark.parametrize("gumbel", [False, True])
def test_impossible_tokens_are_never_drawn(gumbel: bool) -> None:
    inputs, _ = _one_distribution(20_000, 300)
    possible = torch.zeros(300, dtype=torch.bool)
    possible[[63, 64, 127, 200, 299]] = True
    inputs["bias"][:300][~possible] = -1e9
    sampled = masked_lm(**inputs, vocab_size=300, gumbel=gumbel).sampled
    assert sampled.unique().tolist() == [63, 64, 127, 200, 299]


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize(("temperature", "disallow"), [(1.0, False), (2.0, False), (1.0, True), (2.0, True)])
def test_samples_follow_the_softmax(gumbel: bool, temperature: float, disallow: bool) -> None:
    draws, vocab_size = 100_000, 99
    inputs, logits = _one_distribution(draws, vocab_size)
    options = {"temperature": temperature, "disallow_correct": disallow, "gumbel": gumbel}
    sampled = masked_lm(**inputs, vocab_size=vocab_size, **options).sampled
    if disallow:
        logits = logits.clone()
        logits[3] = -math.inf
    _assert_distributed(sampled, torch.softmax(logits.double() / temperature, 0))


def _assert_distributed(sampled: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square: by chance one seed in a thousand would fail (Wilson-Hilferty's quantile)."""
    counts, expected = (
        torch.bincount(sampled.cpu(), minlength=len(probabilities)).double(),
        probabilities * len(sampled),
    )
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum()) - 1
    assert freedom > 10
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_disallow_correct_never_draws_the_original() -> None:
    inputs = _inputs(4000, 16, 99)
    with torch.no_grad():
        inputs["bias"][:99] = 0.0
        inputs["weight"].mul_(0.0)
        inputs["bias"][inputs["targets"][0]] = 50.0
    inputs["targets"].fill_(int(inputs["targets"][0]))  # all but certain
    assert (masked_lm(**inputs, vocab_size=99).sampled == inputs["targets"]).all()
    assert (masked_lm(**inputs, vocab_size=99, disallow_correct=True).sampled != inputs["targets"]).all()


def test_temperature_and_disallow_correct_leave_the_loss_alone() -> None:
    inputs = _inputs(70, 16, 99)
    expected = masked_lm(**inputs, vocab_size=99)
    actual = masked_lm(**inputs, vocab_size=99, temperature=3.0, disallow_correct=True)
    assert not torch.equal(actual.sampled, expected.sampled)
    assert torch.equal(actual.token_losses, expected.token_losses)
    for ours, theirs in zip(_gradients(actual.loss, inputs), _gradients(expected.loss, inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_logits_that_are_not_numbers_give_a_loss_that_is_not_and_ids_that_exist() -> None:
    inputs = _inputs(40, 16, 99)
    with torch.no_grad():
        inputs["features"][::2] = math.nan
    outputs = masked_lm(**inputs, vocab_size=99)
    assert outputs.loss.isnan()
    assert outputs.sampled.min() >= 0
    assert outputs.sampled.max() < 99


# ----------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_switch() -> None:
    with pytest.raises(UserError, match=r"objective\.masked_lm is 'liger'; expected one of auto, chunked, triton"):
        resolve_implementation("liger", "cpu", 64, 16)
    with pytest.raises(UserError, match=r"2\^31 numbers: set objective\.masked_lm=chunked"):
        resolve_implementation("auto", "cuda", 2**21, 1024)
    with pytest.raises(ValueError, match="100 rows of embeddings for 99 tokens"):
        masked_lm(**{**_inputs(4, 16, 99), "weight": torch.zeros(100, 16)}, vocab_size=99)


def test_triton_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"needs CUDA: set objective\.masked_lm=chunked"):
        masked_lm(**_inputs(4, 16, 99), vocab_size=99, implementation="triton")


def test_triton_that_is_not_installed_is_no_silent_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert resolve_implementation("auto", "cpu", 64, 16) == "chunked"
    with pytest.raises(UserError, match=r"package triton is missing; .* objective\.masked_lm=chunked"):
        resolve_implementation("auto", "cuda", 64, 16)


def test_auto_is_triton_on_cuda() -> None:
    assert resolve_implementation("auto", "cuda", 30528, 128) == "triton"


# ---------------------------------------------------------------------------------------- Triton against its twin


@pytest.mark.slow
def test_triton_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("this is the process of its own")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", __file__, "-k", "test_kernel_"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.count("PASSED") > 15


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "dtype", "constants"),
    [
        ("tile_statistics", "bf16", {"OWN_DRAW": False, "DISALLOW": False, "GUMBEL": False}),
        ("tile_statistics", "fp32", {"OWN_DRAW": True, "DISALLOW": True, "GUMBEL": False}),
        ("tile_statistics", "bf16", {"OWN_DRAW": True, "DISALLOW": True, "GUMBEL": True}),
        ("combine_tiles", "bf16", {"DISALLOW": True, "GUMBEL": False}),
        ("combine_tiles", "fp32", {"DISALLOW": False, "GUMBEL": True}),
        ("logits_gradient", "bf16", {}),
        ("logits_gradient", "fp32", {}),
    ],
)
def test_kernels_compile_for_hopper(
    name: str, dtype: str, constants: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the interpreter takes the compiler need not: Triton brings all that it needs for machine code, but a GPU."""
    pytest.importorskip("triton")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from electra_composer.model.kernels import masked_lm_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel_function = getattr(masked_lm_triton_kernels, name)
    sizes = {"BLOCK_M": 64, "TILE": 128, "BLOCK_E": 64, "TILES": 256, "TILES_PER_PROGRAM": 4, "PRECISION": "ieee"}
    known = {**sizes, **constants}
    pointers = {"targets": "i64", "seed": "i64", "sampled": "i64", "draw_token": "i32", "correct": "i1"}
    pointers |= dict.fromkeys(("features", "table", "gradient"), dtype)
    pointers |= dict.fromkeys(("bias", "noise", "largest", "total", "draw_largest", "draw_total", "of_target"), "fp32")
    pointers |= dict.fromkeys(("normalizer", "row_weights", "grad_loss", "bias_parts"), "fp32")
    scalars = dict.fromkeys(("inverse_temperature", "below_one", "label_smoothing"), "fp32")

    def type_of(argument: str) -> str:
        if argument in known:
            return "constexpr"
        return f"*{pointers[argument]}" if argument in pointers else scalars.get(argument, "i32")

    names = kernel_function.arg_names
    source = ASTSource(
        fn=kernel_function,
        signature={argument: type_of(argument) for argument in names},
        constexprs={(names.index(argument),): value for argument, value in known.items() if argument in names},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 0
    if name != "combine_tiles" and dtype == "bf16":
        assert "wgmma" in compiled.asm["ptx"]  # the products are on the tensor cores


kernel = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (ON_GPU or INTERPRETED), reason="no GPU; test_triton_under_the_interpreter runs it in another process"
    ),
]


@pytest.fixture
def _interpreter_multiplies_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter keeps bf16 as 16-bit integers, and `tl.dot` multiplies those: hand it fp32."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    original: Callable[..., interpreter.TensorHandle] = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: original(self, widened(a), widened(b), *rest),
    )
    yield


def _both(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> tuple[MaskedLM, MaskedLM]:
    """Triton's and the twin's; the twin on fp32, which has the products of bf16 numbers exactly, as a GPU does."""
    twins = {**inputs, "features": inputs["features"].float()}
    if inputs["features"].dtype != torch.float32:
        twins["weight"] = inputs["weight"].to(inputs["features"].dtype).float()
    return (
        masked_lm(**inputs, vocab_size=vocab_size, implementation="triton", **options),
        masked_lm(**twins, vocab_size=vocab_size, implementation="chunked", **options),
    )


def _assert_twins(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> None:
    low = inputs["features"].dtype != torch.float32
    actual, expected = _both(inputs, vocab_size, **options)
    assert _distance(actual.loss, expected.loss) < 1e-5
    assert _distance(actual.token_losses, expected.token_losses) < 1e-5
    assert torch.equal(actual.correct, expected.correct)
    # One uniform number for both: they differ only where it is within rounding of a boundary between tokens.
    differing = (actual.sampled != expected.sampled).sum()
    assert differing <= max(1, len(actual.sampled) // 500)
    for name, ours, theirs in zip(
        ("features", "weight", "bias"), _gradients(actual.loss, inputs), _gradients(expected.loss, inputs), strict=True
    ):
        assert ours.dtype == inputs[name].dtype
        assert _distance(ours, theirs) < (1e-2 if low else 1e-5), name


@pytest.mark.usefixtures("_interpreter_multiplies_bf16")
class TestKernel:
    """Names begin with `test_kernel_`: that is what the other process runs."""

    pytestmark = kernel

    @pytest.mark.parametrize(
        ("count", "width", "vocab_size", "dtype"),
        [
            (70, 16, 99, torch.float32),  # more than one block of rows; less than one tile of tokens
            (12, 100, 512, torch.bfloat16),  # width no power of two; whole tiles
            (12, 128, 513, torch.float32),  # one token in the last tile
            (12, 128, 1000, torch.bfloat16),
            (4, 1024, 99, torch.float32),
            (4, 1024, 99, torch.bfloat16),
        ],
    )
    def test_kernel_is_its_twin(self, count: int, width: int, vocab_size: int, dtype: torch.dtype) -> None:
        _assert_twins(_inputs(count, width, vocab_size, dtype, device=DEVICE), vocab_size)

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 2.0},
            {"disallow_correct": True},
            {"temperature": 0.5, "disallow_correct": True, "label_smoothing": 0.1},
        ],
    )
    def test_kernel_options(self, options: dict[str, float]) -> None:
        _assert_twins(_inputs(12, 24, 513, device=DEVICE), 513, **options)

    def test_kernel_disallow_correct_with_the_original_alone_in_its_tile(self) -> None:
        inputs = _inputs(8, 16, 129, device=DEVICE)
        inputs["targets"].fill_(128)
        _assert_twins(inputs, 129, disallow_correct=True)
        assert (_both(inputs, 129, disallow_correct=True)[0].sampled != 128).all()

    def test_kernel_backward_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from electra_composer.model.kernels import masked_lm_triton

        monkeypatch.setattr(masked_lm_triton, "BACKWARD_CHUNK_BYTES", 1)
        inputs = _inputs(150, 16, 99, device=DEVICE)
        loss = masked_lm(**inputs, vocab_size=99, gumbel=True, implementation="triton").loss
        for ours, theirs in zip(_gradients(loss, inputs), _gradients(_plain(inputs, 99)[0], inputs), strict=True):
            assert _distance(ours, theirs) < 1e-5

    def test_kernel_ends_of_the_noise(self) -> None:
        inputs, _ = _one_distribution(4, 300)
        inputs["bias"][[0, 1, 298, 299]] = -1e9
        inputs["noise"] = torch.tensor([0.0, 1e-30, 1.0 - 2.0**-24, 1.0])
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        assert masked_lm(**inputs, vocab_size=300, implementation="triton").sampled.tolist() == [2, 2, 297, 297]

    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "disallow_correct": True}])
    def test_kernel_gumbel_follows_the_softmax(self, options: dict[str, float]) -> None:
        # A row is dear under the interpreter: few of them, and so few tokens that each is expected often enough.
        draws, vocab_size = (250, 15) if INTERPRETED else (100_000, 99)
        inputs, logits = _one_distribution(draws, vocab_size, spread=0.5)
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        sampled = _gumbel_samples(inputs, vocab_size, **options)
        if options:
            logits = logits.clone()
            logits[3] = -math.inf
        _assert_distributed(sampled, torch.softmax(logits.double() / options.get("temperature", 1.0), 0))

    def test_kernel_gumbel_is_seeded_by_torch(self) -> None:
        inputs = _inputs(20, 16, 99, device=DEVICE)
        torch.manual_seed(1)
        first, second = _gumbel_samples(inputs, 99), _gumbel_samples(inputs, 99)
        torch.manual_seed(1)
        assert torch.equal(_gumbel_samples(inputs, 99), first)
        assert not torch.equal(first, second)

    def test_kernel_bf16_parameters(self) -> None:
        inputs = _inputs(12, 24, 99, torch.bfloat16, device=DEVICE)
        for name in ("weight", "bias"):
            inputs[name] = inputs[name].detach().bfloat16().requires_grad_()
        _assert_twins(inputs, 99)

    def test_kernel_logits_that_are_not_numbers(self) -> None:
        inputs = _inputs(8, 16, 99, device=DEVICE)
        with torch.no_grad():
            inputs["features"][::2] = math.nan
        for gumbel in (False, True):
            outputs = masked_lm(**inputs, vocab_size=99, gumbel=gumbel, implementation="triton")
            assert outputs.loss.isnan()
            assert outputs.sampled.min() >= 0
            assert outputs.sampled.max() < 99

    def test_kernel_compiles_without_a_graph_break(self) -> None:
        inputs = _inputs(4, 16, 99, device=DEVICE)
        compiled = torch.compile(masked_lm, fullgraph=True, backend="aot_eager")
        actual, expected = (call(**inputs, vocab_size=99, implementation="triton") for call in (compiled, masked_lm))
        assert torch.equal(actual.sampled, expected.sampled)
        for ours, theirs in zip(_gradients(actual.loss, inputs), _gradients(expected.loss, inputs), strict=True):
            assert torch.equal(ours, theirs)

    def test_kernel_is_registered_as_torch_wants_it(self) -> None:
        from electra_composer.model.kernels.masked_lm_triton import masked_lm_triton

        inputs = _inputs(4, 16, 99, device=DEVICE)
        arguments = (*inputs.values(), inputs["targets"], 99, 1.0, False, 0.0, False)
        torch.library.opcheck(masked_lm_triton, arguments, test_utils=OPERATOR_CHECKS)


def _gumbel_samples(inputs: dict[str, Tensor], vocab_size: int, **options: float) -> Tensor:
    """Draws of the Triton kernels alone."""
    return masked_lm(**inputs, vocab_size=vocab_size, gumbel=True, implementation="triton", **options).sampled


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU: true sizes are too many for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "disallow_correct": True, "label_smoothing": 0.1}])
def test_true_size(dtype: torch.dtype, options: dict[str, float]) -> None:
    _assert_twins(_inputs(2432, 128, 30522, dtype, device="cuda"), 30522, **options)


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_no_tensor_of_all_logits_and_no_wait_for_the_device() -> None:
    inputs = _inputs(2432, 128, 30522, torch.bfloat16, device="cuda")
    _gradients(masked_lm(**inputs, vocab_size=30522).loss, inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(masked_lm(**inputs, vocab_size=30522).loss, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2432 * 30522 * 2


@pytest.mark.cuda
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_cuda_graph_repeats_the_step() -> None:
    inputs = _inputs(256, 128, 1000, torch.bfloat16, device="cuda")
    expected = masked_lm(**inputs, vocab_size=1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = masked_lm(**inputs, vocab_size=1000)
    graph.replay()
    assert torch.equal(captured.sampled, expected.sampled)
    assert torch.equal(captured.loss, expected.loss)


# -------------------------------------------------------------------------------------------------------- benchmark


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/masked_lm.py`, whose folder comes first on the path as when it is run as a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("masked_lm")


SMALL = ["--device", "cpu", "--rows", "40", "--vocab", "99", "--hidden", "16", "--repeats", "2", "--warmup", "1"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_benchmark_prints_one_line_of_results(
    benchmark: ModuleType, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*SMALL, "--precision", precision]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["implementation"] == "chunked"
    assert results["ours"]["min_ms"] <= results["ours"]["median_ms"]
    assert results["plain_over_ours"] == pytest.approx(
        results["plain"]["median_ms"] / results["ours"]["median_ms"], abs=0.01
    )
    assert results["liger"] is None
    assert results["absent"]["liger"] == "needs CUDA"
    assert torch.__version__.startswith(results["machine"]["versions"]["torch"])


def test_benchmark_fails_where_losses_differ(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = benchmark.Problem.plain
    monkeypatch.setattr(benchmark.Problem, "plain", lambda self: plain(self) * 1.01)
    assert benchmark.main(SMALL) == 1
    assert "loss 9.9e-03 > 2e-03" in capsys.readouterr().err
