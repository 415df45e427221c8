"""`trainer.compile: auto`: where it compiles, what it says, and the cache across starts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_trainer import make_trainer
from torch._inductor import exc

from electra_composer import compilers
from electra_composer.batches.shards import read_data
from electra_composer.config import PretrainConfig, TrainerConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.training import model_setup
from electra_composer.training.compilation import CompileReport, check_compile, choose_compile, compile_config
from electra_composer.training.trainer import RunTrainer
from electra_composer.vocabulary import load_tokenizer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


@pytest.mark.usefixtures("gpu")
def test_auto_compiles_on_a_gpu_where_batches_have_one_shape() -> None:
    assert compile_config(TrainerConfig(), static_shapes=True) == {"fullgraph": True, "dynamic": False}
    assert compile_config(TrainerConfig(), static_shapes=False) is None
    assert compile_config(TrainerConfig(device="cpu", precision="fp32"), static_shapes=True) is None
    check_compile(TrainerConfig(compile=True))


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)


def without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.sysconfig, "get_paths", lambda scheme: {"include": "/nowhere"})


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)


def with_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_compiler, "a C compiler (apt-get install gcc"),
        (without_headers, "Python's headers (/nowhere/Python.h; apt-get install python3-dev)"),
        (without_triton, "the package triton (pip install triton)"),
        (with_an_old_gpu, "compute capability 7.0"),
    ],
)
def test_a_machine_that_cannot_compile(gpu: pytest.MonkeyPatch, make, words: str) -> None:
    """With `auto` the run is eager and says why; with `true` it is refused."""
    make(gpu)
    choice, reason = choose_compile(TrainerConfig(), static_shapes=True)
    assert choice is False
    assert words in str(reason)
    check_compile(TrainerConfig())
    for mode in (True, "reduce-overhead"):
        with pytest.raises(UserError) as caught:
            check_compile(TrainerConfig(compile=mode))
        assert str(caught.value).startswith(f"trainer.compile is {mode} and the machine lacks ")
        assert words in str(caught.value)


def test_a_machine_that_cannot_compile_does_without_triton(
    gpu: pytest.MonkeyPatch, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_compiler(gpu)
    settings = ["trainer.attention=sdpa", "trainer.precision=amp_bf16"]
    config = load_config(str(tiny_yaml), settings, PretrainConfig)
    meta = read_data(config.data)
    model = model_setup.build_model(config, load_tokenizer(meta.tokenizer_folder), False)
    model_setup.choose_kernels(config, model, meta)
    assert model.model.objective.masked_lm == "chunked"
    assert "masked_lm: chunked (the machine lacks a C compiler" in capsys.readouterr().out
    config.objective.masked_lm = "triton"
    with pytest.raises(UserError, match=r"objective\.masked_lm is triton and the machine lacks a C compiler"):
        model_setup.choose_kernels(config, model, meta)


@pytest.mark.parametrize(
    ("choice", "reason", "lines"),
    [
        (True, "why", ["compile: on (why); the first batch includes the compilation", "compiled in 0 s"]),
        (False, "why", ["compile: off (why)"]),
        (False, None, []),
    ],
)
def test_the_report_is_one_line_each_and_leaves(choice, reason, lines, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer("3ba", trainer_class=RunTrainer, callbacks=[CompileReport(choice, reason)])
    trainer.fit()
    assert [line for line in capsys.readouterr().out.splitlines() if "compile" in line] == lines
    assert not any(isinstance(callback, CompileReport) for callback in trainer.state.callbacks)


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, "mine")
    compilers.keep_compiled_code()
    assert os.environ[name] == "mine"
    monkeypatch.delenv(name)
    compilers.keep_compiled_code()
    assert os.environ[name] == str(tmp_path / "electra_composer" / "inductor")
    assert os.path.isdir(os.environ[name])
    monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilers.keep_compiled_code()
    assert name not in os.environ


def test_an_operator_that_is_called_as_it_is_is_described_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, whose description grows with every such operator before it, are not described."""

    class Argument:
        def __str__(self) -> str:
            raise AssertionError("described")

    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(str))  # so that it is restored
    compilers.describe_operators_briefly()
    error = exc.MissingOperatorWithoutDecomp("aten.name", [Argument()], {"more": Argument()})
    assert "target: aten.name" in str(error)
