"""Non-finite losses and gradients: records, and updates that never reach the weights; loss spikes."""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from safetensors.torch import load_file

from electra_composer.config import PretrainConfig
from electra_composer.config_loading import load_config
from electra_composer.errors import UserError
from electra_composer.model.pretraining import ElectraPretraining
from electra_composer.pretrain import main
from electra_composer.training import numerical_guard
from electra_composer.training import trainer as trainer_module
from electra_composer.training.numerical_guard import NumericalGuard
from electra_composer.training.optim import AdamW
from electra_composer.training.spikes import SpikeDetector


class Watch(Callback):
    """Copies weights, moments and row numbers of every batch."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}
        self.rows: dict[int, list[int]] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        self.rows[state.timestamp.batch.value + 1] = state.batch["rows"].tolist()

    def batch_end(self, state: State, logger: Logger) -> None:
        (optimizer,) = state.optimizers
        tensors = {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}
        for name, parameter in state.model.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].clone()
        self.after[state.timestamp.batch.value] = tensors


Run = Callable[..., Watch]
Spoil = Callable[[int, torch.Tensor], torch.Tensor]


@pytest.fixture
def run(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(spoil, override, …)` runs six batches; `spoil(batch number, total)` returns a changed total loss."""

    def start(
        spoil: Callable[[int, torch.Tensor], torch.Tensor], *overrides: str, interval: int | None = None
    ) -> Watch:
        watch = Watch()
        monkeypatch.setattr(trainer_module, "build_callbacks", lambda config: [watch])
        monkeypatch.setattr(trainer_module, "NumericalGuard", functools.partial(NumericalGuard, interval=interval))

        def loss(model: ElectraPretraining, outputs: Any, batch: Any) -> dict[str, torch.Tensor]:
            losses = original(model, outputs, batch)
            return {**losses, "total": spoil(len(watch.rows), losses["total"])}

        original = ElectraPretraining.loss
        with monkeypatch.context() as patch:
            patch.setattr(ElectraPretraining, "loss", loss)
            short = ["trainer.max_duration=6ba", "trainer.eval_interval=6ba", "checkpoints.milestones=[1.0]"]
            try:
                main(load_config(str(tiny_yaml), [*short, *overrides], PretrainConfig))
            finally:
                start.watch = watch  # type: ignore[attr-defined]
        return watch

    return start


def infinite_at(*numbers: int) -> Spoil:
    """Make the loss infinite without changing its gradient."""
    return lambda batch, total: total + math.inf if batch in numbers else total


def nan_at(*numbers: int) -> Spoil:
    return lambda batch, total: total * math.nan if batch in numbers else total


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("spoil", "loss"), [(infinite_at(4), "inf"), (nan_at(4), "nan")])
def test_the_run_stops_and_says_what_led_to_it(run: Run, tmp_path: Path, spoil: Any, loss: str) -> None:
    with pytest.raises(UserError, match=rf"batch 4: the loss is {loss}.*trainer\.on_nonfinite=skip") as caught:
        run(spoil)
    assert "\n" not in str(caught.value)
    watch: Watch = run.watch  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "run" / "trouble" / "ba4-rank0.json").read_text())
    assert record["batch"] == 4
    assert record["rows"] == watch.rows[4]
    assert record["loss"] == loss
    assert record["gradient_norm"] == "nan"
    assert record["learning_rates"] == [5e-3 * (1 - 3 / 6)] * 2  # after the warmup; no layerwise decay: two groups
    assert all(math.isfinite(norm) for norm in record["parameter_norms"].values())
    batch = load_file(tmp_path / "run" / "trouble" / "ba4-rank0.safetensors")
    assert batch["rows"].tolist() == watch.rows[4]
    assert batch["input_ids"].shape == (8, 32)


def test_a_late_look_finds_the_weights_as_they_were(run: Run, tmp_path: Path) -> None:
    """On a GPU the host checks only every tenth batch: no update is applied in between."""
    with pytest.raises(UserError, match="batch 3: the loss is inf"):
        run(infinite_at(3), "checkpoints.interval=null", interval=5)
    after = run.watch.after  # type: ignore[attr-defined]
    assert sorted(after) == [1, 2, 3, 4]  # the error comes at the end of the fifth
    assert not torch.equal(after[1]["model.embeddings.word.weight"], after[2]["model.embeddings.word.weight"])
    for later in (3, 4):
        assert_same(after[2], after[later])


def test_no_checkpoint_is_written_before_the_look(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch 3: the loss is nan"):
        run(nan_at(3), "checkpoints.interval=4ba", interval=100)
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("interval", [1, 4])
def test_skipping_leaves_the_update_out_and_counts(run: Run, tmp_path: Path, interval: int) -> None:
    watch = run(infinite_at(2, 4), "trainer.on_nonfinite=skip", interval=interval)
    for spoilt in (2, 4):
        assert_same(watch.after[spoilt - 1], watch.after[spoilt])
    for fine in (3, 5, 6):
        name = "model.embeddings.word.weight"
        assert not torch.equal(watch.after[fine - 1][name], watch.after[fine][name])
    assert all(tensor.isfinite().all() for tensor in watch.after[6].values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("trouble/skipped_updates", 0) for row in rows) == 2
    assert sorted(path.stem for path in (tmp_path / "run" / "trouble").glob("*.json")) == ["ba2-rank0", "ba4-rank0"]


def test_skipping_for_ever_ends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerical_guard, "MAX_SKIPS", 3)
    with pytest.raises(UserError, match=r"batch 4: .* in each of the last 3 batches"):
        run(nan_at(2, 3, 4, 5), "trainer.on_nonfinite=skip")


@pytest.mark.parametrize("bias_correction", ["true", "false"])
def test_a_first_update_that_is_skipped(run: Run, bias_correction: str) -> None:
    """The optimizer has no state yet: it is created and stays zero."""
    watch = run(nan_at(1), "trainer.on_nonfinite=skip", f"optimizer.bias_correction={bias_correction}")
    moments = {name: tensor for name, tensor in watch.after[1].items() if "exp_avg" in name}
    assert moments
    assert not any(tensor.any() for tensor in moments.values())
    assert all(tensor.isfinite().all() for tensor in watch.after[6].values())


def test_a_full_disk_does_not_hide_what_happened(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trouble").write_text("a file in place of the folder")
    with pytest.raises(UserError, match="batch 4: the loss is nan"):
        run(nan_at(4))


@pytest.mark.parametrize("clip", [0.5, None, 1e6])
def test_clipping_is_torchs(clip: float | None) -> None:
    mine, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    for model in (mine, theirs):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
    guard = NumericalGuard("nowhere", clip)
    optimizer = AdamW(mine.parameters(), lr=0.1)
    state = type("State", (), {"batch": {}, "model": mine, "optimizers": [optimizer], "precision": "fp32"})
    guard._pending.append(numerical_guard.PendingBatch(1, 0, {}))
    guard.after_train_batch(state, None)  # type: ignore[arg-type]
    assert guard._pending[-1].norm == expected
    for left, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)  # type: ignore[arg-type]


# Spikes


def spikes(losses: list[float], **arguments: Any) -> tuple[SpikeDetector, list[str]]:
    watch = SpikeDetector(**arguments)
    lines = [watch.update(batch, loss) for batch, loss in enumerate(losses, start=1)]
    return watch, [line for line in lines if line is not None]


def test_noise_and_a_falling_loss_are_no_spikes() -> None:
    dice = random.Random(0)
    falling = [10 * math.exp(-batch / 300) + 5 + dice.gauss(0, 0.3) for batch in range(2000)]
    assert spikes(falling)[1] == []


def test_a_spike_is_one_line() -> None:
    dice = random.Random(0)
    losses = [5 + dice.gauss(0, 0.1) for _ in range(500)]
    losses[300] = 9.0
    watch, lines = spikes(losses)
    assert (watch.count, watch.last) == (1, 301)
    (line,) = lines
    assert line.startswith("batch 301: the loss is 9; its running mean is 5")
    sigma = float(line.rpartition("sigma ")[2])
    assert sigma == pytest.approx(0.1, rel=0.3)


def test_many_spikes_are_few_lines() -> None:
    losses = [5.0] * 1000
    for batch in range(200, 320, 10):
        losses[batch] = 50.0
    watch, lines = spikes(losses)
    assert watch.count == 12
    assert len(lines) == 2
    assert lines[1].startswith("batch 301:")
    assert lines[1].endswith("(9 more spikes since the last report)")


def test_a_resumed_run_counts_on() -> None:
    """Reports after a resume are those of an uninterrupted run."""
    dice = random.Random(0)
    losses = [5 + dice.gauss(0, 0.1) for _ in range(150)] + [9.0] + [5.0] * 20
    guard = NumericalGuard("nowhere", None)
    guard.skipped = 3
    for batch, loss in enumerate(losses[:120], start=1):
        guard.spikes.update(batch, loss)
    resumed = NumericalGuard("nowhere", None)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.skipped == 3
    for batch, loss in enumerate(losses[120:], start=121):
        assert resumed.spikes.update(batch, loss) == guard.spikes.update(batch, loss)
    assert resumed.spikes.last == 151
    assert vars(resumed.spikes) == vars(guard.spikes)


def test_no_spike_before_there_is_a_mean() -> None:
    assert spikes([5.0] * 50 + [50.0] + [5.0] * 20)[1] == []


def test_a_run_warns_of_a_spike(run: Run, monkeypatch: pytest.MonkeyPatch, caplog: Any, tmp_path: Path) -> None:
    """With a record of the batch, of the first ones only."""
    monkeypatch.setattr(numerical_guard, "SpikeDetector", functools.partial(SpikeDetector, patience=2, sigmas=3.0))
    monkeypatch.setattr(numerical_guard, "MAX_RECORDS", 1)
    watch = run(lambda batch, total: total * {4: 100, 6: 10000}.get(batch, 1))
    first, second = (
        record.getMessage() for record in caplog.records if record.name == "electra_composer.training.numerical_guard"
    )
    assert first.startswith("batch 4: the loss is ")
    assert first.endswith(f"its rows, losses and norms are in {tmp_path / 'run' / 'trouble'}")
    assert second.startswith("batch 6: the loss is ")
    assert "trouble" not in second
    (path,) = (tmp_path / "run" / "trouble").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["batch"], record["rows"]) == (4, watch.rows[4])
    assert record["loss"] == pytest.approx(100 * sum(record["parts_of_this_loss"][p] * w for p, w in WEIGHTS.items()))


WEIGHTS = {"mlm": 1.0, "rtd": 50.0}
