"""What cannot be recorded is said, and trained on as usual; with a stand-in for CUDA graphs (tape.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from recorded_steps import BATCHES, OVERRIDES, Run, assert_equal_weights, metrics, run_fixture  # noqa: F401 (a fixture)
from tape import Tape

from electra_composer.config import PretrainConfig, TrainerConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.pretrain import main
from electra_composer.training.builders import CALLBACKS
from electra_composer.training.device_graph import GRAPHS
from electra_composer.training.step_graph import obstacle_in_config


class Waiting(Callback):
    """Reads the loss in every step."""

    def after_loss(self, state: State, logger: Logger) -> None:
        float(state.loss["total"])


def test_callbacks_that_cannot_be_recorded(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CALLBACKS, "waiting", Waiting)
    with pytest.raises(
        UserError, match=r"trainer\.cuda_graph is true, and the callback Waiting is called at after_los"
    ):
        run("refused", "trainer.cuda_graph=true", "callbacks.waiting={}")
    run("ordinary", "trainer.cuda_graph=auto", "callbacks.waiting={}")
    assert "CUDA graph: not used, because the callback Waiting is called at after_loss\n" in capsys.readouterr().out
    assert Tape.launches == 0


@pytest.mark.parametrize("setting", ["auto", "true"])
def test_a_step_that_waits_for_the_device(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    original = ElectraPretraining.loss

    def loss(*arguments: Any) -> Any:
        losses = original(*arguments)
        assert losses["total"] > 0  # a comparison that the host waits for
        return losses

    ordinary = run("ordinary", "trainer.cuda_graph=false")
    monkeypatch.setattr(ElectraPretraining, "loss", loss)
    if setting == "true":
        with pytest.raises(
            UserError, match="cannot be recorded: RuntimeError: operation not permitted when stream is capturing"
        ):
            run("refused", "trainer.cuda_graph=true")
        return
    fallen_back = run("auto", "trainer.cuda_graph=auto")
    assert (Tape.runs, Tape.launches) == (BATCHES, 0)
    assert "not used, because the step cannot be recorded: RuntimeError: operation not permitted" in caplog.text
    assert_equal_weights(ordinary, fallen_back)


@pytest.mark.parametrize(
    "read",
    [
        torch.Tensor.item,
        bool,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.nonzero,
        lambda tensor: tensor.reshape(1)[tensor.reshape(1) > 0],
        lambda tensor: torch.equal(tensor, tensor),
    ],
)
def test_what_waits_for_the_device(read: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        Tape().record(lambda: read(torch.ones(())))


def test_a_step_that_reads_a_number_of_the_host(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A recording would repeat the number of the batch that it was made with."""
    original = ElectraPretraining.forward

    def forward(model: ElectraPretraining, batch: dict[str, Any]) -> dict[str, Any]:
        assert model.training is False or batch["num_tokens"] > 0
        return original(model, batch)

    monkeypatch.setattr(ElectraPretraining, "forward", forward)
    run("auto", "trainer.cuda_graph=auto")
    assert Tape.launches == 0
    assert "not used, because the step cannot be recorded: KeyError: 'num_tokens'" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("trainer.activation_checkpointing=true", "trainer.activation_checkpointing is true"),
        ("schedule.name=adjusted_one_cycle", "schedule.name=adjusted_one_cycle changes beta1 in every step"),
        ("trainer.fsdp={}", "FSDP runs in Composer's step"),
    ],
)
def test_what_is_not_recorded_is_said(
    run: Run, overrides: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("auto", "trainer.max_duration=2ba", "trainer.eval_interval=2ba", overrides)
    assert f"CUDA graph: not used, because {reason}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"trainer\.cuda_graph is true, and "):
        run("required", "trainer.max_duration=2ba", "trainer.eval_interval=2ba", "trainer.cuda_graph=true", overrides)


def test_obstacles_in_the_configuration() -> None:
    trainer = TrainerConfig(global_train_batch_size=8, device_eval_batch_size=8)
    assert obstacle_in_config(trainer, static_shapes=True) is None
    assert obstacle_in_config(trainer, static_shapes=False) == "batches differ in length"
    trainer.compile = "reduce-overhead"
    assert obstacle_in_config(trainer, True) == "trainer.compile=reduce-overhead records graphs of its own"


def test_a_setting_that_is_none(run: Run) -> None:
    with pytest.raises(UserError, match=r"trainer\.cuda_graph is 'always'; expected true, false or auto"):
        run("refused", "trainer.cuda_graph=always")


def test_on_a_cpu_there_is_nothing_to_say(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(GRAPHS, "cpu")
    run("auto", "trainer.max_duration=2ba", "trainer.eval_interval=2ba")
    assert "CUDA graph" not in capsys.readouterr().out
    with pytest.raises(UserError, match="cuda_graph is true, and there are no such graphs on a cpu"):
        run("refused", "trainer.cuda_graph=true")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_that_waits_for_a_gpu(
    write_tiny_yaml: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training goes on after the recording failed, with random numbers and memory as before."""
    original = ElectraPretraining.loss

    def loss(*arguments: Any) -> Any:
        losses = original(*arguments)
        assert losses["total"] > 0
        return losses

    monkeypatch.setattr(ElectraPretraining, "loss", loss)
    overrides = ("trainer.device=gpu", "trainer.compile=false", "trainer.cuda_graph=auto")
    trainer = main(load_config(str(write_tiny_yaml(tmp_path)), [*OVERRIDES, *overrides], PretrainConfig))
    assert trainer.state.timestamp.batch.value == BATCHES
    assert "not used, because the step cannot be recorded" in caplog.text
