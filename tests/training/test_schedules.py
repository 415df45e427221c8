"""Learning rate schedules at given steps, in every unit of time, and in training."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from composer import Callback, State
from composer.core import Time, Timestamp
from composer.optim import LinearWithWarmupScheduler
from tiny_trainer import Tiny, make_trainer

from electra_composer.errors import UserError
from electra_composer.training.optim import AdamW
from electra_composer.training.schedules import (
    Schedule,
    adjusted_one_cycle,
    constant,
    electra,
    fastai_beta1,
    linear,
    one_cycle,
    one_cycle_fastai,
)

# --- schedules as functions of the step


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, (1 - 1e-6) * 1e-4),  # decays from the start
        (10_000, 0.99),
        (500_000, 0.5),
        (999_999, 1e-6),
    ],
)
def test_the_recipes_schedule_at_its_corners(step, expected):
    assert electra(step, 1_000_000, 10_000) == pytest.approx(expected, rel=1e-9)


def test_without_warmup_the_recipes_schedule_starts_at_the_top():
    assert [electra(step, 4, 0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (1, 0.1), (10, 1), (11, 1), (80, 1), (90, 0.5), (99, 0.05)])
def test_constant_warms_up_stays_and_decays_at_the_end(step, expected):
    assert constant(step, 100, 10, 20) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [7, 30])
def test_one_cycle_is_pytorchs(warmup):
    total = 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=warmup / total, cycle_momentum=False
    )
    for step in range(total):
        assert one_cycle(step, total, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        if step < total - 1:
            reference.step()


def test_one_cycle_with_next_to_no_warmup_starts_at_the_peak():
    assert one_cycle(0, 100, 0) == one_cycle(0, 100, 1) == 1.0  # PyTorch's divides by zero here
    assert one_cycle(99, 100, 0) == pytest.approx(1 / 25e4)


def fastai(position: float, share: float, start: float, middle: float, end: float) -> float:
    """fastai's `combined_cos`: `SchedCos(start, middle)` before `share`, `SchedCos(middle, end)` from there on."""
    first, last, position = (
        (start, middle, position / share) if position < share else (middle, end, (position - share) / (1 - share))
    )
    return first + (1 + math.cos(math.pi * (1 - position))) * (last - first) / 2


@pytest.mark.parametrize(("function", "div"), [(one_cycle_fastai, 25), (adjusted_one_cycle, 1e5)])
def test_the_cycle_of_fastai_and_of_electra_pytorch(function, div):
    total, warmup = 1000, 10
    for step in range(total):
        position = step, total, warmup
        expected = fastai(step / total, warmup / total, 1 / div, 1.0, 1e-5)
        assert function(*position) == pytest.approx(expected, rel=1e-9), step
        momentum = fastai(step / total, warmup / total, 0.95, 0.85, 0.95)
        assert fastai_beta1(*position) == pytest.approx(momentum, rel=1e-12), step
    assert function(0, total, warmup) == pytest.approx(1 / div)
    assert function(warmup, total, warmup) == 1.0
    assert [fastai_beta1(step, total, warmup) for step in (0, 10, 505)] == pytest.approx([0.95, 0.85, 0.9])


def test_the_cycle_of_fastai_is_not_that_of_pytorch():
    """Largest difference of the multipliers over 1000 steps, a quarter of them warmup, as by default in fastai."""
    differences = [one_cycle_fastai(step, 1000, 250) - one_cycle(step, 1000, 250) for step in range(1000)]
    assert max(map(abs, differences)) == pytest.approx(3.5e-3, rel=1e-3)


@pytest.mark.parametrize("warmup", [0, 10])
def test_linear_is_composers(warmup):
    reference = LinearWithWarmupScheduler(t_warmup=f"{warmup}ba", alpha_f=0.0)
    for step in range(101):
        state = fake_state("100ba", batch=step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert linear(step, 100, warmup) == pytest.approx(reference(state)), step


# --- the callback


def fake_state(max_duration: str, batch: int = 0, dataloader_len: int | None = None) -> State:
    return SimpleNamespace(
        max_duration=Time.from_timestring(max_duration),
        timestamp=Timestamp(batch=batch, sample=4 * batch, token=100 * batch),
        dataloader_len=None if dataloader_len is None else Time(dataloader_len, "ba"),
    )


@pytest.mark.parametrize(
    ("max_duration", "warmup"),
    [("100ba", "10ba"), ("100ba", "0.1dur"), ("100ba", "1ep"), ("10ep", "1ep"), ("10ep", "10ba"), ("10ep", "0.1dur"),
     ("400sp", "40sp"), ("10000tok", "1000tok"), ("10000tok", "0.1dur")],
)  # fmt: skip
@pytest.mark.parametrize("batch", [0, 1, 10, 50, 99])
def test_all_units_of_time_give_the_same_schedule(max_duration, warmup, batch):
    schedule = Schedule("electra", warmup, max_duration)
    expected = (1 - batch / 100) * min(1, batch / 10)
    assert schedule(fake_state(max_duration, batch, dataloader_len=10)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("electra", "10000", "1000000ba"), "schedule.warmup is '10000'; expected a time"),
        (("electra", "tenba", "100ba"), "schedule.warmup is 'tenba'"),
        (("electra", "10ba", "ages"), "trainer.max_duration is 'ages'"),
        (("electra", "-1ba", "100ba"), "schedule.warmup is '-1ba'; expected a time of 0 or more"),
        (("electra", "30min", "100ba"), "schedule.warmup is '30min'"),
        (("electra", "200ba", "100ba"), "schedule.warmup 200ba: longer than the training, trainer.max_duration 100ba"),
        (("electra", "1.5dur", "100ba"), "schedule.warmup is '1.5dur'"),
        (("electra", "2ep", "1ep"), "longer than the training"),
        (("electra", "10ba", "1000tok"), "give it in tok, or as a fraction"),
        (("electra", "10ba", "1dur"), "trainer.max_duration is '1dur'"),
        (("constant", "60ba", "100ba", "50ba"), "schedule.decay 50ba: longer"),
    ],
)
def test_times_that_do_not_fit_are_the_users_fault(arguments, message):
    with pytest.raises(UserError, match=message):
        Schedule(*arguments)


def test_what_depends_on_an_epochs_length_is_checked_when_it_is_known():
    schedule = Schedule("electra", "30ba", "2ep")
    with pytest.raises(UserError, match="longer than the training"):
        schedule(fake_state("2ep", dataloader_len=10))
    with pytest.raises(UserError, match="give all times in batches"):
        schedule(fake_state("2ep"))


class Rates(Callback):
    """Records the learning rates at each step of the optimizer."""

    def __init__(self):
        self.seen = {}

    def before_train_batch(self, state, logger):
        self.seen[state.timestamp.batch.value] = [group["lr"] for group in state.optimizers[0].param_groups]


class BetasAndGradients(Callback):
    """Records the betas of all groups, and the gradients, at each step of the optimizer."""

    def __init__(self):
        self.betas, self.gradients = [], []

    def after_train_batch(self, state, logger):
        self.betas.append([group["betas"] for group in state.optimizers[0].param_groups])
        self.gradients.append([parameter.grad.double() for parameter in state.model.parameters()])


def test_adamw_uses_the_beta1_of_each_step():
    """Against Adam's formula with the rates and the beta1 of fastai's cycle; flat: model/test_flat_parameters.py."""
    model, seen = Tiny(), BetasAndGradients()
    expected = [parameter.detach().double() for parameter in model.head.parameters()]
    optimizer = AdamW(model.parameters(), lr=0.1, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.0)
    schedule = Schedule("one_cycle_fastai", "4ba", "10ba")
    trainer = make_trainer("10ba", model, optimizers=optimizer, callbacks=[schedule, seen])
    trainer.fit()
    trainer.close()
    averages, squares = ([torch.zeros_like(each) for each in expected] for _ in range(2))
    for step in range(10):
        beta1 = fastai(step / 10, 0.4, 0.95, 0.85, 0.95)
        assert seen.betas[step] == [pytest.approx((beta1, 0.9))]
        rate = 0.1 * fastai(step / 10, 0.4, 1 / 25, 1.0, 1e-5)
        for weight, average, square, gradient in zip(expected, averages, squares, seen.gradients[step], strict=True):
            average += (1 - beta1) * (gradient - average)
            square += 0.1 * (gradient.square() - square)
            weight -= rate * average / (square.sqrt() + 1e-6)
    for parameter, weight in zip(model.head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-4, atol=1e-6)


def train(max_duration: str, warmup: str, **arguments) -> dict[int, list[float]]:
    model, rates = Tiny(), Rates()
    groups = [{"params": [model.head.weight], "lr": 1.0}, {"params": [model.head.bias], "lr": 0.5}]
    callbacks = [Schedule("electra", warmup, max_duration), rates]
    trainer = make_trainer(max_duration, model, optimizers=AdamW(groups, lr=1.0), callbacks=callbacks, **arguments)
    trainer.fit()
    trainer.close()
    return rates.seen


@pytest.mark.parametrize(("max_duration", "warmup"), [("10ba", "4ba"), ("2ep", "4ba"), ("40sp", "16sp")])
def test_the_trainer_uses_the_rate_of_each_step(max_duration, warmup):
    seen = train(max_duration, warmup)
    for step in range(10):
        multiplier = (1 - step / 10) * min(1, step / 4)
        assert seen[step] == pytest.approx([multiplier, 0.5 * multiplier]), step


def test_a_resumed_run_continues_the_schedule(tmp_path):
    train("10ba", "4ba", save_folder=str(tmp_path), save_interval="6ba", save_filename="ba{batch}.pt")
    assert sorted(path.name for path in tmp_path.glob("ba*")) == ["ba10.pt", "ba6.pt"]
    seen = train("10ba", "4ba", load_path=str(tmp_path / "ba6.pt"))
    assert list(seen) == [6, 7, 8, 9]
    for step, rates in seen.items():
        assert rates == pytest.approx([1 - step / 10, 0.5 * (1 - step / 10)])
