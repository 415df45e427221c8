"""Recorded training steps train as ordinary ones, with a stand-in for CUDA graphs (tape.py)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from recorded_steps import BATCHES, OVERRIDES, Run, assert_equal_weights, metrics, run_fixture  # noqa: F401 (a fixture)
from tape import Tape

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.pretrain import main
from electra_composer.training import trainer as trainer_module
from electra_composer.training.builders import CALLBACKS
from electra_composer.training.devices import whole_tensors
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.step_graph import WARM_UP, StaticBatch, signature

# Every objective and every generator that is computed, each once.
OBJECTIVES = (
    ["objective.mask_draw=exact"],
    ["objective.mask_draw=bernoulli", "model.sharing=gdes"],
    ["objective.kind=mlm"],
    ["objective.kind=replace_mlm", "objective.generator=unigram"],
    ["objective.kind=all_tokens_mlm", "objective.generator=uniform"],
    ["objective.kind=electra_15", "objective.sampling=gumbel", "model.sharing=untied"],
    ["objective.kind=electric", "objective.mask_draw=with_replacement"],  # by two towers
)


@pytest.mark.parametrize("how", OBJECTIVES, ids=" ".join)
def test_recorded_steps_train_as_ordinary_ones(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    """Metrics, weights and optimizer states are bitwise identical, with dropout, two microbatches, an evaluation in
    between, and a learning rate that changes with every batch; also if batches have another number of masked tokens."""
    ordinary = run("ordinary", "trainer.cuda_graph=false", *how)
    assert Tape.runs == Tape.launches == 0
    assert "CUDA graph" not in capsys.readouterr().out
    recorded = run("recorded", "trainer.cuda_graph=true", *how)
    assert (Tape.runs, Tape.launches) == (WARM_UP, BATCHES - WARM_UP)
    assert "CUDA graph: each training step is one launch, after the first few\n" in capsys.readouterr().out
    assert_equal_weights(ordinary, recorded)
    assert metrics(tmp_path / "ordinary") == metrics(tmp_path / "recorded")
    logged = metrics(tmp_path / "recorded")
    means = {name for line in logged for name in line if re.fullmatch("metrics/train/.*_loss", name)}
    assert means
    for name in ("loss/train/total", *means):
        assert len({line[name] for line in logged if name in line}) == BATCHES


def test_python_runs_only_while_recording(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = ElectraPretraining.loss

    def loss(*arguments: Any) -> Any:
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(ElectraPretraining, "loss", loss)
    run("once", "trainer.cuda_graph=true")
    assert len(calls) == 2 * (WARM_UP + 1)


class Killed(Callback):
    """Ends a run after five batches."""

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == 5:
            raise InterruptedError


def test_a_run_resumes_in_the_middle(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resumed run begins with ordinary steps where the other had recorded ones; nothing differs."""
    whole = run("whole", "trainer.cuda_graph=true")
    monkeypatch.setitem(CALLBACKS, "killed", Killed)
    with pytest.raises(InterruptedError):
        run("halves", "trainer.cuda_graph=true", "checkpoints.interval=4ba", "callbacks.killed={}")
    resumed = run("halves", "trainer.cuda_graph=true", "checkpoints.interval=4ba")
    assert (Tape.runs, Tape.launches) == (3 * WARM_UP, (BATCHES - WARM_UP) + (5 - WARM_UP) + (BATCHES - 4 - WARM_UP))
    assert_equal_weights(whole, resumed)


class AtTheEnd(Callback):
    """Reads the loss after every step, from outside of the recording."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sums: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(float(state.loss["total"]))
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        self.sums.append(sum(float(gradient.sum()) for gradient in gradients))


def test_other_callbacks_see_loss_and_gradients_of_each_batch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name, setting in (("ordinary", "false"), ("recorded", "true")):
        callback = AtTheEnd()
        monkeypatch.setitem(CALLBACKS, "at_the_end", lambda callback=callback: callback)
        run(name, f"trainer.cuda_graph={setting}", "callbacks.at_the_end={}")
        seen.append((callback.losses, callback.sums))
    assert seen[0] == seen[1]
    assert len(set(seen[0][0])) == len(set(seen[0][1])) == BATCHES


@pytest.mark.parametrize(
    ("others", "ordinary"),
    [([3], 2 + 1 + WARM_UP), ([6], WARM_UP + 1), ([5, 6, 7, 8, 9], 2 * WARM_UP)],
    ids=["before", "between", "from there on"],
)
def test_a_batch_of_another_shape_is_an_ordinary_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, others: list[int], ordinary: int
) -> None:
    """Before and between recorded steps, whose gradients are shown again after it; or they are recorded again."""
    original = ElectraPretraining.count_batch
    seen = []

    def count_batch(model: ElectraPretraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(batch)
        rows = 5 if len(seen) in others else 8
        return original(model, {name: value if name == "num_tokens" else value[:rows] for name, value in batch.items()})

    monkeypatch.setattr(ElectraPretraining, "count_batch", count_batch)
    trainers, sums = [], []
    for name, setting in (("ordinary", "false"), ("recorded", "true")):
        seen.clear()
        callback = AtTheEnd()
        monkeypatch.setitem(CALLBACKS, "at_the_end", lambda callback=callback: callback)
        trainers.append(run(name, f"trainer.cuda_graph={setting}", "callbacks.at_the_end={}"))
        sums.append(callback.sums)
    assert (Tape.runs, Tape.launches) == (ordinary, BATCHES - ordinary)
    assert_equal_weights(*trainers)
    assert sums[0] == sums[1]
    assert metrics(tmp_path / "ordinary") == metrics(tmp_path / "recorded")


@pytest.mark.parametrize(("setting", "interval"), [("skip", 1), ("stop", 1), ("stop", 8)])
def test_a_loss_that_is_not_finite(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str, interval: int
) -> None:
    """The update of a recorded step is left out on the device; with `stop`, all later ones as well, until the host
    checks, which finds the loss and the norm of each batch."""
    monkeypatch.setattr(trainer_module, "NumericalGuard", functools.partial(NumericalGuard, interval=interval))
    original = ElectraPretraining.count_batch
    seen: list[Any] = []

    def count_batch(model: ElectraPretraining, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(batch)
        counted = original(model, batch)
        if len(seen) == 6:
            counted["loss_scale"] = counted["loss_scale"] * torch.inf
        return counted

    monkeypatch.setattr(ElectraPretraining, "count_batch", count_batch)
    trainers = []
    for name, graph in (("ordinary", "false"), ("recorded", "true")):
        seen.clear()
        overrides = (f"trainer.cuda_graph={graph}", f"trainer.on_nonfinite={setting}")
        if setting == "stop":
            with pytest.raises(UserError, match="batch 6: the loss is inf"):
                run(name, *overrides)
        else:
            trainers.append(run(name, *overrides))
    assert Tape.launches == (BATCHES if setting == "skip" else max(6, interval)) - WARM_UP
    records = [
        json.loads((tmp_path / name / "run/trouble/ba6-rank0.json").read_text()) for name in ("ordinary", "recorded")
    ]
    assert records[0] == records[1]
    if trainers:
        assert_equal_weights(*trainers)
        assert all(parameter.isfinite().all() for parameter in trainers[1].state.model.parameters())


def test_a_batch_is_copied_as_a_whole() -> None:
    packed = torch.arange(24).view(4, 2, 3).clone()
    batch = dict(zip(("a", "b", "c", "d"), packed.unbind(), strict=True)) | {"scale": torch.ones(2, 2)}
    assert {names: whole.shape for names, whole in whole_tensors(batch).items()} == {
        ("a", "b", "c", "d"): (4, 2, 3),
        ("scale",): (2, 2),
    }
    static = StaticBatch(batch, torch.device("cpu"))
    addresses = {name: tensor.data_ptr() for name, tensor in static.tensors.items()}
    for factor in (1, 7):
        static.fill({**dict(zip("abcd", (packed * factor).unbind(), strict=True)), "scale": torch.ones(2, 2) * factor})
        assert all(torch.equal(static.tensors[name], batch[name] * factor) for name in batch)
    assert addresses == {name: tensor.data_ptr() for name, tensor in static.tensors.items()}
    assert list(static.tensors) == list(batch)


def test_the_signature_of_a_batch() -> None:
    batch = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    assert signature(batch, [1.0]) == signature({"a": torch.ones(2, 3), "b": torch.ones(2)}, [1.0])
    for other, weights in (
        ({**batch, "a": torch.zeros(2, 4)}, [1.0]),
        ({**batch, "a": torch.zeros(2, 3).double()}, [1.0]),
        ({"a": batch["a"]}, [1.0]),
        (batch, [0.5, 0.5]),
    ):
        assert signature(other, weights) != signature(batch, [1.0])
    assert signature({**batch, "num_tokens": 7}, [1.0]) == signature(batch, [1.0])
    assert signature([batch["a"]], [1.0]) is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_on_a_gpu(
    write_tiny_yaml: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: str
) -> None:
    """Losses and weights of recorded steps are those of ordinary ones."""
    trainers = []
    for setting in ("false", "true"):
        (tmp_path / setting).mkdir()
        yaml = write_tiny_yaml(tmp_path / setting)
        overrides = ("trainer.device=gpu", f"trainer.compile={compiled}", f"trainer.cuda_graph={setting}")
        trainers.append(main(load_config(str(yaml), [*OVERRIDES, *overrides], PretrainConfig)))
    assert "CUDA graph: each training step is one launch" in capsys.readouterr().out
    assert trainers[1].step.run.__self__.recording is not None
    ordinary, recorded = (
        [line["loss/train/total"] for line in metrics(tmp_path / setting) if "loss/train/total" in line]
        for setting in ("false", "true")
    )
    assert recorded == pytest.approx(ordinary, rel=1e-4)
    for mine, other in zip(*(trainer.state.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
