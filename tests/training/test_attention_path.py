"""Choice of the attention path: configured, measured, and compared with sdpa."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from electra_composer.config import TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.encoder import EncoderConfig
from electra_composer.training import attention_path
from electra_composer.training.attention_path import LayerCalls, choose_attention, fastest, wrong_paths

ENCODER = EncoderConfig(99, 16, 32, 2, 4, 128, 40, 0.1, 0.1, 0.02, 1e-12)
SMALLER = replace(ENCODER, hidden_size=16, num_heads=1, num_layers=3)


def test_attention_of_a_cpu() -> None:
    for attention in ("auto", "sdpa"):
        trainer = TrainerConfig(device="cpu", precision="fp32", attention=attention)  # type: ignore[arg-type]
        path, reason = choose_attention(trainer, (ENCODER,), 8, 32)
        assert path == "sdpa"
        assert reason


@pytest.mark.parametrize(
    ("encoders", "length", "message"),
    [
        ((ENCODER,), 513, r"rows of 513 tokens; expected at most 512"),
        ((ENCODER, replace(ENCODER, num_heads=1, hidden_size=130)), 32, r"heads of size 130; expected at most 128"),
    ],
)
def test_triton_is_refused_for_sizes_that_it_does_not_support(
    encoders: tuple[EncoderConfig, ...], length: int, message: str
) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UserError, match=rf"does not support {message}; set trainer\.attention=auto or sdpa"):
        choose_attention(TrainerConfig(attention="triton"), encoders, 8, length)
    assert choose_attention(TrainerConfig(attention="triton"), (ENCODER,), 8, 512)[0] == "triton"


def test_without_the_package_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_path, "HAS_TRITON", False)
    with pytest.raises(UserError, match="the package triton is missing"):
        choose_attention(TrainerConfig(attention="triton"), (ENCODER,), 8, 32)


def fails() -> Callable[[], float]:
    raise RuntimeError("no kernel for this head size\nstack")


def test_the_fastest_path_is_taken_and_one_that_fails_is_named() -> None:
    """The median counts: the fast path has one slow round."""
    times = iter([9.0, 1e-3, 1e-3, 1e-3, 1e-3])
    paths: dict[str, Callable[[], Callable[[], float]]] = {
        "slow": lambda: lambda: 2e-3,
        "fast": lambda: lambda: next(times),
        "fails": fails,
        "wrong": lambda: lambda: 1e-4,
    }
    path, reason = fastest(paths, {"wrong": "differs from sdpa by 1"})
    assert path == "fast"
    assert reason.endswith(
        "slow 2.00 ms, fast 1.00 ms, fails: no kernel for this head size, wrong: differs from sdpa by 1"
    )
    with pytest.raises(RuntimeError, match="no path of attention runs here: fails: no kernel"):
        fastest({"fails": fails}, {})


def test_a_path_with_a_wrong_token_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounding to bf16 is no difference; one token of 8 × 20 that is wrong in the second encoder is."""
    calls = {path: LayerCalls(path, (ENCODER, SMALLER), 8, 20, torch.float32, "cpu") for path in ("sdpa", "varlen")}
    run = calls["sdpa"].run

    def rounded(number: int, dropout_p: float) -> tuple[Tensor, Tensor]:
        out, gradient = run(number, dropout_p)
        return out.bfloat16(), gradient.bfloat16()

    def wrong(number: int, dropout_p: float) -> tuple[Tensor, Tensor]:
        out, gradient = rounded(number, dropout_p)
        if number == 1:
            gradient[3, 7] = 0.0
        return out, gradient

    monkeypatch.setattr(calls["varlen"], "run", rounded)
    assert wrong_paths(calls) == {}
    monkeypatch.setattr(calls["varlen"], "run", wrong)
    with caplog.at_level(logging.WARNING):
        assert list(wrong_paths(calls)) == ["varlen"]
    assert "varlen differs from sdpa by" in caplog.text
    monkeypatch.setattr(calls["varlen"], "run", lambda *_: fails())
    assert wrong_paths(calls) == {"varlen": "no kernel for this head size"}


def test_seconds_are_those_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of each encoder is timed and counted as often as the encoder has layers."""
    monkeypatch.setattr(attention_path, "device_timer", lambda run: lambda: float(run()[0].shape[-1]))
    calls = LayerCalls("sdpa", (ENCODER, SMALLER), 4, 12, torch.float32, "cpu")
    assert calls.prepare()() == 2 * 32 + 3 * 16


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["amp_bf16", "fp32"])
def test_attention_is_chosen_by_measuring(precision: str) -> None:
    trainer = TrainerConfig(precision=precision)  # type: ignore[arg-type]
    path, reason = choose_attention(trainer, (SMALLER, ENCODER), 8, 32)
    assert path in ("sdpa", "varlen", "triton")
    assert reason.startswith("all layers, measured: sdpa ")
    assert "triton: " not in reason  # it ran, and its results are those of sdpa
