"""`trainer.deterministic`, and the operators of a step that are not deterministic without it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from electra_composer.config import OptimizerConfig, PretrainConfig, TrainerConfig
from electra_composer.errors import UserError
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.training import startup
from electra_composer.training.builders import build_optimizer
from electra_composer.training.determinism import (
    NONDETERMINISTIC,
    describe_nondeterminism,
    explain_nondeterministic_operators,
)

Make = Callable[..., Any]
ROWS = [[(10, 12), (5, 0)], [(20, 0)], [(16, 16)], [(5, 3), (4, 4), (3, 0)]]
ADDS_ZEROS = {"scatter", "scatter_add"}  # at masked positions, see NONDETERMINISTIC
CUBLAS = {"mm", "mv", "bmm"}  # not deterministic on several streams only
UNDOCUMENTED = {"embedding_backward"}  # in torch 2.7; documented in 2.15


class Operators(TorchDispatchMode):
    """Records the names of dispatched operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def documented() -> set[str]:
    """Return the operators in torch's list of what is not deterministic, `…_backward` where only the gradient is."""
    text = torch.use_deterministic_algorithms.__doc__
    assert text is not None
    operators = set()
    for name, remark in re.findall(r"\* :(?:func|class):`torch\.([\w.]+)`(.*?)(?=\n *\*|\n\n)", text, re.DOTALL):
        operator = name.split(".")[-1].lower().strip("_")
        operators.add(f"{operator}_backward" if re.search("differentiate|requires grad", remark) else operator)
    assert {"scatter_add", "index_add", "index_select_backward", "cumsum"} <= operators  # the list has been read
    return operators - CUBLAS | UNDOCUMENTED


def test_the_operators_of_a_step_that_are_named_are_those_that_torch_documents(
    make_model: Make, make_batch: Make, tiny_model_config: Make
) -> None:
    model = ElectraPretraining(make_model(tiny_model_config(num_layers=1, dropout=0.1, attention_dropout=0.1)))
    optimizer = build_optimizer(OptimizerConfig(lr=1e-3), model)
    batch = model.count_batch(make_batch(ROWS))
    with Operators() as operators:
        model.loss(model(batch), batch)["total"].backward()
        optimizer.step()
    known = documented()
    found = {name for name in operators.names if name.replace("_dense_backward", "_backward") in known}
    assert found == {*NONDETERMINISTIC, *ADDS_ZEROS}


def test_the_start_names_them_on_a_gpu_alone() -> None:
    line = describe_nondeterminism(TrainerConfig(), "gpu", "sdpa", "torch")
    assert line is not None
    for name in (*NONDETERMINISTIC, "scaled_dot_product_attention"):
        assert name in line
    assert describe_nondeterminism(TrainerConfig(), "cpu", "sdpa", "torch") is None
    assert describe_nondeterminism(TrainerConfig(deterministic=True), "gpu", "sdpa", "torch") is None
    assert describe_nondeterminism(TrainerConfig(), "gpu", "triton", "triton") is None
    assert describe_nondeterminism(TrainerConfig(), "gpu", "triton", "torch") is not None


@pytest.fixture
def _not_deterministic_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_not_deterministic_afterwards")
def test_the_switch_is_set_before_cuda_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_of(trainer: TrainerConfig) -> tuple[str, str, bool]:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise UserError("asked")

    monkeypatch.setattr(startup, "resolve_device", device_of)
    with pytest.raises(UserError, match="asked"):
        startup.start(PretrainConfig(trainer=TrainerConfig(deterministic=True)))


@pytest.mark.usefixtures("_not_deterministic_afterwards")
def test_an_operator_without_a_deterministic_kernel_is_named() -> None:
    torch.use_deterministic_algorithms(True)
    with (
        pytest.raises(UserError, match=r"no deterministic kernel for put_ on this device; set trainer\.determ"),
        explain_nondeterministic_operators(),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(RuntimeError, match="other"), explain_nondeterministic_operators():
        raise RuntimeError("other")


def test_the_gradient_of_the_token_table_has_a_deterministic_kernel_in_any_case() -> None:
    """In the Triton implementation, which the start does not name; the settings of torch are as before afterwards."""
    from electra_composer.model.kernels.embeddings_triton import deterministic_kernels

    for mode in ("default", "warn", "error"):
        torch.set_deterministic_debug_mode(mode)
        before = torch.get_deterministic_debug_mode()
        with deterministic_kernels():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert torch.get_deterministic_debug_mode() == before
        assert torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("default")
